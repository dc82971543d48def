"""``--sweep.random 10``: a random number of settings are tried, and only the best run is kept.

Which runs there were, how many, and how they did, would be a release of each: they are trained out of
sight, and removed. What the whole search costs is ``fedtorch.privacy.accounting.search``.
"""

import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.privacy import Privacy, told
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.rounds.progress import amount
from fedtorch.run import files, prices, results
from fedtorch.run import folder as folders
from fedtorch.run.results import higher_is_better
from fedtorch.run.sweep import Setting, arguments, as_given, compared, each_tried, named_folder
from fedtorch.tracking import TensorBoard
from fedtorch.types import ConfigError, NothingLearned

HIDDEN, BEST, ABOUT = ".trials", "best", "search.json"


def asked(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """The other arguments, and the runs expected of a random search; None: none is asked for."""
    rest: list[str] = []
    mean, words = None, list(argv)
    while words:
        name, eq, value = (word := words.pop(0)).partition("=")
        if name != "--sweep.random":
            rest.append(word)
            continue
        value = value if eq or not words else words.pop(0)
        if not value.isascii() or not value.isdigit() or not 2 <= int(value) <= 10_000:
            raise ConfigError(
                f"--sweep.random takes how many runs are expected, from 2 on, but got {value!r}"
            )
        mean = int(value)
    if mean is not None and "--sweep" not in rest:
        raise ConfigError(
            "--sweep.random draws from the settings of --sweep: add --sweep lr=0.1,0.3,1"
        )
    return rest, mean


def run_search(
    rest: Sequence[str],
    points: Sequence[Setting],
    mean: int,
    read_config: Callable[[Sequence[str]], Any],
    tried: Callable[[Any], None],
    train: Callable[[Any], Any],
) -> None:
    """Draw, train out of sight, keep the best, say what all of it costs."""
    words, given = named_folder(rest)
    folder = given or folders.fresh("search")
    try:
        configs = [_one(read_config(arguments(words, p, folder)), p, mean) for p in points]
        _same(configs)
        _free(folder)
        each_tried(points, configs, tried)
        public = len(configs[0].dataset.load(configs[0].seed).test) > 0
        if not public and not configs[0].plan.metrics_epsilon:
            raise ConfigError(
                "--sweep.random chooses by public test data, and there are none: give dataset.test, or a "
                "score inside the budget, --privacy.metrics-epsilon 0.3"
            )
    except ConfigError:
        if given is None:
            folder.rmdir()
        raise
    plan = configs[0].plan
    cost = plan.planned(plan.calibrated(plan.rounds), plan.rounds)
    print(
        f"search: {len(points)} settings, a geometric number of private runs out of sight, {mean} "
        f"expected; only the best is kept\nprivacy: epsilon {cost:.3f} for the whole search at delta "
        f"{plan.delta:g}, for whoever sees what is kept alone"
    )
    if given is None:
        _tidy(folder.parent, plan)
    with _out_of_sight(folder, plan) as hidden:
        best = _best(configs, drawn(mean), hidden, train)
        if best is None:
            raise NothingLearned("no run of the search has learned anything; nothing is kept")
        at, where, (name, value) = best
        os.replace(where, folder / BEST)
    told = json.loads((folder / BEST / "privacy.json").read_text(encoding="utf-8"))
    about = {"settings": list(points), "best": points[at], "chosen_by": name, **told["search"]}
    files.write_json(folder / ABOUT, about | {k: told[k] for k in ("epsilon_spent", "delta")})
    print(
        f"best: {as_given(points[at])}  {name.replace('_', ' ')} {value:.4f}\n"
        f"privacy: epsilon {told['epsilon_spent']:.3f} for the search ({mean} runs expected) at delta "
        f"{told['delta']:g}; the released run alone would be "
        f"{told['search']['epsilon_of_the_released_run_alone']:.3f}\n"
        f"run folder: {folder / BEST} (model.safetensors); all other runs are removed"
    )


def drawn(mean: int) -> int:
    """A geometric number with this mean: exact coins of the system's generator."""
    runs = 1
    while secrets.randbelow(mean):
        runs += 1
    return runs


def _best(
    configs: Sequence[Any], runs: int, hidden: Path, train: Callable[[Any], Any]
) -> tuple[int, Path, tuple[str, float]] | None:
    """Place, folder and score of the best of so many runs; what is worse is removed at once."""
    best: tuple[int, Path, tuple[str, float]] | None = None
    for _ in range(runs):
        at = secrets.randbelow(len(configs))
        where = hidden / secrets.token_hex(8)
        try:
            with redirect_stdout(io.StringIO()):
                summary = train(replace(configs[at], run_dir=str(where)))
            name, value = _score(summary, where)
        except NothingLearned:  # as bad as can be, and a choice of the released model's
            shutil.rmtree(where)
            continue
        better = best is None or (value > best[2][1]) == higher_is_better(_plain(name))
        if math.isnan(value) or not better:
            shutil.rmtree(where)
            continue
        if best is not None:
            shutil.rmtree(best[1])
        best = at, where, (name, value)
    return best


def _plain(name: str) -> str:
    return name.removeprefix("noised_")


def _score(summary: dict[str, Any], where: Path) -> tuple[str, float]:
    """The first metric of the test data, else their loss, and its value.

    Without test data it is the last figure inside the budget, which is a part of what the run releases; NaN
    where that was nothing but noise.
    """
    there = {k: v for k, v in summary.items() if k.startswith("test_") and v is not None}
    if not there:
        told = [f for f in results.load(where).history if "noised_loss" in f]
        last = told[-1] if told else {"noised_loss": math.nan}
        name = "noised_accuracy" if "noised_accuracy" in last else "noised_loss"
        return name, float(last[name])
    name = next((k for k in there if k != "test_loss"), "test_loss")
    return name, float(there[name])


def _one(config: Any, point: Setting, mean: int) -> Any:
    """A setting's config, priced as one of a search."""
    plan = config.privacy
    if plan is None:
        raise ConfigError("--sweep.random is for private runs: without privacy give --sweep alone")
    if config.audit is not None:
        raise ConfigError(
            "--sweep.random keeps one run of many, and --audit looks at one: leave out one"
        )
    if config.resume:
        raise ConfigError(
            "--sweep.random is not gone on with: of a search that was killed nothing is released, and what "
            "it left is removed; leave out --resume, and the next search says what that had cost"
        )
    if not isinstance(config.tracking, TensorBoard | None):
        raise ConfigError(
            f"--sweep.random keeps the best run alone, and tracking {type(config.tracking).__name__} would "
            "have all of them: use tensorboard or none"
        )
    return compared(replace(config, privacy=replace(plan, search=mean)), point)


def _same(configs: Sequence[Any]) -> None:
    """Raises ConfigError where settings are over other data, or have other prices."""
    known = set()
    for c in configs:
        plan, over = c.plan, prices.source(type(c.dataset).__name__, getattr(c.dataset, "path", ""))
        noise = plan.calibrated(plan.rounds)
        price = plan.whole(noise, plan.rounds, told.figures_noise(plan, plan.rounds)), plan.delta
        known.add((over, type(plan), *price))
    if len(known) > 1:
        raise ConfigError(
            "--sweep.random takes settings of one price over the same data: dataset, privacy, rounds, "
            "steps, sample rate and delta must be alike; leave out --sweep.random, and every run is charged"
        )


@contextmanager
def _out_of_sight(folder: Path, plan: Privacy) -> Iterator[Path]:
    """A folder for runs that nobody may see, held by this process and gone in the end."""
    hidden = folder / HIDDEN
    try:
        hidden.mkdir(parents=True, mode=0o700, exist_ok=True)
    except OSError as e:
        raise files.unwritable(hidden, e) from e
    with disk.locked(hidden):
        try:
            _free(folder)  # once more: another process may have ended in between
            _empty(hidden, plan)
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _empty(hidden: Path, plan: Privacy) -> None:
    """Remove what a search has left that was killed; raises ConfigError where that cannot be."""
    left = [p for p in hidden.iterdir() if p.name != disk.LOCK]
    cost = _charged(left, plan)
    try:
        for path in left:
            shutil.rmtree(path)
    except OSError as e:
        raise ConfigError(
            f"{hidden} holds runs of a search that was killed, which nobody may see: delete it "
            f"({disk.reason(e)})"
        ) from e
    if left:
        print(f"note: what a search that was killed has left in {hidden} is removed unseen{cost}")


def _charged(runs: Sequence[Path], plan: Privacy) -> str:
    """What the journals of runs that were killed say, as the end of a sentence."""
    ledgers = []
    for path in (run / files.LEDGER for run in runs):
        with suppress(ConfigError):  # a journal that is damaged is removed like a sound one
            ledgers.append(Ledger.look(path))
    if not ledgers:
        return ""
    cost = prices.together(ledgers, False, plan.delta, plan.accountant)
    return (
        f"; nothing of it was released, and who watched its {amount(len(ledgers), 'run')} has seen epsilon "
        f"{cost:.3f} at delta {plan.delta:g}"
    )


def _tidy(runs: Path, plan: Privacy) -> None:
    """The same for every search in a folder of runs that no process is at work on."""
    for hidden in runs.glob(f"search-*/{HIDDEN}"):
        with suppress(ConfigError), disk.locked(hidden):
            _empty(hidden, plan)
            shutil.rmtree(hidden, ignore_errors=True)


def _free(folder: Path) -> None:
    if (folder / BEST).exists() or (folder / ABOUT).exists():
        raise ConfigError(f"{folder} already holds a search: choose another --run-dir")
