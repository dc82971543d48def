"""The toy's noise against calibrated noise at the same epsilon, and an attack that tells them apart.

The toy's ``addNoise`` adds ``(rand() - 0.5) * 2 / epsilon`` to each number and calls it Laplace. It is
uniform between -1/epsilon and 1/epsilon. Two updates that differ by s in one number then give results in
ranges that do not overlap everywhere: with probability s * epsilon / 2 a result lies where the other update
can never put it, and one look names the update for certain. Certainty is an infinite likelihood ratio, so
no finite epsilon holds, whatever number the formula was given; over d numbers the chance of being named is
1 - (1 - s * epsilon / 2)^d. Nothing is clipped either, so that even real Laplace noise would have no scale.

The attack below is run 10,000 times on each. It names an update only where the other cannot be meant
(toy), or by a threshold halfway between (calibrated); the Clopper-Pearson bound turns its hits into an
epsilon that the mechanism provably exceeds, at 95 % confidence.
"""

import torch
from torch import Tensor

from fedtorch.privacy import LocalDP
from fedtorch.privacy.audit import clopper_pearson_epsilon
from fedtorch.types import Task

EPSILON = 1.0
TRIES = 10_000
COLUMNS = 10


def toy(update: Tensor, epsilon: float) -> Tensor:
    """The toy's noise, as written."""
    return update + (torch.rand_like(update) - 0.5) * (2 / epsilon)


def calibrated(update: Tensor, epsilon: float) -> Tensor:
    """Each row of ``update`` [K, d] as one client would send it: clipped to L1 norm 1, Laplace noise."""
    plan = LocalDP(mechanism="laplace", clip=1.0, epsilon=epsilon, rounds=1)
    numbers = {"clip": plan.clip, "noise": plan.calibrated(1)}
    task = Task({}, {}, round=0, seed=0, lr=1.0, privacy=numbers)
    ids = [f"client {k}" for k in range(len(update))]
    return plan.client({"delta": {"w": update}}, torch.ones(len(update)), task, ids)["delta"]["w"]


def updates(size: float) -> tuple[Tensor, Tensor]:
    """Two updates that differ by ``size`` in every number, ``TRIES`` copies of each."""
    zero = torch.zeros(TRIES, COLUMNS, dtype=torch.float64)
    return zero, zero + size


def attack_toy(size: float = 0.1) -> float:
    """Name the second update only where a number lies above all that the first can give."""
    first, second = (toy(u, EPSILON) for u in updates(size))
    hits, errors = (int((x > 1 / EPSILON).any(1).sum()) for x in (second, first))
    print(f"toy noise, updates {size} apart: named {hits} of {TRIES}, wrongly {errors}")
    return clopper_pearson_epsilon(hits, TRIES, errors, TRIES)


def attack_calibrated() -> float:
    """The two updates furthest apart that clipping lets through, told apart by their sum."""
    first, second = (calibrated(u, EPSILON) for u in (updates(0.0)[0] - 0.1, updates(0.1)[1]))
    hits, errors = (int((x.sum(1) > 0).sum()) for x in (second, first))
    print(f"calibrated noise, updates 2 apart: named {hits} of {TRIES}, wrongly {errors}")
    return clopper_pearson_epsilon(hits, TRIES, errors, TRIES, delta=0.0)


def main() -> None:
    """Both attacks, and what they prove."""
    print(f"both are said to have epsilon {EPSILON:g}, for {COLUMNS} numbers")
    print(
        f"  proven: epsilon > {attack_toy():.2f}; no error is possible, so more tries prove ever more"
    )
    print(f"  proven: epsilon > {attack_calibrated():.2f}; the claim of {EPSILON:g} stands")


if __name__ == "__main__":
    main()
