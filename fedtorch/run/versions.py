"""Which versions of which packages a run used, and which commit."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str | None:
    """Version of an installed package; of fedtorch, which may run from a checkout, its own."""
    if package == "fedtorch":
        return str(sys.modules["fedtorch"].__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the source fedtorch runs from, with ``+`` when it has changes; none for a wheel."""
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():  # installed: a repository around it is somebody else's
        return None
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=source,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
