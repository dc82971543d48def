"""Rules that see each client's update, so that no single one moves the model as far as it likes."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedtorch.aggregation.mean import Held
from fedtorch.aggregation.mixing import Mixing
from fedtorch.aggregation.table import Table, distances
from fedtorch.options import NOT_NEGATIVE, briefly, check, typed
from fedtorch.types import BUFFERS, ConfigError, Params, Released, Stack

BEYOND = 1e30
"""No number of an update is larger: squares of what a liar sends must not overflow."""

FAR = 5.0
"""An update is named whose distance to the others is so many times the usual one."""


@runtime_checkable
class ByUpdate(Protocol):
    """A rule that looks at all groups together."""

    def combine(self, sent: dict[str, Stack]) -> dict[str, Params]:
        """What K clients sent, each group [K, ...] in float64 -> one of each.

        The groups are ``"delta"``, the strategy's own and, where visits moved any, ``"buffers"`` (changes
        too). Clients come in the order of their ids, on the CPU; none is NaN or infinite.
        """


@runtime_checkable
class ByColumn(Protocol):
    """A rule that looks at each number by itself."""

    def across(self, rows: Tensor) -> Tensor:
        """Some columns of every update, [K, c] in float64 -> [c]."""


@runtime_checkable
class ByDistance(Protocol):
    """A rule that looks at how far updates are from each other."""

    def shares(self, points: Tensor) -> Tensor:
        """How much of each update the result has, [K + 1].

        ``points`` [K + 1, axes]: updates as ``Table.points`` has them, then the reference.
        """


@dataclass(frozen=True, kw_only=True)
class Robust:
    """A rule that is given each client's update; one of your own has ``combine`` (``ByUpdate``).

    Every client counts once, whatever it says of its size: who lies would say a billion. A rule of this
    package overrides ``across`` or ``shares``, which see each group of what is sent by itself.
    """

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        briefly(cls)

    linear: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    """Whether the round's result is the next one's reference; it stays on the server."""

    f: int = 0
    """How many clients of a round may lie."""
    pre: Mixing | None = None
    """What is done to updates before the rule: nnm, bucketing or none."""

    def __post_init__(self) -> None:
        """Refuse what is no number of clients, and a rule that does nothing."""
        check(self, "aggregator", f=NOT_NEGATIVE)
        ways = isinstance(self, ByUpdate | ByColumn | ByDistance)
        if not ways and type(self).merge is Robust.merge:
            raise ConfigError(f"{type(self).__name__} has none of combine, across and shares")
        if self.pre is not None:
            self.pre.fits(self.f)

    @property
    def least(self) -> int:
        """How many updates the rule needs."""
        return 2 * self.f + 1

    needs: ClassVar[str] = "2f + 1"
    """The same in words."""
    lowers: ClassVar[str] = "aggregator.f"
    """The options that ask for so many."""

    @property
    def clients(self) -> int:
        """How many clients must report."""
        return self.least if self.pre is None else self.pre.needed(self.least)

    def check(self, most: int, ids: Sequence[str]) -> None:
        """Raises ConfigError where a round, of ``most`` of these clients, can never be enough."""
        if most < self.clients:
            raise ConfigError(f"{self.short(most)}: lower {self.lowers}, or take more clients")
        if self.pre is not None:
            self.pre.suits(most)
        if self.trusts is not None and self.trusts not in ids:
            raise ConfigError(
                f"aggregator {typed(self)} trusts client {self.trusts!r}, and there is none of that name: "
                f"give aggregator.trusted one of {', '.join(ids[:6])}{', ...' if ids[6:] else ''}"
            )
        if self.trusts is not None and most < len(ids):
            raise ConfigError(
                f"aggregator {typed(self)} needs client {self.trusts!r} in every round: take participation "
                "everyone"
            )
        made = torch.zeros(())
        if isinstance(self, ByUpdate):
            with suppress(Exception):  # of a rule that is made for some model's groups alone
                rows = torch.arange(3.0 * most).double().view(most, 3)
                made = self.combine({"delta": {"w": rows}})["delta"]["w"]
        if not bool(made.isfinite().all()):
            raise ConfigError(
                f"aggregator {typed(self)} makes no number of {most} finite updates, as where it "
                "leaves all of them out: let it leave out fewer, or let more clients take part"
            )

    def short(self, clients: int) -> str:
        """Why so few will not do."""
        before = "" if self.pre is None else f" after {typed(self.pre)}"
        return (
            f"aggregator {typed(self)} with f {self.f} needs {self.needs} = {self.least} updates"
            f"{before}, of {self.clients} clients or more, and a round has {clients}"
        )

    def missing(self, ids: Sequence[str]) -> str | None:
        """Why these clients are too few for the rule, or None."""
        if self.trusts is not None and self.trusts not in ids:
            return f"aggregator {typed(self)} needs client {self.trusts!r}, who did not report"
        return self.short(len(ids)) if len(ids) < self.clients else None

    @property
    def trusts(self) -> str | None:
        """Id of a client that has to be there, and whose update is the first row."""
        return None

    def merge(self, table: Table) -> tuple[Params, Tensor]:
        """One of all rows, and each row's share of it, [rows]; 1 where columns go their own ways."""
        if isinstance(self, ByColumn):
            return table.each(lambda block: self.across(block[:-1])), torch.ones(len(table))
        assert isinstance(self, ByDistance)
        shares = self.shares(table.points)
        return table.each(lambda block: shares @ block), shares[:-1]

    def start(
        self, held: Held | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> "Rows":
        """No client yet."""
        return Rows(self, held or {}, seed, dtype)


class Rows:
    """Every client's update of one round, on the CPU, in the type that the weights are trained in."""

    def __init__(self, rule: Robust, held: Held, seed: int, dtype: torch.dtype) -> None:
        """Nothing added yet."""
        self.held, self.figures = held, dict[str, Any]()
        self._rule, self._seed, self._dtype = rule, seed, dtype
        self._ids: list[str] = []
        self._sent: dict[str, dict[str, list[Tensor]]] = {}
        self._buffers: list[tuple[int, Stack]] = []

    def add(self, update: Released) -> None:
        """Keep the clients of one chunk; raises TypeError where only their mean came."""
        if update.summed and len(update.ids) > 1:
            raise TypeError("a mean of several clients does not show each one's update")
        self._ids += update.ids
        for group, stack in update.sent.items():
            kept = self._sent.setdefault(group, {})
            for name, v in stack.items():
                kept.setdefault(name, []).append(self._kept(v))
        own = {name: v.to("cpu", torch.float64, copy=True) for name, v in update.buffers.items()}
        self._buffers.append((len(update.ids), own))

    def sums(self) -> dict[str, Params]:
        """Raises TypeError: noise for a sum says nothing of another rule's result."""
        raise TypeError("this rule takes no sum")

    def result(self, start: Params) -> tuple[dict[str, Params], Params]:
        """What the rule makes of each sent group, and of the buffers; nothing where too few reported."""
        if why := self._rule.missing(self._ids):
            self.figures["too_few"] = why
            return {}, {}
        moved = sorted({name for _, own in self._buffers for name in own})
        at = {name: start[name].double().cpu() for name in moved}
        changes = {name: self._changes(name, v) for name, v in at.items()}
        groups = self._sent | ({BUFFERS: changes} if changes else {})
        place = sorted(range(len(self._ids)), key=self._key)
        tables = {g: Table(v, torch.tensor(place), self.held.get(g)) for g, v in groups.items()}
        if isinstance(self._rule, ByUpdate):
            found = self._rule.combine({g: self._mixed(t).whole() for g, t in tables.items()})
        else:
            found = {g: self._merged(g, t, place) for g, t in tables.items()}
            # what was not sent this time is kept as it was
            kept = {g: self.held.get(g, {}) | v for g, v in found.items()}
            self.held = self.held | kept if self._rule.keeps else {}
        buffers = {name: v + at[name] for name, v in found.pop(BUFFERS, {}).items()}
        return found, buffers

    def _key(self, k: int) -> tuple[bool, str]:
        return self._ids[k] != self._rule.trusts, self._ids[k]

    def _mixed(self, table: Table) -> Table:
        pre = self._rule.pre
        return table if pre is None else table.mixed(pre.matrix(table, self._rule.f, self._seed))

    def _merged(self, group: str, table: Table, place: list[int]) -> Params:
        mixed = self._mixed(table)
        found, share = self._rule.merge(mixed)
        if group == "delta":
            share = share if mixed.mix is None else share.double() @ mixed.mix
            who = [self._ids[k] for k in place]
            left = [i for i, s in zip(who, share.tolist(), strict=True) if s == 0]
            far = far_off(table.points[:-1]).tolist() if "points" in vars(table) else []
            named = {
                "left_out": [i for i in left if i != self._rule.trusts],
                "far": [i for i, away in zip(who, far, strict=False) if away],
            }
            self.figures |= {name: ids for name, ids in named.items() if ids}
        return found

    def _changes(self, name: str, start: Tensor) -> list[Tensor]:
        """A client sends the buffers that its chunk moved: it has the others as they were."""
        return [
            own[name] - start if name in own else start.new_zeros(count, *start.shape)
            for count, own in self._buffers
        ]

    def _kept(self, v: Tensor) -> Tensor:
        # a copy: what a worker or a module sends, it overwrites with the next client
        return v.detach().cpu().double().clamp(-BEYOND, BEYOND).to(self._dtype)


def far_off(points: Tensor) -> Tensor:
    """Which of the points [n, axes] are far from most others: n bools."""
    usual = distances(points).median(1).values
    return usual > FAR * usual.median()
