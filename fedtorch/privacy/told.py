"""Figures inside the budget: loss and accuracy of what clients were sent, clipped, noised and paid for.

An example counts as (1/2, loss / most - 1/2, right - 1/2): its loss held to 0 and ``most``, ``right`` the
share of it that is right. No number is beyond 1/2, whatever the example is, so that the norm is at most
sqrt(3)/2. Where the protected unit is an example it adds that to a sum; where it is a client it adds the
mean of its examples. What is read off the noised sum costs nothing more: the mean loss and accuracy are
1/2 and a noised sum over a noised count. Without a count, where who takes part is known, the norm is
sqrt(2)/2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy.accounting.events import MAX_NOISE
from fedtorch.privacy.clipping import bounded, clipped, joint_norms
from fedtorch.tree import tmap
from fedtorch.types import TOLD, ConfigError, Stack, Task

if TYPE_CHECKING:
    from fedtorch.privacy.base import Privacy

NUMBERS = 3
"""Half a count, loss, accuracy."""

USUAL = 10
"""Rounds between figures, where nobody says: some ten of them in a long run."""

TRIES, NEAR = 40, 0.98
"""Noises tried, until one costs nearly all that figures may."""


def check(plan: "Privacy") -> None:
    """Raises ConfigError for options of figures that mean nothing."""
    if not plan.metrics_epsilon:
        if plan.metrics_every is not None:
            raise ConfigError(
                "privacy.metrics_every says when figures are released, and there are none: give "
                "privacy.metrics_epsilon 0.1, or leave it out"
            )
    elif plan.target is not None and plan.metrics_epsilon >= plan.target:
        raise ConfigError(
            f"privacy.metrics_epsilon {plan.metrics_epsilon:g} leaves nothing of epsilon "
            f"{plan.target:g} for training: it is a part of it, such as 0.1"
        )


# when, and with how much noise


def times(plan: "Privacy", rounds: int) -> int:
    """How many of so many rounds tell figures."""
    return rounds // (plan.metrics_every or min(rounds, USUAL)) if rounds else 0


def due(plan: "Privacy", round: int) -> bool:
    """Whether figures go along in this round, the first being 0."""
    if not plan.metrics_epsilon:
        return False
    return not (round + 1) % (plan.metrics_every or min(plan.rounds or 1, USUAL))


def figures_noise(plan: "Privacy", rounds: int) -> float | None:
    """Noise multiplier of each release of figures in a run of so many rounds; None: there are none.

    With it they take ``metrics_epsilon`` of the whole. Raises ConfigError where no noise is enough.
    """
    if not plan.metrics_epsilon:
        return None
    if not times(plan, rounds):
        raise ConfigError(
            f"privacy.metrics_every {plan.metrics_every} is more than the run's {rounds} rounds: no figure "
            "would be told"
        )
    return (_of_a_release if plan.metrics_apart else _of_a_share)(plan, rounds)


@lru_cache(maxsize=64)
def _of_a_release(plan: "Privacy", rounds: int) -> float:
    """Such that the whole costs so much more than training alone, and not more than was asked for."""
    own, room = plan.calibrated(rounds), plan.metrics_epsilon or 0.0
    alone = plan.price(plan.whole(own, rounds, None))
    room = min(room, plan.target - alone) if plan.target else room
    return _least(plan, rounds, room, lambda z: plan.price(plan.whole(own, rounds, z)) - alone)


@lru_cache(maxsize=64)
def _of_a_share(plan: "Privacy", rounds: int) -> float:
    """Such that training alone, with the rest of the clip, would cost so much less."""
    own, take = plan.calibrated(rounds), plan.metrics_epsilon or 0.0
    whole = plan.price(plan.whole(own, rounds, None))
    if take >= whole:
        raise ConfigError(
            f"privacy.metrics_epsilon {take:g} is all that the run costs, {whole:.3g}: take a small part"
        )
    one = plan.event(own)
    steps = one.steps * plan.releases(rounds)
    told = min(times(plan, rounds) * one.steps, steps)

    def less(z: float) -> float:
        if z <= own * (1 + 1e-6):
            return math.inf
        parts = [replace(plan.event(own / plan.rest(own / z)), steps=told)]
        parts += [replace(one, steps=steps - told)] * (steps > told)
        return whole - plan.price([*parts, *plan.once])

    return _least(plan, rounds, take, less)


def _least(plan: "Privacy", rounds: int, room: float, cost: Callable[[float], float]) -> float:
    """About the smallest noise that costs at most ``room``, which falls as its square rises."""
    low, high, noise = 0.0, math.inf, 10.0 * math.sqrt(times(plan, rounds))
    for _ in range(TRIES):
        more = cost(noise)
        if more <= room:
            high = min(high, noise)
            if more >= NEAR * room:
                break
        else:
            low = max(low, noise)
        noise *= math.sqrt(max(min(more / room, 64.0), 1 / 64) / (0.5 + NEAR / 2))
        if not low < noise < high:
            noise = math.sqrt(max(low, high / 64) * high) if math.isfinite(high) else 8 * low
    if not high <= MAX_NOISE:
        raise ConfigError(
            f"privacy.metrics_epsilon {plan.metrics_epsilon:g} is too little for {times(plan, rounds)} "
            "releases of figures: raise it, or privacy.metrics_every"
        )
    return high


# what a client sends


def norm(counts: bool) -> float:
    """Largest norm of what one unit adds."""
    return math.sqrt(NUMBERS if counts else NUMBERS - 1) / 2


def summed(examples: Tensor, counts: bool, mean: bool) -> np.ndarray:
    """What one client's examples, [n, 3], come to, [3]: their sum or mean, each held to the norm."""
    rows = examples.double().cpu().numpy().copy()
    if not counts:
        rows[:, 0] = 0.0
    total = bounded(rows, norm(counts)).sum(0)
    return np.asarray(total / max(len(rows), 1) if mean else total)


def share(task: Task) -> float:
    """Which share of the clip figures have in this round, where they are no release of their own."""
    return task.privacy["noise"] / task.privacy["figures"] if "figures" in task.privacy else 0.0


def room(plan: "Privacy", task: Task) -> float:
    """The clipping norm of a client's update in this round: the plan's, or what figures leave of it."""
    part, clip = share(task), task.privacy["clip"]
    return clip * plan.rest(part) if part else clip


def clipped_together(
    plan: "Privacy",
    sent: dict[str, Stack],
    task: Task,
    order: int = 2,
    scale: Tensor | None = None,
) -> dict[str, Stack]:
    """Each client's groups, clipped together, so that with its figures they are within the clip."""
    own = {g: s for g, s in sent.items() if g != TOLD}
    out = clipped(own, joint_norms(own, order), room(plan, task), scale)
    if TOLD in sent:
        told, most = {TOLD: sent[TOLD]}, share(task) * task.privacy["clip"]
        still = {TOLD: tmap(torch.zeros_like, sent[TOLD])}
        out |= clipped(told, joint_norms(told, order), most) if most else still
    return out


# what the server makes of it


def read(
    total: Sequence[float], std: float, most: float, units: float, off: float
) -> dict[str, float]:
    """Loss and accuracy from a noised sum, [3], whose numbers have noise of ``std`` each.

    ``units``: how many are in it, known but for a deviation of ``off``. ``noised_error``: the accuracy's
    own deviation. None of them where the sum is nothing but noise.
    """
    if units < std or units <= 0:
        return {}
    loss, right = (min(max(0.5 + v / units, 0.0), 1.0) for v in total[1:])
    error = math.hypot(std, (right - 0.5) * off) / units
    return {"noised_loss": most * loss, "noised_accuracy": right, "noised_error": error}
