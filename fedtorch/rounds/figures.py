"""The figures of a round, from what its clients reported."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedtorch.tree import nbytes
from fedtorch.types import NUMBERS, Params, Task

Metrics = dict[str, Any]
"""One round's figures: numbers, plus ``cohort`` and ``failed`` (lists of client ids)."""

PART = 1 << 14
"""Squares that are added up in float32: of ten million that sum can be off by a hundredth."""

FAR = 10.0
"""An update is named that is so many times as long as the usual one."""

QUARTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1.0}


@dataclass(frozen=True)
class Reports:
    """Reports of one round, client by client; they stay with the server."""

    ids: tuple[str, ...] = ()
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Aggregation weight, [K]."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Figures by name, each [K]: train_loss, update_norm, examples, visited, steps."""
    masked: bool = False
    """Each figure is the mean over all of them: no client's own is known."""

    @classmethod
    def of(cls, parts: "Sequence[Reports]") -> "Reports":
        """The chunks of a round as one, with the figures that all of them tell."""
        if not parts:
            return cls()
        if len(parts) == 1:
            return replace(parts[0], weight=parts[0].weight.double())
        names = [k for k in parts[0].values if all(k in p.values for p in parts)]
        return cls(
            tuple(i for p in parts for i in p.ids),
            torch.cat([p.weight for p in parts]).double(),
            {k: torch.cat([p.values[k] for p in parts]) for k in names},
        )

    def together(self, opened: bool) -> "Reports":
        """What rides along under masks: mean loss and examples; those visited stay, for the speed."""
        names = ("train_loss", "examples", "visited") if opened else ("visited",)
        told = {k: float(self.values[k].double().mean()) for k in names if k in self.values}
        if "train_loss" in told:
            told["train_loss"] = self.mean("train_loss")
        alike = {k: torch.full((len(self.ids),), v).double() for k, v in told.items()}
        return Reports(self.ids, self.weight.mean().expand(len(self.ids)), alike, True)

    def mean(self, name: str) -> float:
        """Mean of a figure over clients, weighted as their weights are."""
        values, weight = self.values[name].numpy(), self.weight.numpy()
        return float((values * weight).sum() / weight.sum())

    def figures(self, mean_norm: float | None) -> Metrics:
        """The round's figures; ``mean_norm``: length of the weighted mean delta, if it is known."""
        if not self.ids:
            return {}
        if self.masked:
            return self._known()
        norm = self.mean("update_norm")
        found: Metrics = {"update_norm": norm}
        if mean_norm is not None:
            found["cosine_to_mean"] = mean_norm / norm if norm else 0.0
        if "train_loss" in self.values:  # under strict privacy clients keep it to themselves
            loss = spread("client_loss", self.values["train_loss"])
            found = {"train_loss": self.mean("train_loss"), **loss, **found}
            found["examples"] = int(self.values["examples"].sum())
        return found | self.far()

    def _known(self) -> Metrics:
        found: Metrics = {}
        if "train_loss" in self.values:
            found["train_loss"] = self.mean("train_loss")
        if "examples" in self.values:
            found["examples"] = round(float(self.values["examples"].sum()))
        return found

    def far(self) -> Metrics:
        """Clients whose update is far longer than most: so it is far from them in any direction."""
        norms = self.values["update_norm"]
        usual = float(norms.median())
        away = [i for i, n in zip(self.ids, norms.tolist(), strict=True) if n > FAR * usual > 0]
        return {"far": sorted(away)} if away else {}

    def speed(self, seconds: float) -> Metrics:
        """Clients and examples (every pass counted) in a second of training."""
        seconds = max(seconds, 1e-9)
        seen = float(self.values["visited"].sum()) if "visited" in self.values else 0.0
        return {
            "clients_per_second": len(self.ids) / seconds,
            "examples_per_second": seen / seconds,
        }


def spread(name: str, values: Tensor) -> dict[str, float]:
    """Range and quartiles of [K] values, and the mean of the worst (largest) tenth, at least one."""
    # plain Python: for the few values of a round a tenth of the time of as many tensor operations
    ordered = sorted(values.tolist())
    top = len(ordered) - 1
    found = {}
    for key, share in QUARTILES.items():
        below, part = int(share * top), share * top % 1
        found[key] = ordered[below]
        if part:
            found[key] += part * (ordered[below + 1] - ordered[below])
    worst = ordered[::-1][: -(-len(ordered) // 10)]
    return {f"{name}_{k}": v for k, v in {**found, "worst10": sum(worst) / len(worst)}.items()}


def norm(params: Params) -> float:
    """L2 norm of all tensors together."""
    flat = [_precise(v).flatten() for v in params.values()]
    parts = [p for v in flat for p in (v.split(PART) if v.numel() > PART else (v,))]
    total = sum(float(p.dot(p)) for p in parts)
    if not 1e-30 < total < math.inf:  # so small or large that squares lose their digits in float32
        total = sum(float(v.double().square().sum()) for v in flat)
    return math.sqrt(total)


def why_nobody(figures: Metrics) -> str:
    """What that means, and how many failed in which way."""
    failed = figures.get("failed") or figures.get("nonprivate_failed") or {}
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(failed.values()).items())
    return (
        "a round in which no client counted, and the model stays as it was: "
        f"{kinds or 'nobody was there'}"
    )


def _precise(v: Tensor) -> Tensor:
    return v if v.dtype in (torch.float32, torch.float64) else v.double()


def traffic(
    task: Task,
    model: Params,
    sent: Mapping[str, Params],
    asked: int,
    reported: int,
    coded: int = 0,
) -> Metrics:
    """Bytes a deployment would move: tensors in the model's own types, no framing.

    Each client asked is sent the task's weights and buffers and the strategy's groups; what never changes
    it has with the ``model``. Each that reports sends back what ``sent`` has, by group. ``coded``: bytes of
    all updates that a channel has encoded, every tensor in its own type.
    """
    down = [*task.state.values(), *(v for g in task.extras.values() for v in g.values())]
    up = [model[k] for g in sent.values() for k in g if k in model]
    up += sent.get(NUMBERS, {}).values()
    return {"bytes_down": asked * nbytes(down), "bytes_up": reported * nbytes(up) + coded}
