"""Calls of sites carried by a SuperLink, where only the server can ask and only a node can answer.

A site calls for work as it always does. Each call leaves it as the reply to a message of the server's, and
what the server has to say to it is the next message. So whoever is asked, waits or comes back is settled
where it is for our own line (``sites.engine``), and this file knows of bytes alone.

Calls are numbered, by process of a site. A call stays due until it is answered, whatever is lost on the
way: a server that began anew, or that misses one, says so and is given all that are due.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.engines import wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.sites.rpc import OPEN_CALLS, Handler, Quiet, Refused, TooLarge, Unreachable, log
from fedtorch.sites.superlink import Behind, Door, Grid, Parcel

HOLD = 20.0
"""Seconds for which a site that works holds a message; Flower gives it up for dead after 60."""
ALONE = 1.0
"""Seconds that a report waits for the call for work that follows it, to go along."""
LOOK = 0.2
"""Seconds between two looks for a message."""
ALIVE = 10.0
"""Seconds between two signs of life to the SuperLink, which waits for 30."""
FAREWELL = 8.0
"""Seconds that the end waits until sites have heard of it: their nodes sleep for 3."""
METHODS = ("join", "fetch", "report")


class NodeLine:
    """A site's line to the server, by way of the SuperNode beside it."""

    def __init__(self, door: Door, site: str, limit: int, folder: Path) -> None:
        """Wait for messages from now on; ``folder`` keeps which of them is not answered yet."""
        self.node, self.site, self.limit = Behind(door), site, limit
        self.path = folder / "flower.json"
        self.process = secrets.token_hex(8)
        self.due: dict[int, tuple[str, bytes]] = {}
        """Calls without an answer, in their order."""
        self.answers: dict[int, bytes | Refused] = {}
        self.number = self.sent = 0
        self.session = ""
        self.reported = 0.0
        self.over = False
        self.change = threading.Condition()
        self.worker = threading.Thread(target=self._work, name="fedtorch-node", daemon=True)
        self.worker.start()

    def call(self, method: str, data: bytes, seconds: float) -> bytes:
        """One call; raises Unreachable or Refused. A report is taken as heard: a refusal is logged."""
        with self.change:
            self.number += 1
            number = self.number
            self.due[number] = (method, data)
            self.change.notify_all()
            if method == "report":
                self.reported = time.monotonic()
                return wire.encode(Message("thanks"))
            if not self.change.wait_for(lambda: number in self.answers, seconds):
                del self.due[number]
                raise Unreachable(f"no word of it by the SuperNode for {seconds:g} s")
            answer = self.answers.pop(number)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def close(self) -> None:
        """Let go of the SuperNode, which is told so."""
        with self.change:
            self.over = True
            self.change.notify_all()
        self.worker.join(5)

    def _work(self) -> None:
        """In a thread of its own: take messages and answer them, until this site is closed."""
        said = ""
        self._answer_kept()
        while not self.over:
            try:
                parcel = self.node.take()
                if parcel is not None:
                    with disk.whole(self.path, private=True) as file:
                        file.write(json.dumps(self.node.kept()).encode())
                    self.node.reply(*self._turn(parcel))
                    self.path.unlink(missing_ok=True)
                    continue
                said = ""
            except (Unreachable, Refused) as e:
                if said != str(e):
                    log.warning("%s", e)
                said, self.sent = str(e), 0  # what went with a reply that was lost goes again
                time.sleep(5 * LOOK)
            time.sleep(LOOK)
        self.node.close()

    def _answer_kept(self) -> None:
        """Let the SuperNode go on where a process that died held a message."""
        try:
            self.node.restore(json.loads(self.path.read_text()))
            self.node.reply(self._header([], True), b"")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, Unreachable, Refused) as e:
            log.info("a message that was not answered is given up: %s", e)
        self.path.unlink(missing_ok=True)

    def _turn(self, parcel: Parcel) -> tuple[dict[str, Any], bytes]:
        """Hear what a message says, and wait for something to say."""
        with self.change:
            self._hear(parcel)
            end = time.monotonic() + HOLD
            while not self.over and (left := end - time.monotonic()) > 0:
                new = [n for n in self.due if n > self.sent]
                if len(new) == 1 and self.due[new[0]][0] == "report":
                    left = min(left, self.reported + ALONE - time.monotonic())
                    new = new if left <= 0 else []
                elif not new and self.due:
                    break  # its answer has to come by the next message
                if new:
                    break
                self.change.wait(left)
            calls = [(n, *self.due[n]) for n in self.due if n > self.sent]
            self.sent = max(self.due, default=self.sent)
            return self._header(calls, not self.due), b"".join(data for *_, data in calls)

    def _hear(self, parcel: Parcel) -> None:
        told = parcel.header
        if parcel.error:
            log.warning("a message that cannot be used: %s", parcel.error)
            return
        if len(parcel.body) > self.limit:  # it would come again and again
            whose = [n for n, (method, _) in self.due.items() if method != "report"]
            self.answers |= dict.fromkeys(whose, TooLarge(len(parcel.body), self.limit))
            self.due = {n: c for n, c in self.due.items() if n not in whose}
            self.change.notify_all()
            return
        if told.get("session") != self.session or told.get("again"):
            self.session, self.sent = str(told.get("session")), 0
        if told.get("process") != self.process:
            return
        for number, answer in unpacked(told.get("answers"), parcel.body):
            method, _ = self.due.pop(number, ("", b""))
            if isinstance(answer, Refused) and method == "report":
                log.warning("the report was refused: %s", answer)
            elif method and method != "report":
                self.answers[number] = answer
        self.change.notify_all()

    def _header(self, calls: Sequence[tuple[int, str, bytes]], busy: bool) -> dict[str, Any]:
        told = [[number, method, len(data)] for number, method, data in calls]
        return {"site": self.site, "process": self.process, "calls": told, "busy": busy}


@dataclass(eq=False)
class Place:
    """What a server knows of one node."""

    id: int
    name: str = ""
    process: str = ""
    out: dict[str, bool] = field(default_factory=dict)
    """Messages that it has not replied to, and whether they told it something."""
    got: int = 0
    """The last call that came."""
    busy: int = 0
    """Calls that are being answered."""
    ready: list[tuple[int, bytes | Refused]] = field(default_factory=list)
    """Answers that are to be sent."""
    again: bool = False
    here: bool = True
    rest: float = 0.0
    """No new message before this time: something went wrong."""


class GridListener:
    """The server's end, in place of a port: asks every node, and has its calls answered."""

    port = 0
    certificates: Mapping[str, bytes] = {}
    """Flower knows a node by a key, and shows it to nobody."""

    def __init__(
        self,
        door: Door,
        limit: int,
        handle: Handler,
        names: Sequence[str],
        pinned: Mapping[str, int],
    ) -> None:
        """Begin a run at the SuperLink; raises Unreachable or Refused."""
        self.door, self.limit, self.handle = door, limit, handle
        self.names, self.pinned = names, pinned
        self.session = secrets.token_hex(8)
        self.places: dict[int, Place] = {}
        self.lock = threading.Lock()
        self.quiet = Quiet()
        self.ending = False
        self.grid = Grid(door)
        threads = OPEN_CALLS * len(names) + 1
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="fedtorch-site")
        self.worker = threading.Thread(target=self._work, name="fedtorch-grid", daemon=True)
        self.worker.start()
        self.rest = threading.Event()
        threading.Thread(target=self._live, name="fedtorch-alive", daemon=True).start()

    def close(self) -> None:
        """Tell what there is to tell, for as long as a node may sleep, and end the run."""
        if self.ending:
            return
        self.ending = True
        self.worker.join(15)
        self.rest.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        try:
            self.grid.close()
        except (Unreachable, Refused) as e:
            log.warning("the run could not be ended at the SuperLink: %s", e)

    def _work(self) -> None:
        """In a thread of its own: all that is said to the SuperLink."""
        looked = end = 0.0
        while True:
            now = time.monotonic()
            end = end or (now + FAREWELL if self.ending else 0.0)
            if self.ending and (now > end or not self._owes()):
                return
            try:
                if now - looked > 5 * LOOK:
                    self._look()
                    looked = now
                for place in [*self.places.values()]:
                    self._say(place)
                numbers = {n: p for p in self.places.values() for n in p.out}
                for number, get in self.grid.replies([*numbers]):
                    place = numbers[number]
                    with self.lock:
                        del place.out[number]
                        place.busy += 1
                    self.pool.submit(self._open, place, get)
            except Unreachable as e:
                self.quiet.warn("", str(e))
                time.sleep(5 * LOOK)
            except Refused as e:
                self.quiet.warn("", f"{e}; beginning a new run there")
                self._anew()
            time.sleep(LOOK)

    def _live(self) -> None:
        """In a thread of its own, as large messages take long: tell the SuperLink that we live."""
        while not self.rest.wait(ALIVE):
            with suppress(Unreachable, Refused):  # whoever works finds out by itself
                self.grid.alive()

    def _owes(self) -> bool:
        """Whether a site has not heard yet what was answered."""
        with self.lock:
            places = [*self.places.values()]
        return any(p.here and (p.ready or p.busy or any(p.out.values())) for p in places)

    def _anew(self) -> None:
        """The SuperLink knows nothing of the run any more: begin another, with whatever nodes come."""
        try:
            self.grid.runtime.close()
            self.grid = Grid(self.door)
        except (Unreachable, Refused) as e:
            self.quiet.warn("", str(e))
            time.sleep(2)
        for place in self.places.values():
            place.out, place.again = {}, True

    def _look(self) -> None:
        """Who is online."""
        online = self.grid.nodes()
        for node in online:
            if node not in self.places:
                self.places[node] = Place(node)
        for place in self.places.values():
            place.here = place.id in online

    def _say(self, place: Place) -> None:
        """Send a node what it is to hear, and enough blank messages for it to answer by."""
        now = time.monotonic()
        if not place.here or now < place.rest:
            return
        with self.lock:
            ready = [*place.ready]
            waiting = place.busy > 0
        # after an answer a second message, which keeps the node from its sleep of 3 s
        wanted = 2 if ready else 0 if waiting else 1
        while ready or (len(place.out) < wanted and not self.ending):
            header = {"session": self.session, "process": place.process, "again": place.again}
            answers, body = packed(ready)
            number = self.grid.send(place.id, header | {"answers": answers}, body)
            with self.lock:
                place.out[number] = bool(ready)
                place.got = 0 if place.again else place.got  # all that is due comes again
                place.ready = [a for a in place.ready if a not in ready]
            ready, place.again = [], False

    def _open(self, place: Place, get: Callable[[], Parcel]) -> None:
        """In a thread of its own, as bytes may come slowly and a call for work may wait: one reply."""
        try:
            parcel = get()
        except (Unreachable, Refused) as e:
            parcel = Parcel({}, b"", place.id, str(e))
        try:
            calls = self._calls(place, parcel)
            found = [(n, self._answer(place.name, method, data)) for n, method, data in calls]
        except (MessageError, PermissionError) as e:
            self.quiet.warn(place.name, f"turned away node {place.id}: {e}")
            place.process = str(parcel.header.get("process"))
            told = numbered(parcel.header.get("calls"))
            found = [(n, Refused(str(e))) for n, _, _ in told]
        with self.lock:
            place.busy -= 1
            if place.process == parcel.header.get("process"):
                place.ready += found

    def _calls(self, place: Place, parcel: Parcel) -> list[tuple[int, str, bytes]]:
        """What is new in a reply; raises PermissionError or MessageError where it may not be."""
        told = parcel.header
        name, process = str(told.get("site")), str(told.get("process"))
        with self.lock:
            why = parcel.error or self._elsewhere(place, name, process)
            if why:
                self.quiet.warn(place.name, f"node {place.id} ({place.name or 'new'}): {why}")
                place.rest, place.again = time.monotonic() + 2, True
                return []
            if process != place.process:
                place.process, place.got, place.ready = process, 0, []
            if place.name != name:
                log.info("node %d is %s", place.id, name)
            place.name = name
            calls = [c for c in split(told.get("calls"), parcel.body) if c[0] > place.got]
            place.got = max([place.got, *(c[0] for c in calls)])
            idle = place.busy == 1 and not place.ready and not place.out
            # what it waits for was lost on the way
            place.again |= idle and not calls and not told.get("busy")
        return calls

    def _elsewhere(self, place: Place, name: str, process: str) -> str:
        """Why a site must wait before it can be at this node; raises PermissionError where it never can."""
        if name not in self.names:
            raise PermissionError(f"{wire.short(name)} is not one of this run's sites")
        if self.pinned and self.pinned.get(name) != place.id:
            raise PermissionError(f"{name} is not at node {place.id} by --engine.nodes")
        for other in [p for p in self.places.values() if p is not place and p.name == name]:
            # a SuperNode that was started again may be another to Flower: the process beside it is not
            if other.here and other.process != process:
                return f"{name} is at node {other.id}, which counts as online"
            other.name = other.process = ""
        return ""

    def _answer(self, name: str, method: str, data: bytes) -> bytes | Refused:
        try:
            if method not in METHODS or len(data) > self.limit:
                raise MessageError(f"a call {wire.short(method)} of {len(data):,} bytes")
            return self.handle(method, name, data)
        except MessageError as e:
            self.quiet.warn(name, f"refused a message of {name}: {e}")
            return Refused(str(e))
        except Exception as e:
            log.exception("a call of %s", name)
            return Refused(f"the server failed: {type(e).__name__}")


def packed(answers: Sequence[tuple[int, bytes | Refused]]) -> tuple[list[list[Any]], bytes]:
    """Answers as words and bytes."""
    words = [[n, -1, str(a)] if isinstance(a, Refused) else [n, len(a), ""] for n, a in answers]
    return words, b"".join(a for _, a in answers if not isinstance(a, Refused))


def unpacked(words: object, body: bytes) -> list[tuple[int, bytes | Refused]]:
    """The answers in a message; none where it is of another form."""
    found: list[tuple[int, bytes | Refused]] = []
    at = 0
    for number, size, why in numbered(words):
        if type(size) is not int or not isinstance(why, str):
            return []
        found.append((number, Refused(wire.printable(why)) if size < 0 else body[at : at + size]))
        at += max(size, 0)
    return found if at == len(body) else []


def split(words: object, body: bytes) -> list[tuple[int, str, bytes]]:
    """The calls in a reply; raises MessageError for anything else."""
    found, at = [], 0
    for number, method, size in numbered(words):
        if type(size) is not int or size < 0 or not isinstance(method, str):
            raise MessageError("calls of another form")
        found.append((number, method, body[at : at + size]))
        at += size
    if at != len(body) or any(a[0] >= b[0] for a, b in pairwise(found)):
        raise MessageError("calls that do not fit their bytes")
    return found


def numbered(words: object) -> list[tuple[int, Any, Any]]:
    """Rows of three that begin with a number; nothing where they are of another form."""
    rows = words if isinstance(words, list) else []
    sound = all(isinstance(r, list) and len(r) == 3 and type(r[0]) is int for r in rows)
    return [(r[0], r[1], r[2]) for r in rows] if sound else []
