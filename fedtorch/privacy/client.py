"""Client-level privacy: the server clips and noises. It is trusted, whoever sees its models is not.

McMahan et al. 2018 (arXiv:1710.06963): a fixed public denominator, so that one client changes the sum by
at most the clipping norm and the divisor not at all.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy import told
from fedtorch.privacy.accounting.events import Event, Units
from fedtorch.privacy.adaptive import AdaptiveClip
from fedtorch.privacy.bands import Bands
from fedtorch.privacy.base import Privacy, State
from fedtorch.privacy.clipping import CLIPS, bounded, check_clip, clipped, joint_norms
from fedtorch.privacy.noise.streams import noised
from fedtorch.tree import tmap
from fedtorch.types import CLIP_BIT, ConfigError, Params, Released, Stack, Task


@dataclass(frozen=True, kw_only=True)
class ClientLevel(Privacy):
    """Hides whether a client, with all its data, was there at all.

    Every client is in a round with probability ``rate``, by a secret coin of the server's; its update is
    clipped to ``clip``; the server adds N(0, (noise_multiplier clip)^2) to the sum and divides by
    rate x clients, however many reported. A round without clients releases noise and is charged alike.

    Guarantee: (epsilon, delta) under adding or removing one client's updates, for every global model of
    the run. The number of clients registered, which the divisor and the bands are made from, is public.
    """

    unit: ClassVar[Literal["example", "client", "nobody"]] = "client"
    searchable: ClassVar[bool] = True
    per_client: ClassVar[bool] = False
    central: ClassVar[bool] = True
    metrics_count: ClassVar[bool] = True

    rate: float = 1.0
    """Chance of each client to be in a round; 1: everyone, without amplification."""
    weight_cap: int | None = None
    """Weigh clients by min(examples / cap, 1), the cap being public; none: all alike."""
    adaptive: AdaptiveClip | None = None
    """Let the clipping norm follow a quantile of the update norms."""
    bands: Bands | None = None
    """Correlated noise for when clients take part at fixed distances."""

    def __post_init__(self) -> None:
        """Refuse what cannot go together."""
        super().__post_init__()
        if self.adaptive:
            check_clip("privacy.adaptive.start", self.adaptive.start)
        if (self.adaptive or self.bands) and self.metrics_epsilon:
            raise ConfigError(
                f"privacy.{'adaptive' if self.adaptive else 'bands'} and privacy.metrics_epsilon do not go "
                "together: figures have a share of the clipping norm, and need one norm and independent "
                "noise; leave one of them out"
            )
        if self.adaptive and self.bands:
            raise ConfigError(
                "privacy.adaptive and privacy.bands do not go together: correlated noise needs one "
                "clipping norm for the whole run"
            )

    def event(self, noise: float) -> Event:
        """One release over a Poisson sample of the clients."""
        return Event("gaussian", noise, self.rate)

    def releases(self, rounds: int) -> int:
        """With bands a client is in one round of ``count``."""
        return math.ceil(rounds / self.bands.count) if self.bands else rounds

    def start(self, groups: dict[str, Params]) -> State:
        """The clipping norm, and zeros in the shape of what is summed."""
        zeros = {
            g: tmap(lambda v: torch.zeros_like(v, dtype=torch.float64), p)
            for g, p in groups.items()
        }
        state: State = {"clip": self.adaptive.start if self.adaptive else self.clip, "zeros": zeros}
        return state | ({"past": []} if self.bands else {})

    def numbers(self, noise: float, state: State) -> dict[str, float]:
        """The clipping norm of this round."""
        return {"clip": state["clip"], "noise": noise}

    def hold_clip(self, clip: float) -> None:
        """An adaptive norm is what it has come to."""
        if self.adaptive:
            check_clip("a task's clip", clip)
        else:
            super().hold_clip(clip)

    def spread(self, noise: float, state: State, population: int) -> float:
        """With adaptive clipping a little more than noise x clip, which pays for the bits."""
        if self.adaptive:
            noise = self.adaptive.update_noise(noise, self.rate * population)
        return noise * float(state["clip"])

    def cohort(self, population: int, round: int) -> list[int] | None:
        """A secret coin for each client; with bands, only for this round's group."""
        coins = self.stream("cohort", round).uniform(population) < self.rate
        members = range(population)
        if self.bands:
            members = self.bands.group(population, round)
        return [i for i in members if coins[i]]

    def charged(self, cohort: Sequence[int], population: int, round: int) -> list[int] | None:
        """The run; with bands the group whose turn it is, whoever of it was drawn."""
        return list(self.bands.group(population, round)) if self.bands else None

    def share(self) -> float | None:
        """The expected cohort's."""
        return self.rate / (self.bands.count if self.bands else 1)

    def client(
        self, sent: dict[str, Stack], examples: Tensor, task: Task, ids: Sequence[str]
    ) -> dict[str, Stack]:
        """Clip all groups together; the weight, at most 1, comes after the clip.

        Guarantee: the joint norm of what each client sends is at most the round's clip; its bit is +-1/2.
        """
        scale = (examples / self.weight_cap).clamp(max=1) if self.weight_cap else None
        out = told.clipped_together(self, sent, task, scale=scale)
        if self.adaptive:
            # centred: adding or removing a client moves the sum of bits by 1/2, not by 1
            below = joint_norms(sent) <= task.privacy["clip"]
            out[CLIP_BIT] = {"bit": torch.where(below, 0.5, -0.5).double()[:, None]}
        return out

    @property
    def scales(self) -> bool:
        """Adaptive clipping sends a bit besides."""
        return not self.adaptive and type(self).client is ClientLevel.client

    def scale(self, norms: Tensor, examples: Tensor, task: Task) -> Tensor:
        """The factor of the clip and the weight."""
        clip = told.room(self, task)
        factor = torch.where(norms.isfinite(), clip / norms.clamp(min=clip), 0)
        weight = (examples / self.weight_cap).clamp(max=1) if self.weight_cap else 1.0
        return factor * weight

    def taken(self, update: Released, groups: Collection[str], task: Task) -> Released:
        """Clipped once more: no code makes longer what noise is made for."""
        if not groups:
            return update
        sent = {g: update.sent[g] for g in groups}
        short = clipped(sent, joint_norms(sent), told.room(self, task))
        return update.mapped(lambda g, _: short[g], groups)

    def server(
        self, sums: dict[str, Params], state: State, noise: float, population: int
    ) -> tuple[dict[str, Params], State] | None:
        """Noise on the sum, a public divisor, and only then the next clipping norm.

        Guarantee: ``event(noise)`` for each client. Sensitivity: ``clip`` for the sum, 1/2 for the bits,
        whose own noise is paid for by a little more on the update (``AdaptiveClip.update_noise``).
        """
        draw, zeros = self.stream("central noise", int(state["round"])), state["zeros"]
        denominator = self.rate * population
        std = noise * state["clip"]
        bits = sums.pop(CLIP_BIT, None)
        if self.adaptive:
            std = self.adaptive.update_noise(noise, denominator) * state["clip"]
        if self.bands:
            denominator /= self.bands.count
        fresh = {
            g: {k: std * draw.normal(tuple(z.shape)) for k, z in p.items()}
            for g, p in zeros.items()
        }
        new = dict(state)
        if self.bands:
            fresh = self.bands.correlate(fresh, state["past"])
            new["past"] = [fresh, *state["past"]][: self.bands.count - 1]
        mean = {
            g: {
                k: noised(sums.get(g, {}).get(k, zeros[g][k]), n) / denominator
                for k, n in p.items()
            }
            for g, p in fresh.items()
        }
        if self.adaptive:
            total = float(bits["bit"]) if bits else 0.0
            clip = self.adaptive.next(state["clip"], total, denominator, draw)
            new["clip"] = min(max(clip, CLIPS[0]), CLIPS[1])
        return mean, new

    def tell(self, examples: Tensor, task: Task, id: str) -> Tensor:
        """The mean of a client's examples, weighed as its update is."""
        weight = min(len(examples) / self.weight_cap, 1.0) if self.weight_cap else 1.0
        return super().tell(examples, task, id) * weight

    def portion(self, vectors: np.ndarray, id: str, norm: float) -> np.ndarray:
        """Every client sends the mean of its examples' vectors."""
        return np.asarray(bounded(vectors, norm).sum(0) / max(len(vectors), 1))

    def total(self, portions: Sequence[np.ndarray], norm: float) -> np.ndarray:
        """The server noises the sum."""
        exact = torch.from_numpy(bounded(np.stack(portions), norm).sum(0))
        std = norm * (self.statistics_noise or 0.0)
        noise = std * self.stream("statistics").normal(tuple(exact.shape))
        return noised(exact, noise).numpy()

    def several(self, events: Sequence[Event], units: int) -> Units | None:
        """With bands, clients of several groups share noise in a way that nothing here prices."""
        return None if self.bands and units != 1 else super().several(events, units)

    def check(self, population: int, noise: float) -> list[str]:
        """Sums of few clients are refused."""
        expected = self.rate * population / (self.bands.count if self.bands else 1)
        if expected < 3:
            raise ConfigError(
                f"client-level privacy over {expected:g} clients a round hides nobody behind others: "
                "use more clients or a higher privacy.rate (or sample-level privacy)"
            )
        if self.adaptive:
            self.adaptive.check(noise, expected)
        return []

    def describe(self) -> dict[str, str]:
        """In words."""
        who = f"each client with probability {self.rate:g}" if self.rate < 1 else "every client"
        if self.bands:
            who += f", of one of {self.bands.count} groups in turn"
        clip = "an adaptive clipping norm" if self.adaptive else f"clipping norm {self.clip:g}"
        kind = "correlated Gaussian noise" if self.bands else "Gaussian noise"
        return {
            "unit": "one client with all its data",
            "neighbouring": "the clients with and without this one's updates (add/remove; how many "
            "clients are registered is public)",
            "trusted": "the server; whoever sees the models it publishes is not",
            "mechanism": f"{who} in a round, {clip}, {kind} on the sum, a fixed public denominator",
        }
