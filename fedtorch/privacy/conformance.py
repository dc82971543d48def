"""Hold a private release to its claim, whoever wrote it: checks of what it does, not of how.

A release is a function ``(data, seed) -> update``: what leaves, in one row, when the noised steps of DP-SGD
are taken on ``data`` = (x, y). The same seed must give the same noise and batches, and every step must take
all examples; what a library draws by itself, seed before the call. ``broken`` says which claims it breaks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, check
from fedtorch.privacy.audit import chi_limits
from fedtorch.types import ConfigError

Examples = tuple[Tensor, Tensor]
"""Inputs and targets, one row for each example."""

Release = Callable[[Examples, int], Any]
"""``release(data, seed)`` -> the update as a row of numbers."""

ROUNDING = 1e-3
"""How far float32 may be off, of a clipping norm."""

CHANCE = 1e-6
"""Chance that a right release fails a check of its noise."""

SIZES = (1, 2, 3, 49, 98, 103, 107)
"""Numbers of examples that a release has to live with; of some of them n (1 / n) is below 1 in floats."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed of a release: update = -lr / divisor x sum over steps of (clipped sum + noise)."""

    clip: float
    """Clipping norm of one example's gradient."""
    noise: float
    """Noise multiplier: the noise on a sum has standard deviation noise x clip."""
    divisor: float
    """Public batch size, whatever the batch is."""
    steps: int = 1
    lr: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no release can claim."""
        ranges = dict.fromkeys(("clip", "divisor", "lr"), POSITIVE)
        check(self, "claim", noise=NOT_NEGATIVE, steps=COUNT, **ranges)


class Broken(NamedTuple):
    """A claim that does not hold."""

    claim: str
    """Name of the check."""
    why: str


def broken(release: Release, claim: Claim, data: Examples) -> list[Broken]:
    """What of ``claim`` does not hold of ``release``; nothing found proves nothing.

    ``data``: some eight examples, inputs in floating point. A release that raises breaks the claim that was
    tried. Raises ConfigError where the same seed gives another update: then nothing can be compared.
    """
    first, again = (_row(release, data, 0) for _ in range(2))
    if first.isfinite().all() and not torch.equal(first, again):
        raise ConfigError(
            "a release must give the same update for the same data and seed: seed what it draws from first"
        )
    found = []
    for one in CHECKS:
        try:
            found += [Broken(one.__name__, why) for why in one(release, claim, data)]
        except Exception as e:
            found.append(Broken(one.__name__, f"it raises {type(e).__name__}: {e}"))
    return found


def noise_has_the_claimed_size(release: Release, claim: Claim, data: Examples) -> Iterator[str]:
    """The deviation of the noise on each number, from updates of two seeds."""
    if not claim.noise:
        return
    noise = (_row(release, data, 1) - _row(release, data, 2)) / 2**0.5
    due = claim.noise * claim.clip * claim.steps**0.5
    size = float(noise.square().mean().sqrt()) * claim.divisor / claim.lr / due
    low, high = chi_limits(len(noise), CHANCE)
    # gradients of later steps answer to the noise before them
    if not low <= size <= high * (1 if claim.steps == 1 else 1.1):
        yield f"it is {size:.3g} of what is claimed"


def noise_is_fresh(release: Release, claim: Claim, data: Examples) -> Iterator[str]:
    """Noise of no two seeds is alike."""
    if not claim.noise:
        return
    rows = torch.stack([_row(release, data, seed) for seed in range(1, 9)])
    pairs = rows[0::2] - rows[1::2]
    alike = torch.corrcoef(pairs) - torch.eye(len(pairs), dtype=rows.dtype)
    worst = float(alike.abs().max().nan_to_num(1.0))
    if worst > min(0.99, 6 / len(rows[0]) ** 0.5):
        yield f"noise of two seeds is correlated by {worst:.2f}"


def one_example_moves_the_sum_by_the_clip(
    release: Release, claim: Claim, data: Examples
) -> Iterator[str]:
    """However far off an example is, and wherever it stands; the noise is that of one seed."""
    x, y = data
    for far in (1.0, 1e3):
        more = torch.cat([x, far * x[:1]]), torch.cat([y, y.roll(1)[:1]])
        moved = float((_row(release, more, 1) - _row(release, data, 1)).norm())
        norms = moved * claim.divisor / claim.lr / claim.clip
        if not norms <= claim.steps * (1 + ROUNDING):
            yield f"one example more, {far:g} times as long, moves it by {norms:.3g} clipping norms"


def the_divisor_is_public(release: Release, claim: Claim, data: Examples) -> Iterator[str]:
    """Examples that come once more move the sum as they did the first time."""
    if claim.steps > 1:
        return
    many = [tuple(torch.cat([t] * n) for t in data) for n in (1, 2, 3)]
    one, two, three = (_row(release, (x, y), 1) for x, y in many)
    first, second = two - one, three - two
    if first.norm() <= ROUNDING * one.norm():
        yield "the same examples once more do not move it: it is divided by how many there are"
    elif (apart := (second - first).norm()) > ROUNDING * first.norm() + 1e-5 * one.norm():
        share = float(apart / first.norm())
        yield f"the same examples, come a third time, move it otherwise than before, by {share:.0%}"


def a_broken_example_is_not_seen(release: Release, claim: Claim, data: Examples) -> Iterator[str]:
    """One example that is not finite leaves the update finite: it counts as nothing."""
    x, y = data
    for value in (float("nan"), float("inf"), 1e38):
        fine = _row(release, (torch.cat([x[:-1], torch.full_like(x[:1], value)]), y), 1).isfinite()
        if not fine.all():
            lost = "whole" if not fine.any() else "partly"
            yield f"one example of {value:g} makes the update {lost} NaN or infinite"
            return


def any_number_of_examples_will_do(release: Release, claim: Claim, data: Examples) -> Iterator[str]:
    """Clients are small, and their sizes odd: the update is finite for each."""
    x, y = data
    for n in SIZES:
        at = torch.arange(n) % len(x)
        try:
            fine = bool(_row(release, (x[at], y[at]), 1).isfinite().all())
        except Exception as e:
            yield f"{n} examples raise {type(e).__name__}: {e}"
            continue
        if not fine:
            yield f"{n} examples make it NaN or infinite"


CHECKS = (
    noise_has_the_claimed_size,
    noise_is_fresh,
    one_example_moves_the_sum_by_the_clip,
    the_divisor_is_public,
    a_broken_example_is_not_seen,
    any_number_of_examples_will_do,
)
"""In the order in which ``broken`` tries them; each gives a sentence for what does not hold."""


def _row(release: Release, data: Examples, seed: int) -> Tensor:
    made = release(data, seed)
    row = torch.as_tensor(np.asarray(made) if not isinstance(made, Tensor) else made.detach().cpu())
    return row.double().flatten()
