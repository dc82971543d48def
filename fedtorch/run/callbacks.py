"""Callbacks of ``Server.fit``: stop early, keep the best model, save the run."""

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.options import COUNT, NOT_NEGATIVE, check, fit
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.observers import Observer, State
from fedtorch.run import checkpoint, files
from fedtorch.run.resume import alone, goes_on, state
from fedtorch.training.metrics import known, worse
from fedtorch.training.module import snapshot
from fedtorch.types import ConfigError, Params

MODES = ("auto", "min", "max")

FAMILIES = ("test_", "validation_", "nonprivate_validation_", "nonprivate_")
"""What may stand before the name of a metric."""


def sign(monitor: str, mode: str) -> int:
    """1 where a higher figure is better, -1 where a lower one is; raises ConfigError where nobody says."""
    if mode != "auto":
        return 1 if mode == "max" else -1
    name = next((monitor.removeprefix(f) for f in FAMILIES if monitor.startswith(f)), monitor)
    if "loss" in name or name in ("step_norm", "update_norm"):
        return -1
    metric = known(name)
    end = None if metric is None else worse(metric)
    if end is None:
        raise ConfigError(
            f"whether a high {monitor} is good or bad is not known: give mode='max' or mode='min'"
        )
    return 1 if end == "low" else -1


def watched(who: str, monitor: str, mode: str, server: Any, figures: Metrics) -> str | None:
    """Raises ConfigError unless ``monitor`` will be there and may decide; what is to be said of it."""
    private = server.private is not None
    covered = monitor in server.mark({monitor: 0.0})
    if private and not (monitor.startswith("test_") or covered):
        raise ConfigError(
            f"{who} would watch {monitor}, which is made of clients' data and no noise covers it: which "
            "round it chooses would tell of them; watch a figure of test data, such as test_loss"
        )
    there = [k for k, v in figures.items() if isinstance(v, (int, float)) and k != "round"]
    from fedtorch.tracking.tags import TAGS  # TensorBoard, which takes its time, comes with it

    others = [o for o in server.observers if type(o).__module__.partition(".")[0] != "fedtorch"]
    if monitor not in there and not (monitor in TAGS and _comes(monitor)) and not others:
        near = get_close_matches(monitor, there or [n for n in TAGS if _comes(n)], 1, 0.8)
        fix = f"; did you mean {near[0]!r}?" if near else ""
        if monitor.startswith("test_") and not any(k.startswith("test_") for k in there):
            fix = ": give fit a test set, fit(rounds, test=(x, y))"
        names = ", ".join([*there, "train_loss"][:12])
        raise ConfigError(
            f"{who} watches {monitor!r}, and there is no such figure{fix} (there are {names})"
        )
    sign(monitor, mode)
    if private and monitor.startswith("test_"):
        return (
            f"{who} chooses by {monitor}: the privacy guarantee holds for the clients' data, and not for "
            "the test data, which should be public or nobody's of them"
        )
    return None


def _comes(figure: str) -> bool:
    """Whether every round has it, and no test or validation data are needed."""
    return not figure.startswith(("test", "validation", "seconds_log", "seconds_elapsed"))


@dataclass
class Best:
    """The best figure so far, and its round."""

    value: float = math.nan
    round: int = 0

    def beaten(self, value: float, sign: int, by: float = 0.0) -> bool:
        """Whether ``value`` is better by more than ``by``; what is not a number never is."""
        if math.isnan(value):
            return False
        return math.isnan(self.value) or sign * (value - self.value) > by


def _checked(who: str, monitor: Any, mode: Any) -> None:
    """Raises ConfigError where a callback's options are none."""
    fit(f"monitor of {who}", monitor, str)
    if mode not in MODES:
        raise ConfigError(f"mode of {who} must be one of {', '.join(MODES)}, got {mode!r}")


def _figure(who: str, monitor: str, figures: Metrics) -> float | None:
    """The figure of this round, None where it is not judged; raises ConfigError if it never comes."""
    value = figures.get(monitor)
    if value is not None and not isinstance(value, (int, float)):
        raise ConfigError(f"{who} watches {monitor}, which is no number")
    return value


@dataclass(eq=False)
class EarlyStopping(Observer):
    """Ends training once a figure has not got better for ``patience`` rounds.

    Only rounds that have the figure are looked at. Under a privacy plan it must be one of test data, which
    the guarantee is not for, or one that noise covers. What it knows travels with the server's state.
    """

    monitor: str = "test_loss"
    """Name of a figure of a round, such as test_loss, test_accuracy, validation_loss."""
    patience: int = 5
    """Rounds without a better figure."""
    min_delta: float = 0.0
    """By how much a figure must be better to count."""
    mode: str = "auto"
    """min or max; auto: as the metric of that name says."""
    best: Best = field(default_factory=Best, init=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be watched."""
        _checked("EarlyStopping", self.monitor, self.mode)
        check(self, "EarlyStopping", patience=COUNT, min_delta=NOT_NEGATIVE)
        self.enough = ""

    def begin(self, server: Any, rounds: int, figures: Metrics) -> str | None:
        """Refuse a figure that will not be there, or may not decide."""
        return watched("EarlyStopping", self.monitor, self.mode, server, figures)

    def round(self, figures: Metrics) -> None:
        """See whether it is better."""
        value, number = _figure("EarlyStopping", self.monitor, figures), int(figures["round"])
        if value is None:
            return
        if (
            self.best.beaten(value, sign(self.monitor, self.mode), self.min_delta)
            or not self.best.round
        ):
            self.best = Best(value, number)
        elif number - self.best.round >= self.patience:
            better = f" by more than {self.min_delta:g}" if self.min_delta else ""
            self.enough = (
                f"stopped after round {number}: {self.monitor} was {self.best.value:.4g} in round "
                f"{self.best.round} and has not got better{better} in {number - self.best.round} rounds"
            )

    def state_dict(self) -> State:
        """The best figure, its round, and whether it was enough."""
        return {"value": self.best.value, "round": self.best.round, "enough": self.enough}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self.best = Best(state["value"], state["round"])
        self.enough = state["enough"]

    def __repr__(self) -> str:
        """What it waits for, and how it stands."""
        so_far = (
            f": best {self.best.value:.4g} in round {self.best.round}" if self.best.round else ""
        )
        return f"EarlyStopping({self.monitor!r}, patience={self.patience}{so_far})"


@dataclass(eq=False)
class BestModel(Observer):
    """Keeps the weights of the best round, and puts them into ``server.model`` at the end.

    A later ``fit`` goes on from the last round all the same, and ``server.state_dict()`` is of that one.
    What clients keep for themselves stays as the last round left it.
    """

    monitor: str = "test_loss"
    """Name of a figure of a round."""
    mode: str = "auto"
    """min or max; auto: as the metric of that name says."""
    restore: bool = True
    """Put them into the model at the end; else they are only kept, in ``weights``."""
    best: Best = field(default_factory=Best, init=False)
    weights: Params = field(default_factory=dict, init=False)
    """Of the best round, on the CPU; none before the first."""

    def __post_init__(self) -> None:
        """Refuse what cannot be watched."""
        _checked("BestModel", self.monitor, self.mode)
        fit("restore of BestModel", self.restore, bool)

    @property
    def round_number(self) -> int:
        """The best round; 0: none yet."""
        return self.best.round

    @property
    def value(self) -> float:
        """The best figure; NaN: none yet."""
        return self.best.value

    def begin(self, server: Any, rounds: int, figures: Metrics) -> str | None:
        """Refuse a figure that will not be there, or may not decide."""
        self.model = server.model
        return watched("BestModel", self.monitor, self.mode, server, figures)

    def round(self, figures: Metrics) -> None:
        """Copy the weights if they are better."""
        value = _figure("BestModel", self.monitor, figures)
        if value is not None and self.best.beaten(value, sign(self.monitor, self.mode)):
            self.best = Best(value, int(figures["round"]))
            self.weights = {k: v.cpu() for k, v in snapshot(self.model).items()}

    def finish(self, server: Any) -> None:
        """The best weights into the model, bit for bit."""
        if self.restore and self.weights:
            server.show(self.weights)

    def state_dict(self) -> State:
        """The best figure, its round and weights."""
        return {"value": self.best.value, "round": self.best.round, "weights": self.weights}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self.best, self.weights = Best(state["value"], state["round"]), state["weights"]

    def __repr__(self) -> str:
        """What it keeps."""
        so_far = f": {self.best.value:.4g} in round {self.best.round}" if self.best.round else ""
        return f"BestModel({self.monitor!r}{so_far})"


@dataclass(eq=False)
class Checkpoint(Observer):
    """Saves the server's state in a folder, so that ``fedtorch.resume(server, folder)`` goes on.

    The two newest checkpoints are kept, each written whole or not at all; under a privacy plan the ledger
    is kept beside them, in ``ledger.jsonl``, and charged before anything is released.
    """

    folder: str | Path
    every: int = 1
    """Rounds between two checkpoints; the last round is saved in any case."""
    late: bool = field(default=True, init=False, repr=False)
    saved: int | None = field(default=None, init=False, repr=False)
    """The round of the newest."""

    def __post_init__(self) -> None:
        """Refuse what is no folder."""
        self.path = Path(fit("folder of Checkpoint", self.folder, str | Path)).expanduser()
        check(self, "Checkpoint", every=COUNT)
        self.held = ExitStack()

    def begin(self, server: Any, rounds: int, figures: Metrics) -> str | None:
        """Hold the folder and save what there is; raises ConfigError where it is another run's."""
        alone(server, self, self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            note = self.held.enter_context(disk.locked(self.path, "folder for Checkpoint"))
            goes_on(server, self.path)
            files.try_out(self.path)
            checkpoint.save(self.path / "checkpoints", state(server))
        except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
            raise files.unwritable(self.path, e) from e
        self.server, self.saved = server, server.round_number
        return note

    def round(self, figures: Metrics) -> None:
        """Save the round that is over."""
        if int(figures["round"]) % self.every == 0:
            self._save()

    def finish(self, server: Any) -> None:
        """Save the last round."""
        self._save()

    def close(self) -> None:
        """Let the folder go."""
        self.held.close()

    def _save(self) -> None:
        def write() -> None:
            checkpoint.save(self.path / "checkpoints", state(self.server))

        def tell(why: str) -> None:
            told = f"checkpoint not written to {self.path} ({why}); training goes on without it"
            warnings.warn(told, stacklevel=4)

        self.saved = checkpoint.saved(self.saved, self.server.round_number, write, tell)

    def __repr__(self) -> str:
        """Where, how often, and the newest."""
        newest = "" if self.saved is None else f": round {self.saved} saved"
        return f"Checkpoint({str(self.path)!r}, every={self.every}{newest})"
