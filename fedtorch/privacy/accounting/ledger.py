"""The ledger: an append-only record of every noised release, written before it happens."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.privacy.accounting.events import Event, Kind, epsilon
from fedtorch.privacy.accounting.journal import Journal, parsed
from fedtorch.types import ConfigError

UNITS = ("example", "client")

History = frozenset[tuple[Kind, int]]
"""Charges of one owner: kinds of releases, and how many of each."""

NOTHING: History = frozenset()


@dataclass(frozen=True)
class Entry:
    """One charge."""

    round: int
    unit: str
    """The unit that the guarantee protects: ``example`` or ``client``."""
    event: Event
    clients: tuple[str, ...] | None
    """Clients whose data the release came from; None: everyone's."""
    digest: str
    """SHA-256 over the digest before and this entry: no entry can be changed or left out unseen."""

    def body(self) -> dict[str, Any]:
        """The entry as JSON holds it, without its digest."""
        clients = None if self.clients is None else list(self.clients)
        return {"round": self.round, "unit": self.unit, **self.event.body(), "clients": clients}


class Ledger:
    """Charges of a run, in memory or, with ``path``, in a journal of JSON lines that survives a kill.

    Clients hold different units, so what they spend is not added up: the run's epsilon is the largest over
    clients, each with what is charged to everyone. Neighbouring relation: one unit added or removed.
    """

    def __init__(self, path: Path | None = None, unit: str = "example") -> None:
        """Nothing spent yet; raises ConfigError where ``path`` already holds another run's journal."""
        if unit not in UNITS:
            raise ConfigError(f"unit must be example or client, got {unit!r}")
        header = {"ledger": 1, "unit": unit, "run": os.urandom(16).hex()}
        self._reset(header, None if path is None else Journal.create(path, header))

    def charge(self, round: int, event: Event, clients: Iterable[str] | None = None) -> Entry:
        """Record a release that is about to happen; when this returns, the record is on disk.

        Guarantee: called before anything of the release leaves, it leaves every release charged, whenever
        the process is killed. Raises ConfigError, with nothing charged, when it cannot be written.
        """
        names = None if clients is None else tuple(clients)
        if names is not None and len(set(names)) < len(names):
            raise ConfigError(f"round {round}: a client is charged twice by one entry")
        entry = Entry(round, self.unit, event, names, "")
        entry = Entry(round, self.unit, event, names, _digest(self.digest, entry.body()))
        if self.journal is not None:
            self.journal.append(entry.body() | {"digest": entry.digest})
        self._add(entry)
        return entry

    def spent(self, delta: float, accountant: str = "prv") -> float:
        """Epsilon of the run so far: the largest over clients."""
        return _largest(self._all(), delta, accountant)

    def spent_by_client(self, delta: float, accountant: str = "prv") -> dict[str, float]:
        """Epsilon of each client that was ever charged; equal histories are priced once."""
        priced = {
            own: epsilon(_events(_both(own, self._run)), delta, accountant)
            for own in self._histories
        }
        return {name: priced[own] for name, own in self._clients.items()}

    def most(self) -> tuple[Event, ...]:
        """Of each kind of release as many as any one unit was charged for."""
        largest: dict[Kind, int] = {}
        for history in self._all():
            for kind, steps in history:
                largest[kind] = max(steps, largest.get(kind, 0))
        return _events(largest.items())

    def would_spend(
        self,
        more: Sequence[Event],
        clients: Iterable[str] | None,
        delta: float,
        accountant: str = "prv",
    ) -> float:
        """Epsilon of the run if this were charged too."""
        return _largest(self._all(more, clients), delta, accountant)

    def within(
        self, plan: Iterable[Event], more: Sequence[Event] = (), clients: Iterable[str] | None = ()
    ) -> bool:
        """Whether nobody is charged for anything that is not in ``plan``.

        As if they (``clients``; None: everyone) were charged for ``more``.
        """
        most = dict(_joined(map(_history, plan)))
        return all(_within(dict(history), most) for history in self._all(more, clients))

    def fits(
        self,
        more: Sequence[Event],
        clients: Iterable[str] | None,
        budget_epsilon: float,
        delta: float,
        accountant: str = "prv",
    ) -> bool:
        """Whether the run stays within a budget if this is charged too."""
        tallies = self._all(more, clients)
        # RDP is quick and never below PRV: most rounds need no more
        return any(_largest(tallies, delta, a) <= budget_epsilon for a in ("rdp", accountant))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: with a journal, how far it had come; without, every entry."""
        state = {"header": self.header, "count": len(self.entries), "digest": self.digest}
        if self.journal is None:
            state["entries"] = [e.body() | {"digest": e.digest} for e in self.entries]
        return state

    @classmethod
    def resume(cls, path: Path | None, saved: Mapping[str, Any] | None) -> "Ledger":
        """The ledger of a run that goes on from a checkpoint holding ``saved``.

        The journal may hold more than the checkpoint: rounds that were charged, and perhaps released,
        before the run was killed stay charged. Raises ConfigError when it is missing, shorter than the
        checkpoint says, or changed.
        """
        if not saved or "header" not in saved:
            raise ConfigError(
                "the checkpoint holds no privacy ledger, so what was spent is not known"
            )
        header, journal = dict(saved["header"]), None
        if path is None:
            if "entries" not in saved:
                raise ConfigError(
                    "this run keeps a privacy journal; it cannot be resumed without it"
                )
            lines, where = list(saved["entries"]), "the checkpoint's privacy ledger"
        else:
            journal, lines = Journal.read(path)
            where = f"privacy journal {path}"
            if not lines or lines.pop(0) != header:
                raise ConfigError(f"{where} is another run's, or its first line was edited")
        ledger = cls.__new__(cls)
        ledger._reset(header, journal)
        ledger._replay(lines, saved, where)
        return ledger

    @classmethod
    def look(cls, path: Path) -> "Ledger":
        """The charges in a journal as it stands, which is left alone; raises ConfigError if damaged.

        A last line that is not complete is a charge that somebody is writing, or was killed while writing.
        """
        try:
            lines = [parsed(line) for line in disk.regular(path).read_bytes().split(b"\n")[:-1]]
        except OSError as e:
            raise ConfigError(f"privacy journal {path} cannot be read: {e.strerror}") from e
        header = lines.pop(0) if lines else None
        if not isinstance(header, dict) or header.get("unit") not in UNITS:
            raise ConfigError(f"privacy journal {path} does not begin with its header")
        ledger = cls.__new__(cls)
        ledger._reset(header, None)
        ledger._replay(lines, {"count": 0, "digest": ledger.digest}, f"privacy journal {path}")
        return ledger

    def __len__(self) -> int:
        """Charges so far."""
        return len(self.entries)

    def _reset(self, header: dict[str, Any], journal: Journal | None) -> None:
        self.journal = journal
        self.header, self.unit = header, str(header["unit"])
        self.entries: list[Entry] = []
        self.digest = _digest("", header)
        self._run = NOTHING
        self._clients: dict[str, History] = {}
        self._histories: Counter[History] = Counter()  # clients with each

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.digest = entry.digest
        more = _history(entry.event)
        if entry.clients is None:
            self._run = _both(self._run, more)
        before = Counter(self._clients.get(name, NOTHING) for name in entry.clients or ())
        after = {own: _both(own, more) for own in before}
        for name in entry.clients or ():
            self._clients[name] = after[self._clients.get(name, NOTHING)]
        for own, clients in before.items():
            self._histories[after[own]] += clients
        self._histories = +(self._histories - before)

    def _all(
        self, events: Sequence[Event] = (), clients: Iterable[str] | None = None
    ) -> set[History]:
        """Charges of each client, the run's own included, each history once.

        A history that only clients charged by ``events`` have stays in, beside the longer ones it becomes.
        """
        more = _joined(map(_history, events))
        run = self._run if clients is not None else _both(self._run, more)
        now = {self._clients.get(name, NOTHING) for name in clients or ()}
        owns = {NOTHING, *self._histories, *(_both(own, more) for own in now)}
        return {_both(own, run) for own in owns}

    def _replay(self, lines: Sequence[Any], saved: Mapping[str, Any], where: str) -> None:
        """Check every line's digest while adding it."""
        count, at_count = int(saved["count"]), self.digest
        if len(lines) < count:
            raise ConfigError(
                f"{where} was shortened: it holds {len(lines)} entries, the checkpoint {count}; put the "
                "whole file back, or start a new run"
            )
        for number, line in enumerate(lines, 1):
            entry = _entry(line)
            if entry is None or entry.digest != _digest(self.digest, entry.body()):
                raise ConfigError(f"{where} was edited: entry {number} does not match its digest")
            self._add(entry)
            if number == count:
                at_count = entry.digest
        if at_count != saved["digest"]:
            raise ConfigError(
                f"{where} was edited: its first {count} entries are not the checkpoint's"
            )


def _history(event: Event) -> History:
    return frozenset({(event.kind, event.steps)})


def _both(one: History, other: History) -> History:
    if not one or not other:
        return one or other
    steps = dict(one)
    for key, more in other:
        steps[key] = steps.get(key, 0) + more
    return frozenset(steps.items())


def _joined(histories: Iterable[History]) -> History:
    found = NOTHING
    for one in histories:
        found = _both(found, one)
    return found


def _events(history: Iterable[tuple[Kind, int]]) -> tuple[Event, ...]:
    return tuple(Event.of(kind, steps) for kind, steps in sorted(history))


def _largest(histories: set[History], delta: float, accountant: str) -> float:
    """Largest epsilon over histories; those that cannot be the largest are not priced by PRV."""
    heads: list[dict[Kind, int]] = []  # what is part of none of the others
    for one in sorted(map(dict, histories), key=lambda h: -sum(h.values())):
        if not any(_within(one, other) for other in heads):
            heads.append(one)
    runs = [_events(h.items()) for h in heads]
    quick = {run: epsilon(run, delta, "rdp") for run in runs}
    largest = 0.0
    for run in sorted(runs, key=quick.__getitem__, reverse=True):
        if quick[run] > largest:
            largest = max(largest, epsilon(run, delta, accountant))
    return largest


def _within(one: Mapping[Any, int], other: Mapping[Any, int]) -> bool:
    return all(steps <= other.get(key, 0) for key, steps in one.items())


def _digest(before: str, body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _entry(line: Any) -> Entry | None:
    try:
        reach = (line.get("l2"), line.get("l1"))
        event = Event(line["mechanism"], line["noise"], line["rate"], line["steps"], *reach)
        clients = None if line["clients"] is None else tuple(line["clients"])
        return Entry(line["round"], line["unit"], event, clients, line["digest"])
    except (TypeError, KeyError, AttributeError, ConfigError):
        return None
