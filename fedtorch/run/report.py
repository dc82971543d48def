"""The privacy report: in plain words before training, in figures afterwards."""

import math
import statistics
from dataclasses import fields, replace
from typing import Any

from fedtorch.privacy import Privacy
from fedtorch.privacy.noise.normals import way
from fedtorch.privacy.run import BEFORE, PrivateRun
from fedtorch.rounds.progress import amount
from fedtorch.run.versions import installed

NOBODY = 15.0
"""Above this epsilon odds may change millions of times over, and no number says that well."""


def promise(run: PrivateRun) -> list[str]:
    """The promise, said before round 0."""
    plan, words = run.plan, run.plan.describe()
    epsilon = plan.planned(run.noise, run.rounds)
    seen = "all this run releases" + ("" if plan.strict else " but what is marked not private")
    before = statistics_of(run)
    return [
        f"privacy of {words['unit']}: {words['mechanism']}",
        *([f"before round 0: {before}; a part of the budget"] if before else []),
        f"trusted: {words['trusted']}; neighbouring: {words['neighbouring']}",
        f"noise multiplier {run.noise:.4g}, planned epsilon {epsilon:.3f} at delta {run.delta:g} over "
        f"{amount(run.rounds, 'round')} ({plan.accountant} accountant)",
        f"in plain words: {plainly(epsilon, seen, words['unit'], run.delta)}",
    ]


def plainly(epsilon: float, seen: str, unit: str, delta: float) -> str:
    """What epsilon at most lets anybody learn, in a sentence."""
    if epsilon > NOBODY:
        return (
            f"epsilon {epsilon:.4g} protects nobody: who sees {seen} may tell for sure whether {unit} took "
            "part; up to 8 is usual, up to 1 is strong"
        )
    return (
        f"whatever anybody knew before, seeing {seen} can change the odds that {unit} took part at most "
        f"{_odds(epsilon)}, but for a chance of {delta:g}"
    )


def cost(run: PrivateRun) -> str:
    """What was spent, in a sentence."""
    spent, unit = run.spent(), run.plan.describe()["unit"]
    odds = (
        "which protects nobody" if spent > NOBODY else f"which changes odds at most {_odds(spent)}"
    )
    return (
        f"epsilon {spent:.3f} spent at delta {run.delta:g} for {unit}, {odds}; privacy.json has all "
        "(without: --privacy none)"
    )


def statistics_of(run: PrivateRun) -> str:
    """What is released beside the rounds, in words; empty: nothing."""
    noise = run.plan.statistics_noise
    if noise is None:
        return ""
    who = "each client" if run.plan.per_client else "the server"
    return f"centers and widths of columns, once, noise multiplier {noise:g} by {who}"


def _odds(epsilon: float) -> str:
    factor = math.exp(epsilon)
    return f"{factor:,.0f}-fold" if factor >= 10 else f"{factor:.1f}-fold"


def statement(run: PrivateRun) -> dict[str, Any]:
    """Everything a reader needs to believe, or doubt, the claim: ``privacy.json``."""
    plan = run.plan
    spent = run.ledger.spent_by_client(plan.delta, plan.accountant) if plan.per_client else {}
    values = sorted(min(v, run.spent()) for v in spent.values())
    return {
        **plan.describe(),
        "plan": _written(replace(plan, epsilon=plan.target)),
        "noise_multiplier": run.noise,
        "delta": run.delta,
        "epsilon_planned": plan.planned(run.noise, run.rounds),
        "epsilon_spent": run.spent(),
        "epsilon_spent_per_client": {
            "min": values[0],
            "median": statistics.median(values),
            "max": values[-1],
        }
        if values
        else None,
        "rounds_planned": run.rounds,
        "rounds_charged": sum(e.round != BEFORE for e in run.ledger.entries),
        "released_before_round_0": statistics_of(run) or None,
        "accountant": plan.accountant,
        "versions": {p: installed(p) for p in ("fedtorch", "torch", "opacus", "numpy", "scipy")},
        "randomness": randomness(run),
        "added_to_delta_by_rounding_of_probabilities": plan.slack(run.noise, run.rounds) or None,
        "outside_the_guarantee": "nothing is logged"
        if plan.strict
        else "figures tagged nonprivate/, the table and picture of who got what, remarks on columns of a "
        "table, console lines of them",
    }


def _written(plan: Privacy) -> str:
    """As Python code, without what is left open."""
    given = {f.name: getattr(plan, f.name) for f in fields(plan)}
    options = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
    return f"{type(plan).__name__}({options})"


def randomness(run: PrivateRun) -> str:
    """The source of the noise, in words."""
    if run.plan.insecure_seed is not None:
        return "INSECURE: a known seed; the noise can be taken off again"
    if run.plan.rng == "os":
        words = "the operating system's cryptographic generator"
        return words if run.plan.masked else f"four draws of {words} for each number"
    made = "tables of 128-bit integers" if run.plan.masked else f"normals by {way()}"
    return f"AES-256 in counter mode, each stream under a key from the operating system; {made}"


def text(run: PrivateRun) -> str:
    """The report as lines ``name: value``, for a terminal or a text panel."""
    return "\n".join(
        f"    {k.replace('_', ' ')}: {v}" for k, v in statement(run).items() if v is not None
    )
