"""Whether those who were timed also learned the same thing: a fast wrong answer is no answer."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contestants import BASELINE, CONTESTANTS, NUDGED
from benchmarks.workloads import Workload

Runs = Sequence[Mapping[str, Any]]
"""Measurements of one contestant, repetition by repetition."""

SLACK = 0.01
"""Difference of accuracy that is not worth a word, even where it is no accident."""

WHEN = ("first_loss", "second_loss", "loss")
"""After one round, after two and after all: rounding grows from round to round, a mistake shows at once."""

MLP = (1e-5, 1e-4, 1e-3)
"""Relative difference of the losses that float32 explains on equal batches in any case."""

DEEP = (5e-5, 1e-4, 2e-2)
"""The same of other models. One round of W7 in another layout is 1.5e-5 away; a learning rate that is wrong
by a hundredth moves W2 by 9.6e-5 and 2.3e-4 in two rounds."""

TIMES = (4, 4, 10)
"""How many times as far as the bare loop is from itself where its first weights differ by rounding."""

QUIET = 1e-5
"""Noise that changes nothing one can see (fedtorch refuses to call a run without any private)."""


def reference(work: Workload) -> str:
    """Whom the others must agree with: the private workload's bare loop is Opacus in it."""
    return "opacus" if work.privacy == "sample" else BASELINE


def complaints(runs: Mapping[str, Runs], work: Workload, noise: float) -> list[str]:
    """One sentence for each contestant that disagrees; without noise the losses must be equal."""
    judge = reference(work)
    if judge not in runs:
        return []
    exact = work.privacy == "none" or (work.privacy == "client" and noise <= QUIET)
    found = []
    for name, own in runs.items():
        if name in (judge, NUDGED) or (name == BASELINE and judge != BASELINE):
            continue
        why = (
            unequal(own, runs[judge], runs.get(NUDGED), work.model, CONTESTANTS[name].coarse)
            if exact
            else beyond_chance(own, runs[judge])
        )
        if why:
            found.append(f"{work.name}: {name} differs from {judge}: {why}")
    return found


def unequal(own: Runs, other: Runs, nudged: Runs | None, model: str, coarse: float) -> str | None:
    """Equal batches in equal order leave nothing but rounding, which grows with the rounds.

    ``nudged``: the other with first weights that differ by rounding, which is as far as that leads.
    """
    for a, b, c in zip(own, other, nudged or other, strict=True):
        bounds = MLP if model == "mlp" else DEEP
        for when, least, times in zip(WHEN, bounds, TIMES, strict=True):
            most = coarse * max(least * abs(b[when]), times * abs(c[when] - b[when]))
            if not abs(a[when] - b[when]) <= most:
                return f"{when} {a[when]:.6f} and {b[when]:.6f} after equal batches"
        most = max(2 * SLACK, 2 * abs(c["accuracy"] - b["accuracy"]))
        if not abs(a["accuracy"] - b["accuracy"]) <= most:
            return f"accuracy {a['accuracy']:.4f} and {b['accuracy']:.4f} after equal batches"
    return None


def beyond_chance(own: Runs, other: Runs) -> str | None:
    """Welch's test on the accuracies, at one in a thousand; one repetition proves nothing."""
    a, b = ([r["accuracy"] for r in runs] for runs in (own, other))
    if not all(map(math.isfinite, a)):
        return "accuracy is not a number"
    if len(a) < 2 or abs(statistics.mean(a) - statistics.mean(b)) <= SLACK:
        return None
    from scipy.stats import ttest_ind  # 50 MiB, which are none of a contestant's

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal repetitions have no variance
        p = float(ttest_ind(a, b, equal_var=False).pvalue) if len({*a, *b}) > 2 else 0.0
    if p >= 1e-3:
        return None
    return f"mean accuracy {statistics.mean(a):.4f} and {statistics.mean(b):.4f} (p {p:.1e})"
