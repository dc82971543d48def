"""Sample-level privacy: DP-SGD inside each client. The server is not trusted, each client is.

Abadi et al. 2016 (arXiv:1607.00133, Alg. 1): Poisson batches, per-example clipping, Gaussian noise on the
sum, division by a fixed public number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.options import TrainingOptions
from fedtorch.privacy import told
from fedtorch.privacy.accounting.events import Event
from fedtorch.privacy.base import Privacy
from fedtorch.privacy.clipping import bounded, check_products
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.keystream import Scratch
from fedtorch.privacy.noise.streams import BLOCK, Stream, noised
from fedtorch.types import Task


@dataclass(frozen=True, kw_only=True)
class SampleLevel(Privacy):
    """Hides whether one example was in one client's data, from everybody but that client.

    A client that takes part does ``steps`` local steps; each takes every example with probability
    ``sample_rate``, clips each example's gradient to ``clip``, adds N(0, (noise_multiplier clip)^2) to the
    sum and divides by ``batch_size``, whatever the batch turned out to be. Rate and divisor are public
    options and never derived from a client's size, which is private.

    Guarantee: (epsilon, delta) under adding or removing one example, for all that a client ever sends,
    but for its loss and number of examples, which go along unless ``strict``.
    Clients hold different people's data, so the run's epsilon is the largest over clients, and no
    amplification by choosing clients is claimed: a round a client takes part in is charged in full.
    """

    unit: ClassVar[Literal["example", "client", "nobody"]] = "example"
    searchable: ClassVar[bool] = True
    per_client: ClassVar[bool] = True
    metrics_apart: ClassVar[bool] = True
    metrics_count: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1.0  # a step of clipped gradients is short

    sample_rate: float = 0.2
    """Chance of each example to be in a local step."""
    steps: int = 5
    """Local steps of each client in a round."""
    batch_size: float = 32.0
    """Fixed public divisor of the noised sum: the batch size you expect."""
    mode: Literal["auto", "layers", "stacked", "hooks", "ghost", "alone"] = "auto"
    """Per-example gradients by formulas of the model's layers, torch.func, Opacus hooks or ghost clipping,
    or examples one at a time (alone: slow, any model): the same numbers."""
    max_batch: int = 512
    """Examples whose gradients are held at once; a larger batch is split."""
    projected: bool = False
    """Draw a first linear layer's noise only where the client's examples see it, and the rest once a
    round: the same law with fewer draws (docs/fast-path-math.md). For the fast path with plain SGD."""

    def event(self, noise: float) -> Event:
        """A round is ``steps`` releases over Poisson batches."""
        return Event("gaussian", noise, self.sample_rate, self.steps)

    @property
    def per_example(self) -> "SampleLevel":
        """Every step is clipped by example and noised."""
        return self

    def by(self, mode: str) -> "SampleLevel":
        """The same plan by another way to the gradients of examples."""
        return replace(self, mode=cast(Any, mode))

    def batches(
        self, sizes: Sequence[int], options: TrainingOptions, task: Task, ids: Sequence[str]
    ) -> list[Tensor]:
        """Each client's Poisson batches, from coins of its own."""
        draws, scratch = [self.stream("batches", *task.draw, i) for i in ids], Scratch()
        return [self.poisson(n, draw, scratch) for n, draw in zip(sizes, draws, strict=True)]

    def steps_of(self, task: Task, ids: Sequence[str]) -> PrivateSteps:
        """Clip and noise of the task, a stream of noise for each client."""
        check_products()
        return PrivateSteps(
            task.privacy["clip"],
            task.privacy["noise"],
            self.batch_size,
            [self.stream("noise", *task.draw, i) for i in ids],
            "stacked" if self.mode == "auto" else self.mode,
            self.max_batch,
        )

    def draw_seed(self, task: Task, id: str) -> int:
        """A secret: masks belong to places in a batch, so that one example more moves those of others.

        No clip bounds that. Nobody else may know the masks, the server included.
        """
        return int(float(self.stream("masks", *task.draw, id).uniform(1)) * 2**53)

    def strategy_seed(self, task: Task, id: str) -> int:
        """From the run's seed: whatever a strategy sends could show what it drew from."""
        return seeds.derive(task.seed, "strategy", *task.draw, id)

    def poisson(self, n: int, draw: Stream, scratch: Scratch) -> Tensor:
        """Poisson batches of ``n`` examples, [steps, widest], padded with -1; a step may be empty."""
        chosen, total = [np.empty(0, np.int64)], self.steps * n
        for first in range(0, total, BLOCK):  # a million examples have 50 million coins in 50 steps
            coins = draw.uniforms(min(BLOCK, total - first), scratch) < self.sample_rate
            chosen.append(first + coins.nonzero()[0])
        step, place = np.divmod(np.concatenate(chosen), max(1, n))
        many = np.bincount(step, minlength=self.steps)
        batches = np.full((self.steps, max(1, int(many.max()))), -1)
        batches[step, np.arange(len(step)) - (many.cumsum() - many)[step]] = place
        return torch.from_numpy(batches)

    def portion(self, vectors: np.ndarray, id: str, norm: float) -> np.ndarray:
        """Each client noises the sum of its own examples' vectors: nobody else is trusted."""
        own = torch.from_numpy(bounded(vectors, norm).sum(0))
        std = norm * (self.statistics_noise or 0.0)
        return noised(own, std * self.stream("statistics", id).normal(tuple(own.shape))).numpy()

    def tell(self, examples: Tensor, task: Task, id: str) -> Tensor:
        """The noised sum of all that a client has, over its expected number of examples in public."""
        own = torch.from_numpy(told.summed(examples, counts=True, mean=False))
        std = task.privacy["figures"] * self.metrics_norm
        noise = self.stream("figures", *task.draw, id).normal(tuple(own.shape))
        return noised(own, std * noise) / self._expected

    def heard(
        self, mean: Tensor, task: Task, clients: float, spread: float
    ) -> tuple[Tensor, float]:
        """Each client has noised its own sum."""
        std = task.privacy["figures"] * self.metrics_norm
        return mean * (clients * self._expected), std * math.sqrt(clients)

    @property
    def _expected(self) -> float:
        """Examples of a client as options say: sums stay within what masks have room for."""
        return self.batch_size / self.sample_rate

    def check(self, population: int, noise: float) -> list[str]:
        """The plan draws the batches."""
        return [
            f"privacy draws the batches: {self.steps} Poisson steps a round at rate "
            f"{self.sample_rate:g}; epochs and batch_size do not apply"
        ]

    def describe(self) -> dict[str, str]:
        """In words."""
        return {
            "unit": "one example of one client",
            "neighbouring": "data of a client with and without the example (add/remove)",
            "trusted": "each client with its own data; the server and other clients are not",
            "mechanism": (
                f"DP-SGD: {self.steps} steps a round, Poisson rate {self.sample_rate:g}, clipping "
                f"norm {self.clip:g}, Gaussian noise on the sum, divided by {self.batch_size:g}"
                + ("; noise of the first layer projected" if self.projected else "")
            ),
        }


DEFAULT = SampleLevel()
"""The plan of ``fedtorch train`` and ``fedtorch serve`` where none is named."""
