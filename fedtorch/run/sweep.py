"""``--sweep lr=0.01,0.1 strategy=fedavg,fedprox``: every combination, a run each."""

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtorch.run import folder as folders
from fedtorch.run import prices, results
from fedtorch.run.checkpoint import everything
from fedtorch.run.console import show_line, show_table
from fedtorch.types import ClaimRefuted, ConfigError

HELP = """  --sweep lr=0.1,1 seed=0,1  Every combination of these values, a run each in one
                             folder (--run-dir, else runs/sweep-<time>); the same
                             command again goes on where it was stopped
  --sweep.random 10          With --sweep: a random number of runs (10 expected), each
                             of one of its settings; --privacy.epsilon pays for all,
                             and only the best is kept"""

LONGEST = 200
"""Bytes in the name of a run's folder."""

Setting = dict[str, str]
"""Option by dotted name -> its value in one run."""


def settings(argv: Sequence[str]) -> tuple[list[str], list[Setting]]:
    """The other arguments, and the runs of the sweep; none when none is asked for."""
    words = list(argv)
    if "--sweep" not in words:
        return words, []
    at = words.index("--sweep")
    end = at + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    swept, rest = words[at + 1 : end], words[:at] + words[end:]
    if "--sweep" in rest:
        raise ConfigError("--sweep is there twice; name all options after one")
    values: dict[str, list[str]] = {}
    for word in swept:
        name, _, text = word.partition("=")
        name, choices = name.replace("-", "_"), text.split(",")
        if not re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)*", name) or not all(choices):
            raise ConfigError(f"--sweep takes option=value,value,..., but got {word!r}")
        if name in ("run_dir", "resume", "config", "tracking.compare"):
            raise ConfigError(f"--sweep cannot vary {name}: leave it out")
        if name in values or len(set(choices)) < len(choices):
            raise ConfigError(f"--sweep names {name} or one of its values twice: name each once")
        values[name] = choices
    if not values:
        raise ConfigError("--sweep needs at least one option=value,value,...")
    return rest, [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]


def arguments(rest: Sequence[str], setting: Setting, folder: Path) -> list[str]:
    """The command line of one run of a sweep; it goes on where it was stopped."""
    name = ",".join(f"{k}={v.replace('/', '_')}" for k, v in setting.items())
    if len(name.encode()) > LONGEST:  # no file system takes longer names
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    where = folder / name
    words = [w for k, v in setting.items() for w in (f"--{k}", v)]
    going = ["--resume"] if any((where / "checkpoints").glob("round-*.pt")) else []
    return [*rest, *words, "--run-dir", str(where), *going]


def compared(config: Any, setting: Setting) -> Any:
    """The run's config with what is swept as the columns of its HParams page, if it tracks anything."""
    if config.tracking is None:
        return config
    return replace(config, tracking=replace(config.tracking, compare=[*setting]))


def each_tried(
    points: Sequence[Setting], configs: Sequence[Any], tried: Callable[[Any], None]
) -> None:
    """Raises ConfigError naming a setting whose run would be refused."""
    for point, config in zip(points, configs, strict=True):
        try:
            tried(config)
        except ConfigError as e:
            raise ConfigError(f"--sweep, run {as_given(point)}: {e}") from e


def as_given(setting: Setting) -> str:
    """As it is typed."""
    return " ".join(f"{k}={v}" for k, v in setting.items())


def named_folder(rest: Sequence[str]) -> tuple[list[str], Path | None]:
    """The other arguments, and the folder that --run-dir names."""
    words = list(rest)
    for at, word in enumerate(words):
        name, eq, value = word.partition("=")
        if name.replace("_", "-") == "--run-dir":
            given = Path(value if eq else (words[at + 1 : at + 2] or [""])[0]).expanduser()
            del words[at : at + (1 if eq else 2)]
            return words, given
    return words, None


def _not_of_a_run(folder: Path | None) -> None:
    if folder is not None and (
        (folder / folders.CONFIG).exists() or everything(folder / "checkpoints")
    ):
        raise ConfigError(
            f"{folder} holds a run, and a sweep makes a folder of runs: choose another --run-dir"
        )


def _told(runs: Sequence[results.Saved], folder: Path) -> None:
    """What all runs came to, their price together, and where they are compared."""
    show_table(results.summary_rows(runs))
    for line in prices.spent(runs):
        show_line(line)
    if any(folder.glob("*/events.out.tfevents.*")):
        print(f"compare: tensorboard --logdir {folder}   (HParams)")


def _trained(config: Any, train: Callable[[Any], Any]) -> list[str]:
    """Train one run; its name, where an audit refutes its claim: the others are still worth knowing."""
    try:
        train(config)
    except ClaimRefuted as e:
        show_line(str(e))
        return [Path(config.run_dir).name]
    return []


def run_sweep(
    rest: Sequence[str],
    points: Sequence[Setting],
    read_config: Callable[[Sequence[str]], Any],
    tried: Callable[[Any], None],
    train: Callable[[Any], Any],
) -> None:
    """One run after another, all checked before the first starts, and a table at the end.

    Raises ClaimRefuted in the end where an audit has refuted the claim of any.
    """
    rest, given = named_folder(rest)
    _not_of_a_run(given)
    folder = given or folders.fresh("sweep")
    try:
        configs = [compared(read_config(arguments(rest, point, folder)), point) for point in points]
        if len({c.run_dir for c in configs}) < len(configs):
            raise ConfigError("--sweep has values that would share a folder, as a/b and a_b do")
        each_tried(points, configs, tried)
    except ConfigError:
        if given is None:
            folder.rmdir()
        raise
    for line in prices.planned(configs):
        show_line(line)
    refuted: list[str] = []
    try:
        for number, (point, config) in enumerate(zip(points, configs, strict=True), 1):
            print(f"run {number} of {len(points)}: {as_given(point)}")
            refuted += _trained(config, train)
    except BaseException:  # what was trained before is paid for
        there = [c.run_dir for c in configs if (Path(c.run_dir) / "config.toml").is_file()]
        for line in prices.spent([results.load(d) for d in there]):
            show_line(line)
        raise
    runs = [results.load(c.run_dir) for c in configs]
    _told(runs, folder)
    if refuted:
        raise ClaimRefuted(
            f"the privacy claim is refuted in {len(refuted)} of {len(runs)} runs: {'; '.join(refuted)}"
        )
