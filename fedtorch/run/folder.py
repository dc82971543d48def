"""A run folder: held by one process, bound to its config, resumed from what is whole in it."""

import shlex
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.run import checkpoint, files, trust
from fedtorch.types import ConfigError

CONFIG = "config.toml"

MADE_BY = "made_by"
"""In a config: who made the run, where that was not the command."""

Seal = Mapping[str, Any]
"""Length and digest of the record at a checkpoint; see ``fedtorch.tracking.record``."""


@dataclass(frozen=True)
class Folder:
    """A run folder that this process holds."""

    path: Path
    config: str
    """Text of its config.toml, which every checkpoint carries: another one cannot go on from it."""
    seal: Seal | None = None
    """Of the record, where the run is resumed."""

    def save(self, state: Mapping[str, Any], seal: Seal | None = None) -> Path:
        """A checkpoint of ``Server.state_dict()`` and of what the record holds by now; its file."""
        whole = {**state, "config": self.config, "record": seal}
        return checkpoint.save(self.path / "checkpoints", whole)

    def begin(self, state: Mapping[str, Any]) -> None:
        """The first checkpoint; raises ConfigError when it cannot be written."""
        try:
            self.save(state)
        except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
            raise files.unwritable(self.path, e) from e


def fresh(name: str) -> Path:
    """A new folder ``runs/<name>-<time>``, nobody else's whoever starts at the same moment."""
    stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() // 1_000_000 % 1000:03d}"
    for number in count(1):
        folder = Path("runs") / (f"{name[:150]}-{stamp}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise ConfigError(f"run folder {folder} cannot be written: {e.strerror}") from e
    raise AssertionError("count does not end")


def start(folder: Path, table: dict[str, Any], held: ExitStack) -> Folder:
    """Make and hold a folder and write the config; raises ConfigError when it is not free."""
    files.create(folder)
    hold(folder, held)
    files.check_free(folder)  # once more: another process may have begun in between
    files.try_out(folder)
    tidy(folder)
    try:
        config = files.write_config(folder, table)
    except OSError as e:
        raise files.unwritable(folder, e) from e
    if trust.foreign(table):
        trust.remember(config)
    return Folder(folder, config)


def resume(folder: Path, held: ExitStack) -> tuple[Folder, dict[str, Any]]:
    """Hold the folder of a run that goes on; its newest checkpoint that is whole.

    A damaged one is said and put aside. Raises ConfigError when the config is not the run's.
    """
    hold(folder, held)
    saved, damaged = checkpoint.newest(folder / "checkpoints")
    same_config(folder, saved)
    files.try_out(folder)
    tidy(folder)
    for path, why in damaged:
        path.replace(path.with_name(f"{path.name}.damaged"))
        print(f"warning: {why}; going on from the one before, round {saved['round']}")
    (folder / files.SUMS).unlink(missing_ok=True)  # what it sums up is about to grow
    seal = saved.get("record")
    return Folder(folder, str(saved["config"]), seal if isinstance(seal, Mapping) else None), saved


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """In here what does not fit is the checkpoint's fault; raises ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(
            f"the newest checkpoint in {folder} is not one that this run can go on from: another version "
            f"wrote it, or it was edited ({type(e).__name__}: {str(e).partition(chr(10))[0]})"
        ) from e


def config(folder: Path) -> Path:
    """The config of a run that is to be resumed; raises ConfigError when it was changed.

    One that was lost is written again from the checkpoint.
    """
    if not (folder / CONFIG).is_file() and not checkpoint.everything(folder / "checkpoints"):
        raise ConfigError(f"nothing to resume: {folder} holds no run; leave out --resume")
    with disk.locked(folder):
        saved, _ = checkpoint.newest(folder / "checkpoints")
        if not (folder / CONFIG).exists():
            disk.replace(folder / CONFIG, str(saved.get("config", "")))
            print(f"note: {folder / CONFIG} was missing and is written again from the checkpoint")
        same_config(folder, saved)
    if MADE_BY in tomllib.loads(str(saved["config"])):
        raise ConfigError(
            f"the run in {folder} was made in Python, where its model and data are: go on there by "
            f"fedtorch.resume(server, {str(folder)!r})"
        )
    return folder / CONFIG


def began_by(command: str, config: Path) -> None:
    """Raises ConfigError unless it was ``train``, or ``serve``, that began the run with this config."""
    table = tomllib.loads(config.read_text(encoding="utf-8"))
    if _began(table) != command:
        raise of_command(config.parent, table)


def of_command(folder: Path, config: Mapping[str, Any]) -> ConfigError:
    """What is said where a run goes on by the command that began it, and by nothing else."""
    made, where = _began(config), shlex.quote(str(folder))
    return ConfigError(
        f"the run in {folder} is one of fedtorch {made}: fedtorch {made} --run-dir {where} --resume"
    )


def _began(config: Mapping[str, Any]) -> str:
    return "serve" if "sites" in config else "train"


def same_config(folder: Path, saved: Mapping[str, Any]) -> None:
    """Raises ConfigError unless config.toml is, byte for byte, what the checkpoint's run began with.

    But for the engine's device: another machine may have another, and the run is the same.
    """
    path = folder / CONFIG
    if "config" not in saved:
        raise ConfigError(f"the checkpoint in {folder} has no 'config': another version wrote it")
    try:
        now = disk.regular(path).read_bytes().decode(errors="replace")
    except OSError as e:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {e.strerror}") from e
    if now == saved["config"]:
        return
    lines = [*zip_longest(str(saved["config"]).splitlines(), now.splitlines())]
    if all(a == b or str(a)[:10] == str(b)[:10] == 'device = "' for a, b in lines):
        return
    number, was = next(((n, a) for n, (a, b) in enumerate(lines, 1) if a != b), (0, None))
    what = f"line {number} was {was!r}" if was is not None else "lines were added"
    raise ConfigError(
        f"{path} was changed after the run began ({what}): delete it, and --resume writes it as it was; "
        "what a resumed run may change, such as --rounds, goes on the command line"
    )


def hold(folder: Path, held: ExitStack) -> None:
    """Lock the folder until ``held`` is closed; raises ConfigError when another process has it."""
    if note := held.enter_context(disk.locked(folder)):
        print(f"note: {note}")


def tidy(folder: Path) -> None:
    """Remove what a kill left half written: only files of names that a run writes."""
    names = (
        CONFIG,
        "*.json",
        files.MODEL,
        files.SUMS,
        "metrics.jsonl",
        f"*tfevents*{disk.EVENTS}",
    )
    found = [p for n in names for p in folder.glob(n + disk.PART)]
    found += (folder / "checkpoints").glob(f"round-*{disk.PART}")
    found += (folder / "clients").glob(f"*/*tfevents*{disk.EVENTS}{disk.PART}")
    for path in found:
        path.unlink(missing_ok=True)
