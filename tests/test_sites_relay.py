"""Calls over a SuperLink of a test's own making: none is lost, and nobody speaks for another."""

import itertools
import json
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtorch.engines.wire import MessageError
from fedtorch.sites.rpc import Refused, TooLarge, Unreachable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Flower imports warns of itself
    pytest.importorskip("flwr.app", reason="the extra flower is not installed")
    from fedtorch.sites import relay
    from fedtorch.sites.relay import GridListener, NodeLine, split
    from fedtorch.sites.superlink import Door, Parcel

pytestmark = pytest.mark.timeout(60)


class Link:
    """What a SuperLink does with messages: one at a time to a node, and its reply back."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.queue: dict[int, list] = {}
        self.taken: dict[int, str] = {}
        self.replies: dict[str, object] = {}
        self.online: list[int] = []
        self.lost = False
        self.lock = threading.Lock()


class Grid:
    """The server's end of it."""

    link: Link

    def __init__(self, door) -> None:
        self.link.lost, self.link.queue, self.link.replies = False, {}, {}
        self.runtime = self

    def nodes(self):
        return [*self.link.online]

    def alive(self):
        if self.link.lost:
            raise Refused("Run ID not found")

    def send(self, node, header, body):
        self.alive()
        number = str(next(self.link.numbers))
        with self.link.lock:
            self.link.queue.setdefault(node, []).append((number, Parcel(header, body, 1)))
        return number

    def replies(self, numbers):
        self.alive()
        with self.link.lock:
            found = [(n, self.link.replies.pop(n)) for n in numbers if n in self.link.replies]
        return [(n, lambda parcel=parcel: parcel) for n, parcel in found]

    def close(self):
        self.link.lost = True


class Behind:
    """A site's end of it."""

    link: Link

    def __init__(self, door) -> None:
        self.node = int(door.address.rpartition(":")[2])

    def take(self):
        with self.link.lock:
            waiting = self.link.queue.get(self.node, [])
            if self.node in self.link.taken or not waiting:
                return None
            self.number, parcel = waiting.pop(0)
            self.link.taken[self.node], self.at = self.number, self.node
        return parcel

    def reply(self, header, body):
        with self.link.lock:
            del self.link.taken[self.at]
            self.link.replies[self.number] = Parcel(header, body, self.at)

    def kept(self):
        return {"number": self.number, "at": self.at}

    def restore(self, kept):
        self.number, self.at = kept["number"], kept["at"]

    def close(self):
        pass


@pytest.fixture
def link(monkeypatch):
    Grid.link = Behind.link = made = Link()
    monkeypatch.setattr(relay, "Grid", Grid)
    monkeypatch.setattr(relay, "Behind", Behind)
    for name, value in {"LOOK": 0.005, "HOLD": 0.2, "ALONE": 0.05, "FAREWELL": 0.2}.items():
        monkeypatch.setattr(relay, name, value)
    return made


class Heard:
    """A server that keeps what it was told, and answers each call with its bytes turned round."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bytes]] = []
        self.refuse = ""

    def __call__(self, method, site, data):
        self.calls.append((method, site, data))
        if self.refuse:
            raise MessageError(self.refuse)
        return data[::-1]


@contextmanager
def listening(link, heard, names=("north", "south"), pinned=None, limit=1000):
    made = GridListener(None, limit, heard, names, pinned or {})
    try:
        yield made
    finally:
        made.close()


@contextmanager
def line(folder: Path, node: int, name: str, link):
    folder.mkdir(exist_ok=True)
    link.online.append(node)
    made = NodeLine(Door(f"127.0.0.1:{node}", None, None), name, 10_000, folder)
    try:
        yield made
    finally:
        made.close()


def test_each_call_is_answered_and_a_report_goes_along_with_the_next(link, tmp_path):
    heard = Heard()
    with (
        listening(link, heard),
        line(tmp_path / "n", 1, "north", link) as north,
        line(tmp_path / "s", 2, "south", link) as south,
    ):
        assert north.call("join", b"abc", 5) == b"cba"
        assert south.call("join", b"xyz", 5) == b"zyx"
        north.call("report", b"what it made", 5)
        assert north.call("fetch", b"more", 5) == b"erom"
        assert not north.due
    assert [c for c in heard.calls if c[1] == "north"] == [
        ("join", "north", b"abc"),
        ("report", "north", b"what it made"),
        ("fetch", "north", b"more"),
    ]


def test_a_report_alone_does_not_wait_for_ever(link, tmp_path):
    heard = Heard()
    with listening(link, heard), line(tmp_path / "n", 1, "north", link) as north:
        north.call("report", b"r", 5)
        end = time.monotonic() + 5
        while not heard.calls and time.monotonic() < end:
            time.sleep(0.01)
    assert heard.calls == [("report", "north", b"r")]


def test_refusals_arrive_by_their_words_and_are_final(link, tmp_path, caplog):
    heard = Heard()
    with listening(link, heard), line(tmp_path / "n", 1, "north", link) as north:
        heard.refuse = "not this one"
        with pytest.raises(Refused, match="not this one"):
            north.call("join", b"a", 5)
        north.call("report", b"r", 5)
        heard.refuse = ""
        assert north.call("fetch", b"ab", 5) == b"ba"
        with pytest.raises(Refused, match="of 2,000 bytes"):
            north.call("join", b"x" * 2000, 5)


def test_an_answer_beyond_the_sites_own_limit_says_so_once(link, tmp_path):
    with (
        listening(link, lambda method, site, data: bytes(20_000)),
        line(tmp_path / "n", 1, "north", link) as north,
        pytest.raises(
            TooLarge, match=r"20,000 bytes, and this site takes 10,000 .*--max-megabytes"
        ),
    ):
        north.call("join", b"a", 5)


def test_what_a_server_missed_is_said_again_to_the_next(link, tmp_path):
    first, second = Heard(), Heard()
    with line(tmp_path / "n", 1, "north", link) as north:
        with listening(link, first) as early:
            assert north.call("join", b"ab", 5) == b"ba"
            early.ending = True  # it is killed: nobody looks for replies
            early.worker.join(5)
            answers: list[bytes] = []
            north.call("report", b"work", 5)
            waiting = threading.Thread(
                target=lambda: answers.append(north.call("fetch", b"cd", 20))
            )
            waiting.start()
            time.sleep(0.1)
            link.lost = True
        with listening(link, second):
            waiting.join(10)
    assert answers == [b"dc"]
    assert [c[0] for c in second.calls] == ["report", "fetch"]


def test_a_superlink_that_forgot_the_run_is_given_another(link, tmp_path):
    heard = Heard()
    with listening(link, heard), line(tmp_path / "n", 1, "north", link) as north:
        assert north.call("join", b"ab", 5) == b"ba"
        link.lost = True
        assert north.call("fetch", b"cd", 10) == b"dc"


def test_a_site_that_was_killed_with_a_message_lets_its_node_go_on(link, tmp_path):
    link.online.append(1)
    with listening(link, Heard()):
        killed = relay.Behind(Door("127.0.0.1:1", None, None))
        while killed.take() is None:
            time.sleep(0.005)
        (tmp_path / "n").mkdir()
        (tmp_path / "n/flower.json").write_text(json.dumps(killed.kept()))
        with line(tmp_path / "n", 1, "north", link) as again:
            assert again.call("join", b"cd", 10) == b"dc"
    assert not (tmp_path / "n/flower.json").exists()


def test_a_name_belongs_to_one_node_for_as_long_as_it_is_online(link, tmp_path, caplog):
    heard = Heard()
    with (
        listening(link, heard),
        line(tmp_path / "n", 1, "north", link) as north,
        line(tmp_path / "x", 3, "north", link) as other,
        line(tmp_path / "y", 4, "nobody", link) as stranger,
    ):
        assert north.call("join", b"ab", 5) == b"ba"
        with pytest.raises(Refused, match="not one of this run's sites"):
            stranger.call("join", b"cd", 9)
        with pytest.raises(Unreachable):
            other.call("join", b"cd", 0.5)
        assert "north is at node 1, which counts as online" in caplog.text
        link.online.remove(1)
        assert other.call("join", b"ef", 9) == b"fe"
    assert {c[2] for c in heard.calls} == {b"ab", b"ef"}


def test_a_process_is_known_again_behind_another_node(link, tmp_path):
    with listening(link, Heard()), line(tmp_path / "n", 1, "north", link) as north:
        assert north.call("join", b"ab", 5) == b"ba"
        link.online.append(5)  # its SuperNode was started again, and 1 counts as online for a while
        north.node.node = 5
        assert north.call("fetch", b"cd", 9) == b"dc"


def test_nodes_that_are_pinned_are_held_to_their_names(link, tmp_path):
    pinned = {"north": 1, "south": 2}
    with (
        listening(link, Heard(), pinned=pinned),
        line(tmp_path / "s", 1, "south", link) as wrong,
        line(tmp_path / "n", 2, "south", link) as right,
    ):
        with pytest.raises(Refused, match="south is not at node 1"):
            wrong.call("join", b"ab", 5)
        assert right.call("join", b"ab", 5) == b"ba"


@pytest.mark.parametrize(
    "words",
    [None, "x", [[1, "fetch"]], [["1", "fetch", 2]], [[1, "fetch", 3]], [[1, "fetch", -1]]],
    ids=["none", "text", "short", "number", "long", "negative"],
)
def test_calls_of_another_form_are_refused(words):
    with pytest.raises(MessageError, match="calls"):
        split(words, b"ab")
