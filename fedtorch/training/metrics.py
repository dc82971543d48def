"""Metrics by name that are of a whole set; scores of classes come from torchmetrics (extra ``metrics``).

They gather as batches come, and keep no outputs but the probabilities that a curve needs. Outputs and
targets are as the built-in losses take them: classes on axis 1, or one logit for yes or no. Positions of
class -100 do not count. A figure that a set does not have, such as the AUROC of one class, is NaN.
"""

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtorch.training import losses
from fedtorch.training.losses import IGNORED, Loss
from fedtorch.types import ConfigError

CURVES: dict[str, Callable[[Any, int], Any]] = {
    "auroc": lambda t, n: t.BinaryAUROC() if n == 2 else t.MulticlassAUROC(n, average=None),
    "average_precision": lambda t, n: (
        t.BinaryAveragePrecision() if n == 2 else t.MulticlassAveragePrecision(n, average=None)
    ),
}
"""Metrics of probabilities, made for so many classes; several give a figure for each class."""

COUNTS: dict[str, Callable[[Any, int], Any]] = {
    "f1": lambda t, n: t.BinaryF1Score(),
    "f1_macro": lambda t, n: t.MulticlassF1Score(n, average="macro"),
    "f1_micro": lambda t, n: t.MulticlassF1Score(n, average="micro"),
    "balanced_accuracy": lambda t, n: t.MulticlassRecall(n, average=None),
    "mean_iou": lambda t, n: t.MulticlassJaccardIndex(n, average="macro"),
}
"""Metrics of the class that is predicted."""

TOP = re.compile(r"top([1-9]\d*)")
NAMES = (*losses.METRICS, *COUNTS, *CURVES, "top5 (or another number)", "perplexity", "r2")


class WholeSet(ABC):
    """A metric that takes in batches; ``metric(output, target)`` is the figure of one set."""

    whole_set = True
    higher_is_better = True
    wants = ""
    """What it takes, in words."""

    def __init__(self, name: str) -> None:
        """Nothing seen yet."""
        self.name = name
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Nothing seen yet."""

    @abstractmethod
    def add(self, output: Tensor, target: Tensor) -> None:
        """Take in tensors that fit."""

    @abstractmethod
    def compute(self) -> float:
        """The figure of all that was seen; NaN where there is none."""

    def update(self, output: Any, target: Any) -> None:
        """Take in a batch; raises ConfigError where it does not fit."""
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            kinds = f"{type(output).__name__} and {type(target).__name__}"
            raise ConfigError(
                f"metric {self.name} takes one output and one target, not {kinds}: give evaluate a step "
                "that returns (output, target)"
            )
        self.add(output.detach(), target.detach())

    def __call__(self, output: Any, target: Any) -> Tensor:
        """The figure of one set alone."""
        alone = type(self)(self.name)
        alone.update(output, target)
        return torch.tensor(alone.compute(), dtype=torch.float64)

    def misfit(self, output: Tensor, target: Tensor) -> ConfigError:
        """What is wrong with tensors of other shapes."""
        kind = str(target.dtype).removeprefix("torch.")
        return ConfigError(
            f"metric {self.name} takes {self.wants}, but the model gives {tuple(output.shape)} and the "
            f"targets are {kind} {tuple(target.shape)}"
        )


class R2(WholeSet):
    """Share of the targets' variance that is explained; of several targets the mean of their shares."""

    wants = "one output for each target"

    def reset(self) -> None:
        """No sums yet."""
        self.n, self.first = 0, torch.zeros(0)
        self.sums = torch.zeros(3, 1, dtype=torch.float64)

    def add(self, output: Tensor, target: Tensor) -> None:
        """Sums of what targets differ by from the first, of its squares, and of squared errors."""
        if output.numel() != target.numel():
            raise self.misfit(output, target)
        y = target.double().cpu().reshape(len(target), -1)
        error = y - output.double().cpu().reshape(y.shape)
        self.first = self.first if self.n else y[:1]
        far = y - self.first  # large means would cost digits
        self.sums = self.sums + torch.stack(
            [far.sum(0), far.square().sum(0), error.square().sum(0)]
        )
        self.n += len(y)

    def compute(self) -> float:
        """NaN of targets that are all the same."""
        total, squares, errors = self.sums
        spread = squares - total.square() / max(self.n, 1)
        varied = spread > 1e-12 * squares
        return float((1 - errors / spread).mean()) if bool(varied.all()) else math.nan


class Perplexity(WholeSet):
    """exp of the mean cross entropy of all positions."""

    higher_is_better = False
    wants = "logits [B, C, ...] and classes [B, ...]"

    def reset(self) -> None:
        """No sums yet."""
        self.total, self.count = 0.0, 0

    def add(self, output: Tensor, target: Tensor) -> None:
        """Sum of the losses."""
        scores, y = classes(self, output, target)
        self.total += float(F.cross_entropy(scores.float(), y, reduction="sum"))
        self.count += len(y)

    def compute(self) -> float:
        """NaN where no position counts, infinite beyond what a number holds."""
        mean = self.total / self.count if self.count else math.nan
        return math.exp(mean) if not mean > 700 else math.inf


class Classification(WholeSet):
    """A metric of torchmetrics; the first outputs tell how many classes there are."""

    wants = "logits [B, C, ...] and classes [B, ...], or one logit and a target of 0 or 1 for each example"

    def reset(self) -> None:
        """Nothing made yet."""
        self.gathered: Any = None
        self.there = torch.zeros(2)
        """Examples of each class."""
        self.lost = False
        """An output was no number."""

    def add(self, output: Tensor, target: Tensor) -> None:
        """Hand over the classes, or the probabilities, on the CPU."""
        scores, y = (t.cpu() for t in classes(self, output, target))
        n = max(scores.shape[1], 2)
        if self.gathered is None:
            self.gathered, self.there = self._made(n), torch.zeros(n)
        if not len(y):
            return
        if not 0 <= int(y.min()) <= int(y.max()) < n:
            raise ConfigError(
                f"metric {self.name}: the targets go from {int(y.min())} to {int(y.max())}, but the model "
                f"gives {n} classes: give it as many outputs as there are classes"
            )
        self.there += y.bincount(minlength=n)
        if self.name in COUNTS:
            given = scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()
        elif self.name in CURVES and n == 2:
            two = scores.double()
            logit = (two[:, 0] if two.shape[1] == 1 else two[:, 1] - two[:, 0]).nan_to_num(math.nan)
            # between 0 and 1 in the same order; a sigmoid makes one number of the surest
            given = (logit / (1 + logit.abs()) + 1) / 2
        else:
            given = scores.double().softmax(1) if self.name in CURVES else scores
        self.lost |= bool(scores.isnan().any() or given.isnan().any())
        if not self.lost:
            self.gathered.update(given, y)

    def compute(self) -> float:
        """Of the classes that are there, and NaN where one is missing that the figure needs."""
        there, curve = self.there > 0, self.name == "auroc"
        if self.lost or not there.any() or (curve and there.sum() < 2):
            return math.nan
        if len(there) == 2 and self.name in ("f1", "average_precision") and not there[1]:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that are missing, which do not count here
            value = self.gathered.compute().double()
        return float(value[there].mean() if value.dim() else value)

    def _made(self, n: int) -> Any:
        from torchmetrics import classification as kinds  # takes seconds

        if top := TOP.fullmatch(self.name):
            if int(top[1]) > n:
                raise ConfigError(
                    f"metric {self.name}: the model gives {n} classes alone: ask for fewer"
                )
            return kinds.MulticlassAccuracy(n, top_k=int(top[1]), average="micro")
        if self.name == "f1" and n > 2:
            raise ConfigError(
                f"metric f1 is of two classes, and the model gives {n}: f1_macro is the mean over "
                "classes, f1_micro counts all examples together"
            )
        return (CURVES | COUNTS)[self.name](kinds, n)


def classes(metric: WholeSet, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [M, C], or [M, 1] of yes or no, and classes [M], of the positions that count."""
    y = target.flatten()
    if output.dim() == target.dim() + 1 and output.shape[1] > 1:
        if (output.shape[0], *output.shape[2:]) != target.shape or y.is_floating_point():
            raise metric.misfit(output, target)
        scores = output.movedim(1, -1).flatten(0, -2)
    else:
        # several yes or no to an example have no one figure; those of an image's positions have
        several = target.dim() == 2 and target.shape[1] > 1
        plain = bool(((y == 0) | (y == 1) | (y == IGNORED)).all())
        fits = output.numel() == target.numel() and plain and not several
        if not fits or isinstance(metric, Perplexity) or TOP.match(metric.name):
            raise metric.misfit(output, target)
        scores = output.reshape(-1, 1)
    kept = y != IGNORED
    return (scores, y.long()) if bool(kept.all()) else (scores[kept], y[kept].long())


def known(name: str) -> Loss | None:
    """The metric of that name, or None; raises ConfigError where it needs a package that is not there."""
    if name in losses.METRICS:
        return losses.METRICS[name]
    if name in ("perplexity", "r2"):
        return Perplexity(name) if name == "perplexity" else R2(name)
    if name not in CURVES | COUNTS and not TOP.fullmatch(name):
        return None
    if find_spec("torchmetrics") is None:
        raise ConfigError(
            f"metric {name} needs the package torchmetrics: pip install 'fedtorch[metrics]'"
        )
    return Classification(name)


def by_name(metrics: Mapping[str, Loss | str] | Sequence[str]) -> dict[str, Loss]:
    """Names, or functions and names by what to call them -> functions; raises ConfigError with the list."""
    names = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(names, Mapping) and any(not isinstance(m, str) for m in _listed(names)):
        raise ConfigError(
            "metrics must be names, ['accuracy'], or functions by what to call them, {'loss': fn}"
        )
    pairs = names.items() if isinstance(names, Mapping) else [(m, m) for m in names]
    found = {k: known(m) if isinstance(m, str) else m for k, m in pairs}
    for name, metric in found.items():
        if metric is None:
            raise ConfigError(f"unknown metric {name!r}; there are {', '.join(NAMES)}")
    return {k: m for k, m in found.items() if m is not None}


def _listed(names: Any) -> list[Any]:
    """What stands in a list; what is none is its only part."""
    return [*names] if isinstance(names, Sequence | set | frozenset) else [names]


def worse(metric: Loss) -> str | None:
    """Which figures are bad, ``low`` or ``high``; None where a function has no ``higher_is_better``."""
    if metric in losses.LOSSES.values() or metric is losses.mean_absolute_error:
        return "high"
    better = getattr(metric, "higher_is_better", None)
    if metric in losses.METRICS.values() or better:
        return "low"
    return None if better is None else "high"
