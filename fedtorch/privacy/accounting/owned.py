"""A ledger that is one owner's over many runs, with a note beside it of how far it had come."""

import json
from pathlib import Path

from fedtorch import disk
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.types import ConfigError


def opened(path: Path, unit: str, owner: str) -> Ledger:
    """The owner's ledger at ``path``, a new one where nothing was ever charged.

    Raises ConfigError where it is another's, or the journal was cut short, edited or taken away.
    """
    if untouched(path):
        ledger = Ledger(path, unit)
        note(path, ledger, owner)
        return ledger
    saved = path.with_suffix(".json")
    try:
        known = json.loads(disk.regular(saved).read_text(encoding="utf-8"))
        ledger = Ledger.resume(path, known)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        if isinstance(e, ConfigError):
            raise ConfigError(f"{e}; what this site's data has cost is not known without") from e
        raise ConfigError(
            f"{saved}, which says how far {path.name} had come, cannot be used ({e}): what this site's "
            "data has cost is not known without; put the state folder back as it was"
        ) from e
    if known.get("site", owner) != owner or ledger.unit != unit:
        raise ConfigError(
            f"{path} is the ledger of {known.get('site')!r} for the unit {ledger.unit}, not of "
            f"{owner!r} for the unit {unit}: give each site a state folder of its own"
        )
    return ledger


def untouched(path: Path) -> bool:
    """Whether nothing was ever charged here: it is new, or was killed before anything was."""
    if path.with_suffix(".json").exists():
        return False
    return not path.exists() or disk.regular(path).read_bytes().count(b"\n") <= 1


def note(path: Path, ledger: Ledger, owner: str) -> None:
    """Write how far the journal has come: one that is cut short later does not go unnoticed."""
    beside = path.with_suffix(".json")
    try:
        disk.replace(beside, json.dumps(ledger.state_dict() | {"site": owner}) + "\n")
    except OSError as e:
        raise ConfigError(f"{beside} cannot be written: {e.strerror}") from e
