"""What a file may name: nothing that Python would import, unless whoever starts the run says so.

A config or a run folder may come from anybody, and so may what lies beside it: the user may have gone to
a folder of somebody else. Hence one rule for ``train --config``, ``--resume``, ``eval``, ``predict`` and
``serve``. Short names are fedtorch's own. A dotted name, a path, a short name that a file in ``./models``
answers to, or another machine's address needs ``--trust-code``. What is typed on the command line is
trusted as it is, and so is the config of a run that this user began with it, in the same working folder.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.run import zoo
from fedtorch.run.names import CHOICES, SEVERAL, grouped
from fedtorch.types import ConfigError

FLAG = "--trust-code"

REACHED = (
    ("dataset", "custom", "path"),
    ("engine", "ray", "address"),
    ("tracking", "mlflow", "uri"),
)
"""Options of a choice that name code, or a machine to send things to."""

SINGLE = ("model", "optimizer", "loss", "step", "eval_step")
"""Options that are one name."""

SHORT = re.compile(r"[\w-]*")
"""Names of models, losses, metrics and optimizers that are found without an import by path."""


def foreign(table: Mapping[str, Any]) -> dict[str, str]:
    """Option -> the name in it that only an import by path, or another machine, could give."""
    found = _choices(table)
    for option in SINGLE:
        found[option] = _name(table.get(option))
    if SHORT.fullmatch(found["model"]):
        found["model"] = zoo.elsewhere(found["model"]) or found["model"]
    for option in ("metrics", "steps"):  # steps: those that a site agrees to
        listed = table.get(option, [])
        for name in listed.split(",") if isinstance(listed, str) else _list(listed):
            if not SHORT.fullmatch(str(name)):
                found[option] = str(name)
    for choice, kind, option in REACHED:
        chosen = table.get(choice)
        if isinstance(chosen, Mapping) and _name(chosen).lower() == kind and chosen.get(option):
            found[f"{choice}.{option}"] = str(chosen[option])
    named = {k: n for k, n in found.items() if k not in SINGLE or not SHORT.fullmatch(n)}
    return named | _classes(table)


def remember(config: str) -> None:
    """Keep that this user began a run with this very config, from this working folder.

    Where nothing can be kept, the next command asks for the flag.
    """
    with suppress(OSError):
        place = _place(config)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.touch()


def remembered(config: Path) -> bool:
    """Whether this user began a run with this very config, from this working folder."""
    try:
        return _place(disk.regular(config).read_bytes().decode(errors="replace")).is_file()
    except OSError:
        return False


def _place(config: str) -> Path:
    # names are found from the working folder: in another one they may be another's code
    digest = hashlib.sha256(f"{Path.cwd()}\n{config}".encode()).hexdigest()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fedtorch" / "trusted" / digest


def check(
    table: Mapping[str, Any], typed: Mapping[str, Any], source: str, trusted: bool = False
) -> None:
    """Raises ConfigError, before anything is imported, for a name that was not ``typed``."""
    if trusted:
        return
    known = foreign(typed)
    named = [f"{k} = {n!r}" for k, n in foreign(table).items() if known.get(k) != n]
    if named:
        raise ConfigError(
            f"{source} names code to import and run: {', '.join(named)}; add {FLAG} if it is yours "
            "or you trust whoever wrote it"
        )


def _choices(table: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for choice in CHOICES:
        value: Any = table
        for key in choice.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        names = [_name(value)]
        if choice in SEVERAL:
            names = [n for part, _ in grouped(choice, value) for n, _ in part]
        # as fedtorch.run.objects reads it; any other name is ours or nobody's
        if dotted := [n for n in names if "." in n or ":" in n]:
            found[choice] = ",".join(dotted)
    return found


def _classes(value: Any, where: str = "") -> dict[str, str]:
    # the parser's own spelling of "make an object of this class"
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, inner in value.items():
            here = f"{where}.{key}" if where else str(key)
            found |= {here: str(inner)} if key == "class_path" else _classes(inner, here)
        return found
    return {
        k: n for i, v in enumerate(_list(value)) for k, n in _classes(v, f"{where}.{i}").items()
    }


def _name(value: Any) -> str:
    value = value.get("name") if isinstance(value, Mapping) else value
    return "" if value is None else str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
