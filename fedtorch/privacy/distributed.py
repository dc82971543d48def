"""Distributed privacy: every client adds a share of the noise, and only the sum, under masks, is seen.

Skellam noise on whole numbers (Agarwal, Kairouz and Liu 2021, arXiv:2110.04995): sums of shares are
Skellam noise again, whoever drops out, and masks hide whole numbers without rounding any more. Rounding at
random, again until the norm is bounded, is that of Kairouz, Liu and Steinke 2021 (arXiv:2102.06387).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, check
from fedtorch.privacy import told
from fedtorch.privacy.accounting.events import MAX_NOISE, Event, epsilon
from fedtorch.privacy.base import Privacy, State
from fedtorch.privacy.noise.rounding import reach, rounded
from fedtorch.privacy.noise.skellam import Cumulative, farthest, table
from fedtorch.types import ConfigError, Stack, Task

WIDTH = 32
"""Bits of each masked number: sums are known modulo 2^WIDTH, and nothing may wrap."""

STD = 4096.0
"""Standard deviation of one share in steps of the grid, about: a table of 100,000 numbers, so that rounding
counts for little and the table stays in a core's cache."""

WIDEST = 2.0**15
"""Largest deviation of a share: its table takes a second to make, and 14 MB."""

FINEST = 2.0**40
"""Scale that stands for a grid without steps, where the run's own is not known yet."""


@dataclass(frozen=True, kw_only=True)
class DistributedDP(Privacy):
    """Hides a client's whole update from everybody, the server included, by noise that all of them add.

    Each client clips its update to ``clip``, rounds it at random to a grid and adds a share of Skellam
    noise; the aggregator ``secure`` shows nobody more than their sum. No sum of fewer clients than its
    threshold is opened. A share is made for the fewest honest ones in such a sum, so that the whole noise
    has a standard deviation of ``noise_multiplier`` times ``clip`` at least.

    Guarantee: (epsilon, delta) under adding or removing one client's updates, for every sum that is
    opened, while at most ``colluding`` clients work together with the server and the masks hold. Who takes
    part in a round is no secret, so nothing is claimed for choosing clients. The numbers of clients and of
    weights are public. Losses and numbers of examples go along, in sums, unless ``strict``.
    """

    unit: ClassVar[Literal["example", "client", "nobody"]] = "client"
    per_client: ClassVar[bool] = True
    masked: ClassVar[bool] = True

    accountant: Literal["prv", "rdp"] = "rdp"
    """rdp, the only one that knows Skellam noise."""
    colluding: int = 0
    """Clients that may work together with the server: their shares of the noise count for nothing."""
    clients: int | None = None
    """Clients in a round; none: those of the run."""
    shares: int | None = None
    """Fewest honest shares in a sum that is opened; none: the masks' threshold minus ``colluding``."""
    coordinates: int | None = None
    """Numbers that a client sends; none: those of the run."""
    resolution: float | None = None
    """Steps in 1, a power of two; none: one share of the noise has a deviation of about 4,096 steps."""

    def __post_init__(self) -> None:
        """Refuse what no bound is known for."""
        super().__post_init__()
        counts = dict.fromkeys(("clients", "shares", "coordinates"), COUNT)
        check(self, "privacy", resolution=POSITIVE, colluding=NOT_NEGATIVE, **counts)
        if self.accountant != "rdp":
            raise ConfigError(
                f"privacy.accountant {self.accountant} does not know Skellam noise: distributed privacy "
                "is priced by rdp"
            )
        if self.resolution is not None and (
            self.resolution < 1 or math.frexp(self.resolution)[0] != 0.5
        ):
            raise ConfigError(
                f"privacy.resolution must be a power of two, 1 or more, got {self.resolution:g}"
            )
        if self.statistics_noise:
            self.portion(np.zeros((0, 0)), "", 0.0)

    # what one unit costs

    @property
    def reach(self) -> float:
        """Most that one client moves the sum, L2 norm in steps of the grid; rounding adds to ``clip``."""
        return reach(self.clip * (self.resolution or FINEST), self.coordinates or 1)

    def event(self, noise: float) -> Event:
        """One release by each client that takes part, with the noise of the fewest shares."""
        return _event(noise, self.clip * (self.resolution or FINEST), self.coordinates or 1)

    def calibrated(self, rounds: int) -> float:
        """The smallest noise, on this grid, with which all rounds cost the target."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        steps = self.clip * (self.resolution or FINEST)
        return _calibrated(self.target or 0.0, self.delta, rounds, steps, self.coordinates or 1)

    def placed(self, clients: int, threshold: int, coordinates: int) -> "DistributedDP":
        """The plan in a run of so many clients a round, each of whom sends so many numbers.

        ``threshold``: fewest clients whose sum is opened. Raises ConfigError where no honest share is left.
        """
        shares = self.shares or threshold - self.colluding
        if shares < 1:
            raise ConfigError(
                f"a sum of {threshold} clients is opened, and {self.colluding} of them may work with the "
                "server: no share of the noise is sure; lower privacy.colluding, or take more clients"
            )
        plan = replace(self, clients=clients, shares=shares, coordinates=coordinates)
        if self.resolution is None:
            noise = self.calibrated(
                self.rounds or 1
            )  # of the finest grid: hardly more on a real one
            grid = 2.0 ** round(math.log2(STD * math.sqrt(shares) / (noise * self.clip)))
            while grid >= 1 and replace(plan, resolution=grid).wraps(clients, noise):
                grid /= 2
            if grid < 1:
                raise ConfigError(
                    f"privacy.clip {self.clip:g} is too long for whole numbers of {WIDTH} bits in a sum of "
                    f"{clients} clients: lower it"
                )
            plan = replace(plan, resolution=grid)
        plan.holds(clients, threshold)
        return plan

    def holds(self, clients: int, threshold: int) -> None:
        """Raises ConfigError where a round of so many, and masks of this threshold, are not the plan's."""
        self._fits(clients)
        if threshold - self.colluding < (self.shares or 0):
            raise ConfigError(
                f"privacy.shares is {self.shares}, and {threshold - self.colluding} honest shares of noise "
                f"are sure in a sum of {threshold} clients: lower it, or leave it out"
            )
        if 2 * threshold <= clients + self.colluding:
            raise ConfigError(
                f"of {clients} clients {self.colluding} may work with the server: it could have two lists "
                f"of {threshold} confirmed, and open one client's update with its own share of the noise "
                f"alone; lower privacy.colluding (to {max(0, 2 * threshold - clients - 1)} at most), or "
                "raise aggregator.threshold"
            )

    def _fits(self, clients: int) -> None:
        if self.shares is None or self.resolution is None or self.coordinates is None:
            raise ConfigError(
                "a DistributedDP says how much noise there is only with privacy.shares, resolution and "
                "coordinates, which a Server fills in"
            )
        if self.wraps(clients, self.calibrated(self.rounds or 1)):
            raise ConfigError(
                f"a sum of {clients} clients may be beyond {WIDTH} bits at privacy.resolution "
                f"{self.resolution:g}: lower it, or leave it out"
            )

    def grid(self, clients: int) -> tuple[float, int]:
        """All the room there is for each of so many, and the steps in 1."""
        scale = int(self.resolution or 1)
        return ((2 ** (WIDTH - 1) - 1) / clients - 0.5) / scale, scale

    @property
    def fewest(self) -> int:
        """So many that those who may work with the server leave enough shares."""
        return (self.shares or 0) + self.colluding

    def wraps(self, clients: int, noise: float) -> bool:
        """Whether the sum of so many can be beyond ``WIDTH`` bits, with every share at its farthest."""
        scale = self.resolution or FINEST
        far = min(self.clip * scale + 1, self.reach) + farthest(self.part(noise))
        return far > self.grid(clients)[0] * scale

    def part(self, noise: float) -> int:
        """Variance of one client's share, in steps: whole, and not below what it must be.

        Raises ConfigError where it is out of all proportion: whoever made such a plan wants a large table.
        """
        whole = (noise * self.clip * (self.resolution or FINEST)) ** 2 / (self.shares or 1)
        if not whole <= WIDEST * WIDEST:
            raise ConfigError(
                f"privacy.resolution {self.resolution or FINEST:g} makes a share of the noise a number of "
                f"{math.sqrt(whole):,.0f} steps, and {WIDEST:,.0f} is the most: lower it, or leave it out"
            )
        return max(1, math.ceil(whole))

    def table(self, noise: float) -> Cumulative:
        """What one client's share is drawn from."""
        return table(self.part(noise))

    def slack(self, noise: float, rounds: int) -> float:
        """What the tables' error adds to delta: total variation of all that one sum is made of."""
        numbers = (self.shares or 1) * (self.coordinates or 1) * rounds
        cost = min(self.planned(noise, rounds), 700.0)
        return (1 + math.exp(cost)) * numbers * self.table(noise).error

    def spread(self, noise: float, state: State, population: int) -> float:
        """Of a sum to which everybody in a round adds a share; that of the fewest is what is accounted."""
        return noise * self.clip * math.sqrt((self.clients or 1) / (self.shares or 1))

    # the client's half

    def client(
        self, sent: dict[str, Stack], examples: Tensor, task: Task, ids: Sequence[str]
    ) -> dict[str, Stack]:
        """Clip, round at random to the grid, and add a share of the noise: multiples of 1 / scale.

        Guarantee: ``event(noise)`` for each client in the sum of a round; none for what one sends, so that
        masks must hide it.
        """
        noise = task.privacy["noise"]
        scale = self.resolution or FINEST
        if self.clients is None or self.wraps(self.clients, noise):
            raise ConfigError(
                f"noise multiplier {noise:g} is not what this plan of distributed privacy is made for"
            )
        share = self.table(noise)
        sent = told.clipped_together(self, sent, task)
        flat = [v.reshape(len(ids), -1) for s in sent.values() for v in s.values()]
        rows = torch.cat(flat, 1).cpu().numpy()
        if rows.shape[1] > (self.coordinates or 0):
            raise ConfigError(
                f"a client sends {rows.shape[1]} numbers, and the plan is for {self.coordinates or 'none'}"
            )
        for k, id in enumerate(ids):
            coins = self.stream("rounding", *task.draw, id)
            whole = rounded(rows[k] * scale, self.reach, coins)
            whole += share.draw(len(whole), self.stream("share", *task.draw, id).words)
            rows[k] = whole / scale
        parts = iter(torch.from_numpy(rows).split([f.shape[1] for f in flat], 1))
        return {
            g: {k: next(parts).reshape(v.shape).to(v.device) for k, v in s.items()}
            for g, s in sent.items()
        }

    def disclosed(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing of an update by itself, which has a share of the noise and no more."""
        if self.strict:
            return {}
        return {k: v for k, v in super().disclosed(figures).items() if k != "update_norm"}

    # words

    def check(self, population: int, noise: float) -> list[str]:
        """The price is named where few stand behind each other, or the grid is coarse."""
        clients, numbers = self.clients or population, self.coordinates or 1
        self._fits(clients)
        notes, spread = [], self.spread(noise, {}, population) / self.clip
        if clients < (least := spread * math.sqrt(numbers)):
            notes.append(
                f"noise outweighs every update: {clients} clients are in a round, and {numbers:,} "
                f"weights need about {least:,.0f}; take more clients, a smaller model or sample-level "
                "privacy"
            )
        if (more := self.reach / (self.clip * (self.resolution or FINEST)) - 1) > 0.05:
            notes.append(
                f"rounding {numbers:,} numbers to a grid makes what one client changes {more:.0%} longer "
                "than the clipping norm, which costs as much more noise; a smaller model needs less"
            )
        return notes

    def describe(self) -> dict[str, str]:
        """In words."""
        working = "no client works" if not self.colluding else f"at most {self.colluding} work"
        return {
            "unit": "one client with all its data",
            "neighbouring": "the clients with and without this one's updates (add/remove; who takes part, "
            "and how many, is public)",
            "trusted": f"the masks, and that {working} together with the server; neither the server nor "
            "whoever sees its models is; each client is trusted to add its share of the noise",
            "mechanism": f"clipping norm {self.clip:g}, rounded at random to a grid of "
            f"{self.resolution or FINEST:g} steps in 1, Skellam noise in shares of which "
            f"{self.shares or 'the fewest honest ones'} are enough, summed under masks; no "
            "amplification by sampling",
        }


def _event(noise: float, clip: float, coordinates: int, steps: int = 1) -> Event:
    far = reach(clip, coordinates)
    # whole numbers are no longer in L1 norm than their norm squared
    l1 = min(math.sqrt(coordinates) * far, far * far)
    return Event("skellam", (noise * clip) ** 2, 1.0, steps, far, l1)


@lru_cache(maxsize=512)
def _calibrated(target: float, delta: float, rounds: int, clip: float, coordinates: int) -> float:
    def affordable(noise: float) -> bool:
        return epsilon([_event(noise, clip, coordinates, rounds)], delta) <= target

    low, high = 0.0, 1.0
    while not affordable(high):
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise ConfigError(
                f"epsilon {target:g} at delta {delta:g} cannot be reached over {rounds} rounds by any "
                "noise (rdp accountant): ask for more, or train less"
            )
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if affordable(middle) else (middle, high)
    return high
