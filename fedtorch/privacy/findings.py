"""What an audit found: a lower bound beside the claim, and whether noise, rate and clip are as claimed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from fedtorch.privacy.audit import chi_limits, one_run_gaussian_epsilon
from fedtorch.types import ConfigError, Params

CHANCE = 1e-4
"""Chance that a figure of a right build lies below its limits, and above them."""

ROUNDING = 1e-4
"""How much longer than the clipping norm float32 may make a contribution."""

ATTACKERS = {
    "example": "sees each noised step and knows all other examples",
    "client": "sees each round's mean and knows all other clients' updates",
}


@dataclass(frozen=True, kw_only=True)
class CanaryResults:
    """What became of a run's canaries; noise and scores in standard deviations of the noise claimed."""

    unit: str
    """What a canary is: an example or a client."""
    inside: np.ndarray
    """Whose coin put it in, [m] bool."""
    scores: np.ndarray
    """What came out in each canary's direction over the whole run, [m]."""
    shift: np.ndarray
    """How much larger the claim makes the score of one that is in, [m]."""
    wander: np.ndarray
    """Variance that sampling gives the score of one that is in, [m]."""
    noise: float
    """Root mean square of the noise, summed over the run."""
    numbers: int
    """How many numbers that was taken from."""
    step_noise: float
    """The same of the noise of single steps."""
    step_numbers: int
    longest: float
    """Longest contribution of one canary, or one real example, over the clipping norm."""
    missed: int = 0
    """Noised steps that the ledger charges and the audit has not seen."""


class Ratio(NamedTuple):
    """A figure over what the claim says, and the limits of a right build."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


FIGURES: dict[str, tuple[str, type]] = {
    "at_least": ("epsilon_at_least", float),
    "at_most": ("epsilon_at_most", float),
    "delta": ("delta", float),
    "confidence": ("confidence", float),
    "unit": ("unit", str),
    "canaries": ("canaries", int),
    "guesses": ("guesses", int),
    "right": ("right_guesses", int),
    "longest": ("longest_contribution", float),
    "missed": ("steps_missed", int),
}
"""What ``privacy.json`` calls each figure, and what it is."""

RATIOS = {"noise": "noise", "step_noise": "noise_of_a_step", "shift": "shift"}
"""The same of ratios, whose limits stand beside them."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Beside a claim: what the attack proves at least, and what contradicts the claim."""

    unit: str
    canaries: int
    guesses: int
    right: int
    at_least: float
    """Lower bound on epsilon."""
    at_most: float
    """The claim."""
    delta: float
    confidence: float
    noise: Ratio | None
    """None: no step was seen."""
    step_noise: Ratio | None
    shift: Ratio | None
    longest: float
    missed: int

    @classmethod
    def read(cls, table: dict[str, Any]) -> "Findings":
        """Those of a ``privacy.json``; raises KeyError, TypeError or ValueError where it is damaged."""
        if table["unit"] not in ATTACKERS:
            raise ValueError(f"it is about no unit that can be audited, but {table['unit']!r:.50}")
        ratios: dict[str, Any] = {
            name: Ratio(*map(float, (table[key], *table[f"{key}_between"]))) if table[key] else None
            for name, key in RATIOS.items()
        }
        return cls(**{name: kind(table[key]) for name, (key, kind) in FIGURES.items()}, **ratios)

    @property
    def contradictions(self) -> list[str]:
        """What is not as claimed, a sentence each; nothing found proves nothing."""
        return [*self._contradictions()]

    def _contradictions(self) -> Iterator[str]:
        # asked so that what is no number contradicts
        if not self.at_least <= self.at_most:
            yield f"epsilon is at least {self.at_least:.3g}, more than the {self.at_most:.3g} claimed"
        for noise, what in ((self.noise, "the run's noise"), (self.step_noise, "a step's noise")):
            if noise and not noise.value >= noise.low:
                yield f"{what} is {noise.value:.3g} of what is claimed, and at least {noise.low:.3g} is due"
        if (
            self.noise
            and self.step_noise
            and not self.noise.value <= self.noise.high * self.step_noise.value
        ):
            times = self.noise.value / self.step_noise.value
            yield f"noise is used again: {times:.3g} times as much of it is left in the sum of all steps"
        step = self.step_noise
        if step and not step.value <= step.high:
            yield (
                f"a step's noise is {step.value:.3g} of what is claimed, and at most {step.high:.3g} is "
                "due: not all of it is noise, or the divisor is not the public one"
            )
        if self.shift and not self.shift.value <= self.shift.high:
            yield f"a canary counts {self.shift.value:.3g} times what rate and clip allow"
        if not self.longest <= 1 + ROUNDING:
            yield f"one {self.unit} moves the sum by {self.longest:.4g} clipping norms"
        if self.missed:
            yield f"{self.missed} noised steps are charged that went past the audit"

    @property
    def refuted(self) -> bool:
        """Whether anything contradicts the claim."""
        return bool(self.contradictions)

    def words(self) -> list[str]:
        """Lines for a terminal."""
        what = {"example": "gradient canaries", "client": "canary clients"}[self.unit]
        lines = [
            f"audit: epsilon at least {self.at_least:.3f} (this run, {self.canaries:,} {what}, attacker "
            f"{ATTACKERS[self.unit]}, {self.confidence:.0%})"
        ]
        if self.noise and self.step_noise:
            shift = f"; shift {self.shift}" if self.shift else ""
            lines.append(
                f"audit: noise {self.noise} of what is claimed, in a step {self.step_noise}{shift}; "
                f"longest contribution {self.longest:.4g} clipping norms"
            )
        if self.refuted:
            return [*lines, *(f"audit: the claim is refuted: {why}" for why in self.contradictions)]
        return [
            *lines,
            "audit: nothing found that contradicts the claim; a bound below it proves nothing",
        ]

    def table(self) -> dict[str, Any]:
        """For ``privacy.json``."""
        ratios = {key: getattr(self, name) for name, key in RATIOS.items()}
        return {
            **{key: getattr(self, name) for name, (key, _) in FIGURES.items()},
            **{k: r and r.value for k, r in ratios.items()},
            **{f"{k}_between": r and [r.low, r.high] for k, r in ratios.items()},
            "attacker": ATTACKERS[self.unit],
            "refuted": self.refuted,
            "contradictions": self.contradictions,
        }


def judged(
    seen: CanaryResults,
    claim: float,
    delta: float,
    share: float,
    p: float = 0.05,
    exact: float = 1e-9,
) -> Findings:
    """Guess the ``share`` of canaries whose scores say most, and hold noise and shift to their limits.

    Half of the guesses are "in", for the highest scores, half are "out", for the lowest; how many was fixed
    before (Mahloujifar, Melis and Chaudhuri 2024).
    """
    m = len(seen.inside)
    guesses, right = guessed(seen, share)
    at_least = one_run_gaussian_epsilon(m, guesses, right, delta, p, exact) if guesses else 0.0
    noise = step = None
    if seen.numbers and seen.step_numbers:
        noise = Ratio(seen.noise, *chi_limits(seen.numbers, CHANCE))
        step = Ratio(seen.step_noise, *chi_limits(seen.step_numbers, CHANCE))
    return Findings(
        unit=seen.unit,
        canaries=m,
        guesses=guesses,
        right=right,
        at_least=at_least,
        at_most=claim,
        delta=delta,
        confidence=1 - p,
        noise=noise,
        step_noise=step,
        shift=_shift(seen),
        longest=seen.longest,
        missed=seen.missed,
    )


def guessed(seen: CanaryResults, share: float) -> tuple[int, int]:
    """How many canaries are guessed, and how many of those guesses are right."""
    if not 0 < share <= 1:
        raise ConfigError(f"audit.guesses must be a share in (0, 1], got {share}")
    guesses = min(len(seen.inside), max(2, round(share * len(seen.inside))))
    # where clients took part more or less often the same score says more or less
    order = np.argsort(seen.shift * (seen.scores - seen.shift / 2), kind="stable")
    low, high = guesses // 2, guesses - guesses // 2
    right = (~seen.inside[order[:low]]).sum() + seen.inside[order[len(order) - high :]].sum()
    return guesses, int(right)


def _shift(seen: CanaryResults) -> Ratio | None:
    """How much higher the scores of those that are in are, over what the claim says."""
    there = seen.shift > 0
    within, without = there & seen.inside, there & ~seen.inside
    if not (within.any() and without.any()):
        return None
    due = float(seen.shift[within].mean())
    value = float(seen.scores[within].mean() - seen.scores[without].mean()) / due
    variance = float(1 + seen.wander[within].mean()) / within.sum() + 1 / without.sum()
    room = NormalDist().inv_cdf(1 - CHANCE) * math.sqrt(variance) / due
    return Ratio(value, 1 - room, 1 + room)


def pooled(parts: list[CanaryResults]) -> CanaryResults:
    """Of several clients, whose canaries are as many hypotheses of one run."""
    numbers, steps = (sum(getattr(s, n) for s in parts) for n in ("numbers", "step_numbers"))
    noise = sum(s.numbers * s.noise**2 for s in parts) / max(numbers, 1)
    step_noise = sum(s.step_numbers * s.step_noise**2 for s in parts) / max(steps, 1)
    together = {
        name: np.concatenate([getattr(s, name) for s in parts])
        for name in ("inside", "scores", "shift", "wander")
    }
    return CanaryResults(
        unit=parts[0].unit,
        noise=math.sqrt(noise),
        numbers=numbers,
        step_noise=math.sqrt(step_noise),
        step_numbers=steps,
        longest=max(s.longest for s in parts),
        missed=sum(s.missed for s in parts),
        **together,
    )


def of_examples(kept: Params, rate: float, clip: float, noise: float, due: int) -> CanaryResults:
    """What one client's canaries show, held to a claim: a rate, a clipping norm and a noise multiplier.

    ``due``: noised steps of its visits that the ledger charges.
    """
    at, steps = len(kept["at"]), int(kept["steps"])
    std = noise * clip * math.sqrt(steps) or 1.0
    scores = (kept["noise"] + kept["sent"]).numpy() / std
    squares, (parts, numbers) = float(kept["squares"]), kept["parts"].tolist()
    return CanaryResults(
        unit="example",
        inside=kept["inside"].numpy(),
        scores=scores,
        shift=np.full(at, steps * rate * clip / std),
        wander=np.full(at, steps * rate * (1 - rate) * clip * clip / (std * std)),
        noise=float(kept["noise"].square().mean().sqrt()) / std,
        numbers=at if steps else 0,
        step_noise=math.sqrt(
            (squares / (noise * clip) ** 2 + parts) / max(1, at * steps + numbers)
        ),
        step_numbers=at * steps + int(numbers),
        longest=float(kept["longest"]) / clip,
        missed=due - steps,
    )
