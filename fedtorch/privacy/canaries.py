"""Canaries: examples of an audit's own among a client's, and what a noised step shows of each.

A canary is an example whose gradient is one coordinate, far longer than the clipping norm. It is in a step
by a coin of its own, as any example is, joins the sum of clipped gradients, and its score is what comes out
in that coordinate. Whoever attacks sees each noised step and knows all other examples, as the guarantee
allows: their sum is taken off the score, so that what is left is the noise and the canary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedtorch.options import TrainingOptions
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.keystream import Scratch
from fedtorch.privacy.noise.streams import Onto, Stream
from fedtorch.types import ConfigError, Params, Task

LONG = 1e3
"""Norm of a canary's gradient before it is clipped, in clipping norms."""


class Draws(Protocol):
    """What is asked of the plan whose claim is audited: its own draws, clip and noise."""

    def batches(
        self, sizes: Sequence[int], options: TrainingOptions, task: Task, ids: Sequence[str]
    ) -> list[Tensor]:
        """Which examples of each client are in which step, [steps, batch], padded with -1."""

    def stream(self, *purpose: str | int) -> Stream:
        """Randomness for one purpose."""


def placed(plan: Draws, id: str, count: int, numbers: int) -> Params:
    """A client's canaries before round 0: a coordinate of its own and a fair coin for each."""
    at = np.empty(0, np.int64)
    draw = plan.stream("canaries", id)
    while len(at) < count:
        more = (draw.uniform(2 * count).numpy() * numbers).astype(np.int64)
        at = np.concatenate([at, more])
        at = at[np.sort(np.unique(at, return_index=True)[1])]
    zeros = torch.zeros(count, dtype=torch.float64)
    return {
        "at": torch.from_numpy(at[:count]),
        "inside": draw.uniform(count) < 0.5,
        "noise": zeros,
        "sent": zeros,
        "squares": zeros[:1],
        "longest": zeros[:1],
        "parts": torch.zeros(2, dtype=torch.float64),
        "steps": torch.zeros(1, dtype=torch.int64),
        "numbers": torch.tensor([numbers]),
    }


@dataclass
class Watch:
    """One client's canaries in one visit."""

    kept: Params
    """As ``placed`` makes them, with what earlier visits showed."""
    order: Tensor
    """Which of them are in which step, [steps, widest] of places, filled up with -1."""
    joined: np.ndarray = field(init=False)
    """The same as [steps, canaries] of truth values, of those whose coin is in."""
    moved: np.ndarray = field(init=False)
    """How each one's coordinate moved in each step."""
    amount: float = 0.0
    """What a canary added to a step."""
    parts: float = 0.0
    """Squared noise of what is no whole step, over the variance that is due, summed."""
    part_numbers: int = 0
    """How many numbers that was."""
    steps: int = 0

    def __post_init__(self) -> None:
        """Nothing seen yet."""
        order, self.at = self.order.numpy(), self.kept["at"].numpy()
        self.numbers = int(self.kept["numbers"])
        step, place = np.nonzero(order >= 0)
        self.joined = np.zeros((len(order), len(self.at)), bool)
        self.joined[step, order[step, place]] = True
        self.joined &= self.kept["inside"].numpy()
        self.moved = np.zeros(self.joined.shape)

    def joining(self) -> np.ndarray:
        """Coordinates of the canaries that are in the step to come, a whole number for each."""
        if self.steps >= len(self.joined):
            raise ConfigError("a visit takes more noised steps than its privacy plan says")
        return np.asarray(self.at[self.joined[self.steps]])

    def see(self, moved: np.ndarray, amount: float) -> None:
        """One noised step: how the coordinates moved, by noise and by canaries of this ``amount``."""
        self.moved[self.steps] = moved
        self.amount = amount
        self.steps += 1

    def after(self) -> Params:
        """The canaries with what this visit showed."""
        # copies: a worker reads memory where it writes its answer
        kept = {name: v.clone() for name, v in self.kept.items()}
        sent = self.amount * self.joined[: self.steps]
        noise = self.moved[: self.steps] - sent
        return kept | {
            "noise": kept["noise"] + torch.from_numpy(noise.sum(0)),
            "sent": kept["sent"] + torch.from_numpy(sent.sum(0)),
            "squares": kept["squares"] + float((noise * noise).sum()),
            "longest": kept["longest"].clamp(min=self.amount),
            "steps": kept["steps"] + self.steps,
            "parts": kept["parts"] + torch.tensor([self.parts, float(self.part_numbers)]),
        }


@dataclass(frozen=True)
class Watched(Stream):
    """A client's noise; its canaries join each sum before it, and are read after it."""

    watch: Watch = field(kw_only=True)
    amount: float = field(kw_only=True)
    """What is left of a canary's gradient once it is clipped."""
    due: float = field(kw_only=True)
    """Standard deviation that the noise of a step must have, by the task."""

    def add(self, row: Tensor, std: float, scratch: Scratch, onto: Onto | None = None) -> bool:
        """Let the canaries of this step join, add the noise, see what came out, which must be there."""
        watch = self.watch
        if len(row) != watch.numbers:
            raise ConfigError(
                f"a noised step has {len(row)} numbers, and the model {watch.numbers}"
            )
        joined: Any = watch.joining()
        at: Any = watch.at
        here: Any = row.numpy() if row.device.type == "cpu" else row
        if here is row:
            at, joined = (torch.from_numpy(i).to(row.device) for i in (at, joined))
        before = here[at]
        here[joined] += self.amount
        super().add(row, std, scratch)
        moved = here[at] - before
        watch.see(moved.cpu().numpy() if here is row else moved, self.amount)
        return False

    def add_part(self, row: Tensor, std: float, scratch: Scratch) -> None:
        """Projected noise (fast/projected.py): a step's own while they are taken, then that of them all."""
        before = row.to(torch.float64, copy=True)
        super().add(row, std, scratch)
        watch, noise = self.watch, row.double() - before
        over = watch.steps == len(watch.joined)
        variance = self.due**2 * (watch.steps if over else 1)
        watch.parts += float(noise @ noise) / variance
        watch.part_numbers += len(noise)


def of(
    plan: Draws,
    memories: Sequence[Params],
    ids: Sequence[str],
    options: TrainingOptions,
    task: Task,
) -> list[Watch]:
    """Watches of these clients' visits, by what each remembers of its canaries."""
    orders = plan.batches(
        [len(m["at"]) for m in memories], options, task, [f"{i} canaries" for i in ids]
    )
    return [Watch(kept, order) for kept, order in zip(memories, orders, strict=True)]


def watched(private: PrivateSteps, watches: Sequence[Watch | None]) -> PrivateSteps:
    """The same steps, with canaries in them, which are clipped as examples are."""
    length = LONG * private.clip
    norm = torch.tensor([length * length], dtype=torch.float64)
    amount = length * float(private.factors(norm))
    streams = [
        Watched(s.words, s.draws, watch=w, amount=amount, due=private.noise * private.clip)
        if w
        else s
        for s, w in zip(private.streams, watches, strict=True)
    ]
    return replace(private, streams=streams)


class Gauge(Stream):
    """No noise: it looks how long the sums are that noise would be added to."""

    lengths: list[float]

    @classmethod
    def new(cls) -> "Gauge":
        """Nothing seen yet."""
        made = cls(lambda n, scratch: np.zeros(n, np.uint64))
        object.__setattr__(made, "lengths", [])
        return made

    def add(self, row: Tensor, std: float, scratch: Scratch, onto: Onto | None = None) -> bool:
        """Take the length of a sum."""
        self.lengths.append(float(row.double().norm()))
        return False

    @property
    def longest(self) -> float:
        """Of all sums; NaN is none."""
        return max([n for n in self.lengths if n == n], default=0.0)
