"""What several private runs over the same data cost together: each one's own epsilon is not the price.

Whoever sees the results of all of them, or of the best alone, has seen what all of them released: a choice
among runs is made from all. The charges of one unit (an example, a client) over all runs are composed.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtorch.privacy import Privacy, told
from fedtorch.privacy.accounting.events import Event, Kind, epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.run.files import LEDGER
from fedtorch.run.results import Saved
from fedtorch.types import ConfigError

Tally = Counter[Kind]
"""Steps by (mechanism, noise, rate)."""

HOLDERS = ("dataset", "partition", "clients", "validation", "seed")
"""Options that decide which client holds which example."""


def planned(configs: Sequence[Any]) -> list[str]:
    """Of runs to come: sentences for the private ones over each dataset; none where they are one."""
    groups: dict[Hashable, list[Privacy]] = defaultdict(list)
    kinds: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for c in configs:
        over = source(type(c.dataset).__name__, getattr(c.dataset, "path", ""))
        kinds[over]["" if c.privacy is None else type(c.privacy).__name__] += 1
        if c.privacy is not None:
            groups[over, type(c.plan)].append(c.plan)
    alike = [_promised(plans) for plans in groups.values() if len(plans) > 1]
    return alike + [line for found in kinds.values() for line in _apart(found)]


def source(name: str, path: str) -> str:
    """Where examples come from, however they are read, split and scaled then."""
    return str(Path(path).expanduser().resolve()) if path else name.lower()


def _apart(kinds: Counter[str]) -> list[str]:
    """What no sum of epsilons says of runs over the same data: of other plans, and of none."""
    names, lines = sorted(k for k in kinds if k), []
    if len(names) > 1:
        lines.append(
            f"privacy: {' and '.join(names)} protect different things: over the same data no one epsilon "
            "says what they cost together, and each one's holds only where the others are not seen"
        )
    if names and kinds[""]:
        lines.append(
            f"privacy: {kinds['']} of {kinds.total()} runs over the same data have none: that of the "
            "others holds only where nothing of these is seen"
        )
    return lines


def spent(runs: Sequence[Saved]) -> list[str]:
    """Of runs that are there, from their ledgers: a sentence for those over each dataset."""
    groups: dict[Hashable, list[Saved]] = defaultdict(list)
    for run in runs:
        if (run.folder / LEDGER).is_file():
            plan = run.options.get("privacy", "sample")
            o = run.options
            over = source(str(o.get("dataset", "digits")), str(o.get("dataset.path") or ""))
            groups[over, plan].append(run)
    return [_charged(group) for group in groups.values() if len(group) > 1]


def together(ledgers: Sequence[Ledger], same: bool, delta: float, accountant: str) -> float:
    """Epsilon of all that is in these ledgers, for whoever is charged most.

    ``same``: a client is the same in all of them. Where that is not known, whoever is charged most in one
    run may be charged most in each.
    """
    if same:
        names = {n for ledger in ledgers for e in ledger.entries for n in e.clients or ()}
        all_of = [_tallies(ledger) for ledger in ledgers]
        sums = {
            _frozen(t for own in all_of for t in (own[None], own.get(n, Tally())))
            for n in (*names, "")
        }
    else:
        sums = {_frozen(_most(_tallies(ledger)) for ledger in ledgers)}
    events = [[Event.of(kind, steps) for kind, steps in sorted(s)] for s in sums]
    return max((epsilon(e, delta, accountant) for e in events if e), default=0.0)


def _promised(plans: Sequence[Privacy]) -> str:
    events, alone = list[Event](), 0.0
    for plan in plans:
        rounds = plan.rounds or 0
        noise = plan.calibrated(rounds)
        events += plan.whole(noise, rounds, told.figures_noise(plan, rounds))
        alone = max(alone, plan.planned(noise, rounds))
    delta = max(p.delta for p in plans)
    accountant = "prv" if all(p.accountant == "prv" for p in plans) else "rdp"
    cost = epsilon(events, delta, accountant)
    return (
        f"privacy: {len(plans)} runs over the same data will cost epsilon {cost:.3f} together at delta "
        f"{delta:g}, not the {alone:.3f} of one: to choose the best, all of them are looked at"
    )


def _charged(group: Sequence[Saved]) -> str:
    options = [r.options for r in group]
    delta = max(_or_else(o.get("privacy.delta"), 1e-5) for o in options)
    accountant = "rdp" if any(o.get("privacy.accountant") == "rdp" for o in options) else "prv"
    same = len({_chosen(o, HOLDERS) for o in options}) == 1
    try:
        ledgers = [Ledger.look(r.folder / LEDGER) for r in group]
    except ConfigError as e:
        return f"privacy: what {len(group)} runs over the same data cost together is not known: {e}"
    # the best of a search stands for all its runs, which no ledger holds: its epsilon and delta add up
    alone = [k for k, r in enumerate(group) if not r.options.get("privacy.search")]
    found = [r.result()["epsilon"] for k, r in enumerate(group) if k not in alone]
    cost = together([ledgers[k] for k in alone], same, delta, accountant) if alone else 0.0
    cost += sum(_or_else(e, math.inf) for e in found)
    delta *= len(found) + bool(alone)
    data = options[0].get("dataset.path") or options[0].get("dataset", "digits")
    return (
        f"privacy: {len(group)} runs over the same data ({data}) cost epsilon {cost:.3f} together at delta "
        f"{delta:g}; the epsilon of a run holds where nothing is seen or chosen by the others"
    )


def _tallies(ledger: Ledger) -> dict[str | None, Tally]:
    """What each client was charged, and under None what everyone was."""
    found: dict[str | None, Tally] = {None: Tally()}
    for entry in ledger.entries:
        e = entry.event
        for who in (None,) if entry.clients is None else entry.clients:
            found.setdefault(who, Tally())[e.kind] += e.steps
    return found


def _most(tallies: Mapping[str | None, Tally]) -> Tally:
    largest = Tally()
    for who, own in tallies.items():
        if who is not None:
            largest |= own
    return largest + tallies[None]


def _frozen(tallies: Iterable[Tally]) -> frozenset[tuple[Kind, int]]:
    total = Tally()
    for tally in tallies:
        total.update(tally)
    return frozenset(total.items())


def _chosen(options: Mapping[str, Any], names: Sequence[str]) -> Hashable:
    return tuple(sorted((k, str(v)) for k, v in options.items() if k.partition(".")[0] in names))


def _or_else(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise
