"""Examples, or clients, that belong to one person: what all of them cost together.

Who comes or goes with k examples at one client and m at another moves two sums, whose noises are drawn
apart: both are composed, each as a group. ``Privacy.person`` is a public bound on how many there are over
all clients, which are dearest at a single one; without it they are counted, and the count is not private.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any

from fedtorch.privacy.accounting.events import Event
from fedtorch.privacy.base import Privacy
from fedtorch.types import ConfigError

Holding = tuple[int, ...]
"""Units of one person by client, the most first."""


def holdings(clients: Sequence[Any], unit: str) -> list[Holding]:
    """What persons have, of which nobody else has as much everywhere; empty: nobody says whose they are."""
    own: dict[str, list[int]] = defaultdict(list)
    for client in clients:
        for name, count in Counter(map(_same, getattr(client, "persons", None) or ())).items():
            own[name].append(count if unit == "example" else 1)
    if unit == "example":
        known = {tuple(sorted(counts, reverse=True)) for counts in own.values()}
    else:  # all clients are in one sum
        known = {(sum(counts),) for counts in own.values()}
    kept: list[Holding] = []
    for one in sorted(known, key=sum, reverse=True):
        if not any(len(one) <= len(k) and all(map(int.__le__, one, k)) for k in kept):
            kept.append(one)
    return kept


def _same(name: str) -> str:
    """One writing of a name: who is ``7`` here and ``7.0`` or ``07`` there would count as two."""
    with suppress(InvalidOperation):
        number = Decimal(name)
        if number.is_finite() and abs(number.adjusted()) < 100:
            written = f"{number:f}"
            return written.rstrip("0").rstrip(".") if "." in written else written
    return " ".join(name.casefold().split())


def check(plan: Privacy, clients: Sequence[Any]) -> None:
    """Raises ConfigError where a person has more than the plan says that anybody has."""
    most = max(map(sum, holdings(clients, plan.unit)), default=0)
    if plan.person is not None and most > plan.person:
        raise ConfigError(
            f"privacy.person {plan.person} is less than the {most} {plan.unit}s that one person has: give "
            "a bound that holds for everybody, or leave rows out"
        )


def person_epsilon(
    plan: Privacy, events: Sequence[Event], clients: Sequence[Any], accountant: str
) -> tuple[int, float] | None:
    """Units of a person at most, and the epsilon of them all; None: nobody says, or there is no bound."""
    from fedtorch.privacy.accounting import claims  # for a report, in the end

    there = [(plan.person,)] if plan.person is not None else holdings(clients, plan.unit)
    priced: dict[Holding, list[tuple[Event, int]]] = {}
    for one in there:
        parts = [plan.several(events, k) for k in one]
        if any(p is None for p in parts):
            return None
        priced[one] = [pair for p in parts for pair in p or ()]
    if not priced:
        return None
    quick = {one: claims.epsilon_of(p, plan.delta, "rdp") for one, p in priced.items()}
    largest = 0.0
    for one in sorted(quick, key=quick.__getitem__, reverse=True):  # RDP is never below PRV
        if quick[one] > largest:
            largest = max(largest, claims.epsilon_of(priced[one], plan.delta, accountant))
    return max(map(sum, priced)), largest
