"""Lower bounds on epsilon from attacks: what a mechanism certainly leaks, whatever it claims.

An attack scores canaries and guesses which were in. Each function turns counts of right guesses into the
largest epsilon that those counts refute at level ``p``: with probability 1 - p a correct (epsilon,
delta)-private mechanism gets a bound no larger than its epsilon. A bound above the claim proves a bug; a
bound below it proves nothing. Thresholds and the number of guesses must be fixed before the scores are
seen; otherwise divide ``p`` by the number of choices.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from scipy.special import betainc, betaincinv, chdtri

from fedtorch.privacy.accounting.gaussian import gaussian_epsilon
from fedtorch.types import ConfigError


def clopper_pearson_epsilon(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    delta: float = 1e-5,
    p: float = 0.05,
) -> float:
    """From independent runs: ln((TPR - delta) / FPR) at the ends of exact binomial intervals.

    ``positives`` runs had the canary, of which the attack named ``true_positives``; ``negatives`` had not,
    of which it named ``false_positives`` all the same (Jagielski, Ullman and Oprea 2020).
    """
    _check_counts(true_positives=true_positives, positives=positives)
    _check_counts(false_positives=false_positives, negatives=negatives)
    _check_levels(delta, p)
    missed = _upper(positives - true_positives, positives, p / 2)
    alarms = _upper(false_positives, negatives, p / 2)
    return max(0.0, math.log((1 - missed - delta) / alarms)) if 1 - missed > delta else 0.0


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float = 1e-5
) -> float:
    """Chance that an (epsilon, delta)-private run lets so many guesses be right, from above.

    Each of ``canaries`` records was put in by a fair coin of its own, for one run; ``guesses`` of them were
    guessed, the others passed over (Steinke, Nasr and Jagielski 2023, theorem 5.2).
    """
    _check_guesses(canaries, guesses, correct)
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(_at_least(np.array([correct]), guesses, q)[0])
    if delta == 0 or correct == 0:
        return beta
    less = np.arange(1, correct + 1)
    alpha = float(((_at_least(correct - less, guesses, q) - beta) / less).max())
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_epsilon(
    canaries: int, guesses: int, correct: int, delta: float = 1e-5, p: float = 0.05
) -> float:
    """From one run: the largest epsilon whose ``one_run_p_value`` is at most ``p``."""
    _check_guesses(canaries, guesses, correct)
    _check_levels(delta, p)
    return _largest(lambda e: one_run_p_value(canaries, guesses, correct, e, delta) <= p)


def one_run_gaussian_epsilon(
    canaries: int,
    guesses: int,
    correct: int,
    delta: float = 1e-5,
    p: float = 0.05,
    exact: float = 1e-9,
) -> float:
    """From one run, about twice as tight, against mechanisms whose trade-off curve is a Gaussian's.

    The same experiment (Mahloujifar, Melis and Chaudhuri 2024). What is refuted is that the run is at
    least as private as one Gaussian release that is (epsilon, delta)-private; ``delta`` > 0. The shift of
    that release is found to ``exact``, from below.
    """
    _check_guesses(canaries, guesses, correct)
    _check_levels(delta, p)
    if delta == 0:
        raise ConfigError("delta must be > 0: no Gaussian release is private at delta 0")

    def refuted(shift: float) -> bool:
        right, wrong = p * correct / canaries, p * (guesses - correct) / canaries
        for i in range(correct - 1, -1, -1):
            least = max(wrong, _moved(right, shift))
            if least == wrong:
                break
            right = min(1.0, right + i / (guesses - i) * (least - wrong))
            wrong = least
        return right + wrong > guesses / canaries

    # a Gaussian release of the claim is one whose two normals are so far apart
    shift = _largest(refuted, exact)
    return gaussian_epsilon(1 / shift, delta) if shift else 0.0


def chi_limits(numbers: int, p: float = 0.001) -> tuple[float, float]:
    """Root mean square of so many independent N(0, 1): below or above these with chance ``p`` each."""
    low, high = (float(chdtri(numbers, q)) for q in (1 - p, p))
    return math.sqrt(low / numbers), math.sqrt(high / numbers)


def _moved(chance: float, shift: float) -> float:
    """Phi(Phi^-1(chance) - shift): least error of one kind beside which the other is 1 - ``chance``."""
    if chance >= 1:
        return 1.0
    return math.erfc((shift - STANDARD.inv_cdf(chance)) / math.sqrt(2)) / 2


STANDARD = NormalDist()


def _largest(refuted: Callable[[float], bool], exact: float = 1e-7) -> float:
    """Largest number that is refuted, to ``exact``, from below; 0 where none is."""
    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > exact:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _at_least(k: "np.ndarray", n: int, q: float) -> "np.ndarray":
    """P[Bin(n, q) >= k] for each k."""
    return np.where(k > 0, betainc(np.maximum(k, 1), n - k + 1, q), 1.0)


def _upper(successes: int, trials: int, p: float) -> float:
    """Clopper-Pearson upper end of a binomial's rate, wrong with probability ``p``."""
    if successes == trials:
        return 1.0
    return float(betaincinv(successes + 1, trials - successes, 1 - p))


def _check_counts(**counts: int) -> None:
    (some, few), (all_of, many) = counts.items()
    if not 0 <= few <= many or many < 1:
        raise ConfigError(f"{some} must be between 0 and {all_of}, got {few} of {many}")


def _check_guesses(canaries: int, guesses: int, correct: int) -> None:
    _check_counts(guesses=guesses, canaries=canaries)
    _check_counts(correct=correct, guesses=max(guesses, 1))


def _check_levels(delta: float, p: float) -> None:
    if not 0 <= delta < 1:
        raise ConfigError(f"delta must be in [0, 1), got {delta}")
    if not 0 < p < 1:
        raise ConfigError(f"p must be in (0, 1), got {p}")
