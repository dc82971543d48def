"""Membership: was this example trained on? Shadow models show what a model does with and without it.

Each shadow is trained as the run was, on a random half of its examples. Every one of them is attacked in
turn by means of the others, so that some thousands of answers come of a few models. What counts first is
how many members are found at one false alarm in a hundred (Carlini et al. 2022, arXiv:2112.03570).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.options import Range, check, fit
from fedtorch.training.batches import in_order, len_of
from fedtorch.training.predict import predict
from fedtorch.training.step import pair
from fedtorch.types import ConfigError

ALARMS = 0.01
"""Share of non-members that may be taken for members."""
POPULATION = 2000
"""Examples of nobody's that an example is compared with (RMIA)."""
SHADOWS = Range("at least 4", 4, float("inf"), "high")
LEAST = 100
"""Non-members without whom one false alarm in a hundred is none."""

Train = Callable[[np.ndarray, int], Iterable[nn.Module]]
"""(which examples each has, [K, N] of booleans, a seed) -> K models trained on them as the run was."""


@dataclass(frozen=True, kw_only=True)
class MembershipAttack:
    """Options of ``infer``."""

    shadows: int = 16
    """Shadow models that stand against the one that is attacked."""

    def __post_init__(self) -> None:
        """Refuse what is no number of models."""
        check(self, "attack", shadows=SHADOWS)


@dataclass(frozen=True)
class Rates:
    """What a score tells of members and others."""

    false: np.ndarray
    """False positive rates of all thresholds, rising from 0 to 1."""
    true: np.ndarray
    """True positive rates."""

    @classmethod
    def of(cls, score: np.ndarray, member: np.ndarray) -> "Rates":
        """Of scores, the higher the likelier a member; equal ones are told apart by no threshold."""
        order = np.argsort(-score, kind="stable")
        score, member = score[order], member[order].astype(bool)
        ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
        found, alarms = np.cumsum(member)[ends], np.cumsum(~member)[ends]
        return cls(
            np.append(0.0, alarms / max(1, int((~member).sum()))),
            np.append(0.0, found / max(1, int(member.sum()))),
        )

    def found(self, alarms: float = ALARMS) -> float:
        """True positive rate at no more than so many false ones."""
        return float(self.true[self.false <= alarms].max())

    @property
    def auc(self) -> float:
        """Area under the curve."""
        return float((np.diff(self.false) * (self.true[1:] + self.true[:-1]) / 2).sum())

    @property
    def balanced(self) -> float:
        """Share of right answers of the best threshold, members and others weighed alike."""
        return float((self.true + 1 - self.false).max() / 2)

    def table(self) -> dict[str, float]:
        """For a file, the first figure first."""
        figures = {"tpr_at_1_percent_fpr": self.found(), "auc": self.auc}
        return {k: round(v, 4) for k, v in (figures | {"balanced_accuracy": self.balanced}).items()}


@dataclass(frozen=True)
class Inferred:
    """What came of the attack."""

    shadows: int
    examples: int
    rates: dict[str, Rates]
    """By attack, over all models that were attacked."""
    own: dict[str, Rates] = field(default_factory=dict)
    """The same of the run's own model, whose members are all of the training examples."""
    train: float = 0.0
    """Share right of the examples that shadows were trained on."""
    test: float = 0.0
    """Share right of those that they were not."""

    def table(self) -> dict[str, Any]:
        """For a file."""
        return {
            "attack": "membership",
            "who_sees_what": WHO,
            "shadows": self.shadows,
            "examples": self.examples,
            "accuracy_on_members": round(self.train, 4),
            "accuracy_on_others": round(self.test, 4),
            "attacks": {k: r.table() for k, r in self.rates.items()},
            "own_model": {k: r.table() for k, r in self.own.items()},
        }


WHO = "whoever has the released model, and data like these to train shadows on"


def infer(
    train: Train,
    data: Dataset,
    test: Dataset,
    kind: str,
    options: MembershipAttack = MembershipAttack(),
    *,
    own: nn.Module | None = None,
    seed: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> Inferred:
    """Train shadows on halves of ``data`` and attack each by the others; ``own``: the run's model as well.

    ``kind``: classification or binary. ``test``: examples of nobody's. ``told``: is called with how many
    models are trained. Raises ConfigError where there are too few examples, or no classes.
    """
    fit("options of the attack", options, MembershipAttack)
    n, models = len_of(data), options.shadows + 1
    if n * models < 2 * LEAST or n < 4 or not len_of(test):
        raise ConfigError(
            f"attack membership needs {LEAST} examples that a model was not trained on to speak of one "
            f"false alarm in {LEAST}: {n} training and {len_of(test)} test examples are too few"
        )
    inside = halves(n, models, seed)
    seen, right, others = [], [], []
    for k, model in enumerate(train(inside, seed)):
        sure, correct = _judged_by(model, data, kind)
        seen.append(sure)
        right.append(correct)
        others.append(confidence(model, test, kind, POPULATION))
        told(k + 1)
    phi, population = np.stack(seen), np.stack(others)
    rates = judged(phi, population, inside)
    correct = np.stack(right)
    found = {} if own is None else own_model(own, data, test, kind, phi, population, inside)
    return Inferred(
        options.shadows,
        n,
        rates,
        found,
        float(correct[inside].mean()),
        float(correct[~inside].mean()),
    )


def halves(n: int, models: int, seed: int) -> np.ndarray:
    """Which of ``n`` examples each model is trained on, [models, n]: half of them, each in about half."""
    draw = np.random.default_rng(seeds.derive(seed, "attack", "halves"))
    return np.stack([draw.permutation(n) < n // 2 for _ in range(models)])


def confidence(model: nn.Module, data: Dataset, kind: str, most: int | None = None) -> np.ndarray:
    """How sure a model is of the right class: log(p / (1 - p)) of each example, [N], which is near normal.

    Above 0 it gives that class more than all others together. Raises ConfigError where there are no
    classes, or one for each position.
    """
    return _judged_by(model, data, kind, most)[0]


def _judged_by(
    model: nn.Module, data: Dataset, kind: str, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The confidence, and whether the likeliest class is the right one, [N] each."""
    found = predict(model, data)
    y = torch.cat([pair(batch)[1] for _, batch in in_order(data, 512)])
    y = y.squeeze(-1) if kind == "binary" and y.dim() > 1 else y
    scores = isinstance(found, Tensor) and (kind == "binary" or found.dim() == 2)
    if kind not in ("classification", "binary") or y.dim() != 1 or not scores:
        raise ConfigError(
            "attack membership asks how sure a model is of an example's class, and here examples have no "
            f"class each, or the model no score for each (the data are for {kind}): attack a run that "
            "classifies"
        )
    found, y = found[:most].double(), y[:most]
    if kind == "binary":
        logit = found.flatten(1).squeeze(-1) if found.dim() > 1 else found
        sure = torch.where(y > 0.5, logit, -logit)
        return np.asarray(sure), np.asarray(sure > 0)
    log = found.log_softmax(1)
    own = log.gather(1, y.long()[:, None])
    rest = log.scatter(1, y.long()[:, None], -torch.inf)
    return np.asarray(own[:, 0] - rest.logsumexp(1)), np.asarray(own[:, 0] > rest.amax(1))


def judged(phi: np.ndarray, population: np.ndarray, inside: np.ndarray) -> dict[str, Rates]:
    """Every model attacked by the others: confidences [K, N] and [K, M], who was inside [K, N]."""
    each = range(len(phi))
    rest = [np.arange(len(phi)) != k for k in each]
    ratio = [likelihood_ratio(phi[k], phi[o], inside[o]) for k, o in zip(each, rest, strict=True)]
    share = [
        beaten(phi[k], phi[o], population[k], population[o])
        for k, o in zip(each, rest, strict=True)
    ]
    member = inside.ravel()
    return {
        "LiRA": Rates.of(np.concatenate(ratio), member),
        "RMIA": Rates.of(np.concatenate(share), member),
        "loss": Rates.of(phi.ravel(), member),
    }


def own_model(
    model: nn.Module,
    data: Dataset,
    test: Dataset,
    kind: str,
    phi: np.ndarray,
    population: np.ndarray,
    inside: np.ndarray,
) -> dict[str, Rates]:
    """The run's model, of whose examples all are members: LiRA by shadows that had none, and the loss.

    The others are test examples; nothing where they are fewer than a hundred.
    """
    ours, others = confidence(model, data, kind), confidence(model, test, kind, POPULATION)
    if len(others) < LEAST:
        return {}
    member = np.repeat([True, False], [len(ours), len(others)])
    # of test examples half of the shadows too: a mean of more would be a better one, and tell them apart
    half = halves(population.shape[1], len(phi), len(ours))
    out = np.concatenate([np.where(inside, np.nan, phi), np.where(half, np.nan, population)], 1)
    mean, std = _moments(out)
    both = np.concatenate([ours, others])
    return {"LiRA": Rates.of((both - mean) / std, member), "loss": Rates.of(both, member)}


def likelihood_ratio(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """LiRA: log of how much likelier a confidence [N] is of a model that had the example than of another.

    ``shadows`` [K, N], of which ``inside`` [K, N] had it. Both are normal, with means of the example's own
    and one deviation for all examples, as few shadows know no better.
    """
    mean_in, std_in = _moments(np.where(inside, shadows, np.nan))
    mean_out, std_out = _moments(np.where(inside, np.nan, shadows))
    ratio = ((target - mean_out) / std_out) ** 2 / 2 - ((target - mean_in) / std_in) ** 2 / 2
    return np.asarray(ratio + np.log(std_out / std_in))


def beaten(
    target: np.ndarray, shadows: np.ndarray, population: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """RMIA: the share of examples of nobody's, [M], that an example [N] beats (arXiv:2312.03262, gamma 1).

    What is compared is the target's probability of the right class over the mean of the shadows'.
    ``shadows`` [K, N], ``others`` [K, M].
    """
    ratio = _sure(target) / _sure(shadows).mean(0)
    usual = np.sort(_sure(population) / _sure(others).mean(0))
    return np.asarray(np.searchsorted(usual, ratio, side="right") / len(usual))


def _sure(confidence: np.ndarray) -> np.ndarray:
    """The probability that the confidence is of."""
    return np.asarray(1 / (1 + np.exp(-np.clip(confidence, -700, 700))))


def _moments(found: np.ndarray) -> tuple[np.ndarray, float]:
    """Means of columns, that of all where a column is empty, and one deviation; NaN is nothing, [K, N]."""
    there = np.isfinite(found)
    count = there.sum(0)
    whole = np.where(there, found, 0.0)
    usual = whole.sum() / max(1, int(there.sum()))
    mean = np.where(count > 0, whole.sum(0) / np.maximum(count, 1), usual)
    squares = float(np.where(there, (whole - mean) ** 2, 0.0).sum())
    free = max(1, int((count - (count > 0)).sum()))
    return mean, max(float(np.sqrt(squares / free)), 1e-12)
