"""The privacy report: in plain words before training, in figures afterwards."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from fedtorch.privacy import Privacy, persons, told
from fedtorch.privacy.accounting import claims
from fedtorch.privacy.noise.normals import way
from fedtorch.privacy.run import PrivateRun
from fedtorch.rounds.progress import amount
from fedtorch.run.versions import installed

NOBODY = 15.0
"""Above this epsilon odds may change millions of times over, and no number says that well."""


SEARCH = "epsilon is of a search of {} runs expected, of which this one alone is released"

GROUPS = (2, 4, 8)
"""Sizes of groups whose epsilon is told."""


def promise(run: PrivateRun) -> list[str]:
    """The promise, said before round 0."""
    plan, words = run.plan, run.plan.describe()
    epsilon = plan.planned(run.noise, run.rounds)
    seen = "all this run releases" + ("" if plan.strict else " but what is marked not private")
    before = statistics_of(run)
    return [
        f"privacy of {words['unit']}: {words['mechanism']}",
        *([f"before round 0: {before}; a part of the budget"] if before else []),
        *([f"figures inside the budget: {figures_of(run)}"] if plan.metrics_epsilon else []),
        f"trusted: {trusted(plan)}; neighbouring: {words['neighbouring']}",
        f"noise multiplier {run.noise:.4g}, planned epsilon {epsilon:.3f} at delta {run.delta:g} over "
        f"{amount(run.rounds, 'round')} ({'rdp' if plan.search else plan.accountant} accountant)",
        *([SEARCH.format(plan.search)] if plan.search else []),
        f"in plain words: {plainly(epsilon, seen, words['unit'], run.delta)}",
    ]


def trusted(plan: Privacy) -> str:
    """Who sees what the guarantee is not about."""
    searcher = "; who ran the search as well: all its runs were seen there" if plan.search else ""
    return plan.describe()["trusted"] + searcher


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


def cost(run: PrivateRun, clients: Sequence[Any] = ()) -> str:
    """What was spent, in a sentence."""
    spent, unit = run.spent(), run.plan.describe()["unit"]
    person = user_level(run, clients, "rdp" if spent > NOBODY else run.plan.accountant)
    whole = ""
    if person is not None:
        most, whole = person[f"{run.plan.unit}s_of_a_person_at_most"], person["epsilon"]
        whole = (
            f"; epsilon {math.inf if whole is None else whole:.3f} for a person with up to {most}"
        )
    odds = (
        "which protects nobody" if spent > NOBODY else f"which changes odds at most {_odds(spent)}"
    )
    return (
        f"epsilon {spent:.3f} spent at delta {run.delta:g} for {unit}, {odds}{whole}; privacy.json has all "
        "(without: --privacy none)"
    )


def statistics_of(run: PrivateRun) -> str:
    """What is released beside the rounds, in words; empty: nothing."""
    noise = run.plan.statistics_noise
    if noise is None:
        return ""
    who = "each client" if run.plan.per_client else "the server"
    return f"centers and widths of columns, once, noise multiplier {noise:g} by {who}"


def figures_of(run: PrivateRun) -> str:
    """What is told inside the budget round by round, in words; empty: nothing."""
    plan = run.plan
    if not plan.metrics_epsilon:
        return ""
    every = plan.metrics_every or min(run.rounds, told.USUAL)
    return (
        f"loss (held to {plan.metrics_loss:g} for each example) and accuracy of the model as clients were "
        f"sent it, on their training data, every {amount(every, 'round')}; {plan.metrics_epsilon:g} of "
        f"epsilon, noise multiplier {run.metrics_noise:.5g}"
    )


def _odds(epsilon: float) -> str:
    factor = math.exp(epsilon)
    return f"{factor:,.0f}-fold" if factor >= 10 else f"{factor:.1f}-fold"


def claim(run: PrivateRun, clients: Sequence[Any] = ()) -> dict[str, Any]:
    """What (epsilon, delta) leaves open, of what was charged so far: all of them upper bounds.

    Where one unit's epsilon protects nobody, and for groups, the quick accountant is enough.
    """
    plan, events = run.plan, run.ledger.most()
    quick = "rdp" if run.spent() > NOBODY else plan.accountant
    curve = claims.curve(events, plan.delta, quick, plan.trials)
    # of a search nothing is known but for one unit that comes or goes
    others = None if plan.search else plan.several(events, claims.REPLACED)
    groups = {} if plan.search else {k: plan.several(events, k) for k in GROUPS}
    return {
        "gaussian_mu": _number(curve.mu if curve.exact else None),
        "trade_off_curve": [
            {"false_positive_rate": a, "false_negative_rate_at_least": b} for a, b in curve.points
        ],
        "true_positives_at_1_percent_false_ones_at_most": curve.found(0.01),
        "membership_advantage_at_most": curve.advantage,
        "epsilon_replace_one": others and _number(claims.epsilon_of(others, plan.delta, quick)),
        "epsilon_of_a_group_by_rdp": {
            str(k): parts and _number(claims.epsilon_of(parts, plan.delta, "rdp"))
            for k, parts in groups.items()
        },
        "user_level": user_level(run, clients, quick),
    }


def user_level(run: PrivateRun, clients: Sequence[Any], accountant: str) -> dict[str, Any] | None:
    """Epsilon of all that belongs to one person, where it is known and may be told who that is."""
    plan, public = run.plan, run.plan.person is not None
    # how much a person has is nobody's to know; and of a search no bound for persons is known
    if plan.search or (plan.strict and not public):
        return None
    found = persons.person_epsilon(plan, run.ledger.most(), clients, accountant)
    if found is None:
        return None
    return {
        f"{plan.unit}s_of_a_person_at_most": found[0],
        "epsilon": _number(found[1]),
        "which_is": "a public bound" if public else "counted from the data, and so not private",
    }


def _number(x: float | None) -> float | None:
    """JSON has no infinity."""
    return None if x is None or math.isinf(x) else x


def statement(run: PrivateRun, clients: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything a reader needs to believe, or doubt, the claim: ``privacy.json``.

    ``clients``: of whom some may know which examples are of one person.
    """
    plan = run.plan
    alone = run.ledger.spent(plan.delta, plan.accountant) if plan.search else None
    each = plan.per_client and not plan.search
    spent = run.ledger.spent_by_client(plan.delta, plan.accountant) if each else {}
    values = sorted(min(v, run.spent()) for v in spent.values())
    return {
        **plan.describe(),
        "trusted": trusted(plan),
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
        "search": {
            "runs_expected": plan.search,
            "number_of_runs": "geometric, drawn by the system's generator and kept nowhere",
            "epsilon_of_the_released_run_alone": alone,
        }
        if plan.search
        else None,
        **claim(run, clients),
        "rounds_planned": run.rounds,
        "rounds_charged": sum(e.event == plan.event(run.noise) for e in run.ledger.entries),
        "released_before_round_0": statistics_of(run) or None,
        "figures_inside_the_budget": figures_of(run) or None,
        "accountant": "rdp" if plan.search else plan.accountant,
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


def text(run: PrivateRun, clients: Sequence[Any] = ()) -> str:
    """The report as lines ``name: value``, for a terminal or a text panel."""
    return "\n".join(
        f"    {k.replace('_', ' ')}: {v}"
        for k, v in statement(run, clients).items()
        if v is not None
    )
