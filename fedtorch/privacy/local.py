"""Local privacy: each client clips and noises its own update before it leaves. Nobody is trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy import told
from fedtorch.privacy.accounting.events import Event, Units
from fedtorch.privacy.base import Privacy, State
from fedtorch.privacy.clipping import clipped, joint_norms
from fedtorch.privacy.noise.streams import Stream, noised
from fedtorch.types import TOLD, Stack, Task


@dataclass(frozen=True, kw_only=True)
class LocalDP(Privacy):
    """Hides a client's whole data from everybody, the server included.

    ``gaussian`` clips the update to L2 norm ``clip`` and adds N(0, (2 clip noise_multiplier)^2), calibrated
    by Balle & Wang 2018 (arXiv:1805.06530); ``laplace`` clips to L1 norm ``clip`` and adds
    Laplace(2 clip noise_multiplier), pure epsilon. 2 clip is the sensitivity: any update may be replaced
    by any other. The mean over n clients is 2 sqrt(n) times noisier than with a trusted server, which
    makes this a choice for very many clients.

    Guarantee: (epsilon, delta) under replacing all of a client's data, for all that it ever sends, but
    for its loss and number of examples, which go along unless ``strict``; with laplace delta is 0.
    """

    unit: ClassVar[Literal["example", "client", "nobody"]] = "client"
    per_client: ClassVar[bool] = True

    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    """gaussian (L2) or laplace (L1)."""

    def __post_init__(self) -> None:
        """Nobody sums up what others may not see."""
        super().__post_init__()
        if self.statistics_noise:
            self.portion(np.zeros((0, 0)), "", 0.0)

    def calibrated(self, rounds: int) -> float:
        """Laplace scales add up: rounds / epsilon; Gaussian: closed form."""
        if self.mechanism == "laplace" and self.noise_multiplier is None:
            return rounds / (self.target or 0.0)
        return super().calibrated(rounds)

    def event(self, noise: float) -> Event:
        """One release by each client that takes part."""
        return Event(self.mechanism, noise)

    def several(self, events: Sequence[Event], units: int) -> Units:
        """Each noises its own update, for any other in its place: k clients are k times the steps."""
        return [(replace(e, steps=e.steps * max(1, units)), 1) for e in events]

    def spread(self, noise: float, state: State, population: int) -> float:
        """Gaussian: of one client's update; Laplace: sqrt(2) times its scale."""
        scale = 2 * self.clip * noise
        return math.sqrt(2) * scale if self.mechanism == "laplace" else scale

    @property
    def metrics_norm(self) -> float:
        """In the norm of the mechanism: loss and accuracy are within 1/2 each."""
        return 1.0 if self.mechanism == "laplace" else super().metrics_norm

    def rest(self, share: float) -> float:
        """L1 norms add up."""
        return 1 - share if self.mechanism == "laplace" else super().rest(share)

    def heard(
        self, mean: Tensor, task: Task, clients: float, spread: float
    ) -> tuple[Tensor, float]:
        """Each client has noised its own."""
        return super().heard(mean, task, clients, spread * math.sqrt(clients))

    def client(
        self, sent: dict[str, Stack], examples: Tensor, task: Task, ids: Sequence[str]
    ) -> dict[str, Stack]:
        """Clip, then noise every coordinate of every group from the client's own stream.

        Guarantee: ``event(noise)`` for each client, whoever reads what it sends.
        """
        order = 1 if self.mechanism == "laplace" else 2
        if TOLD in sent:  # within the clip together, each by its share
            sent = told.clipped_together(self, sent, task, order)
        streams = [self.stream("local noise", *task.draw, i) for i in ids]
        return self.noised(sent, task.privacy["clip"], task.privacy["noise"], streams)

    def noised(
        self, sent: dict[str, Stack], clip: float, noise: float, streams: Sequence[Stream]
    ) -> dict[str, Stack]:
        """The same by these numbers and streams, one for each client."""
        norms = joint_norms(sent, 1 if self.mechanism == "laplace" else 2)
        draw = laplace if self.mechanism == "laplace" else gaussian
        return {
            g: {
                k: noised(
                    v,
                    2 * clip * noise * torch.stack([draw(s, tuple(v.shape[1:])) for s in streams]),
                )
                for k, v in s_.items()
            }
            for g, s_ in clipped(sent, norms, clip).items()
        }

    def check(self, population: int, noise: float) -> list[str]:
        """The price is named."""
        return [
            "local privacy is costly: every client's update carries noise for itself alone; with "
            f"{population} clients expect little accuracy unless there are thousands"
        ]

    def describe(self) -> dict[str, str]:
        """In words."""
        norm = "L1" if self.mechanism == "laplace" else "L2"
        return {
            "unit": "one client with all its data",
            "neighbouring": "a client's data replaced by any other data",
            "trusted": "nobody: noise is added before anything leaves the client",
            "mechanism": f"{self.mechanism} noise on each update, clipped to {norm} norm {self.clip:g}",
        }


def gaussian(draw: Stream, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1)."""
    return draw.normal(shape)


def laplace(draw: Stream, shape: tuple[int, ...]) -> Tensor:
    """Laplace of scale 1, by its inverse distribution function: -sign(u) log(1 - 2|u|), |u| < 1/2."""
    u = draw.uniform(int(torch.Size(shape).numel())).view(shape) - 0.5
    # u = -1/2 would be infinite; its neighbour is as far out as 53 bits go
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 2**-54))
