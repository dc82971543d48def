"""The server's port: who calls is known before anything is read, and nobody can take a site's place."""

import itertools
import logging
import threading
import time
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtorch.engines.wire import MessageError
from fedtorch.sites import keys, rpc
from fedtorch.sites.rpc import (
    LINES,
    OPEN_CALLS,
    SPARE,
    Listener,
    Quiet,
    Refused,
    ServerLine,
    TooLarge,
    Unreachable,
)

pytestmark = pytest.mark.timeout(120)
NAMES = ["north", "south"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    keys.make(folder, ["localhost", "127.0.0.1"], [*NAMES, "stranger"], 2)
    return folder


@pytest.fixture
def listener(folder):
    """Answers with the name of the caller; ``fetch`` waits until it is let go."""
    go = threading.Event()

    def handle(method, site, data):
        if method == "fetch":
            go.wait(30)
        if data == b"wrong":
            raise MessageError("this is wrong")
        return site.encode() + b":" + data

    made = Listener("127.0.0.1:0", folder / "server", len(NAMES), 1 << 20, handle, NAMES)
    made.go = go
    yield made
    go.set()
    made.close()


@pytest.fixture
def line(folder, listener):
    """Lines to the listener, closed at the end."""
    made = []

    def to(which, name=None):
        made.append(
            ServerLine(f"127.0.0.1:{listener.port}", folder / which, name or which, 1 << 24)
        )
        return made[-1]

    yield to
    for one in made:
        one.close()


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def silent(line, many, halt, seconds=60.0):
    """Calls that are opened and never send their message."""

    def nothing():
        halt.wait()
        return
        yield b""

    ask = line.channel.stream_unary("/fedtorch.Sites/join")
    return [ask.future(nothing(), timeout=seconds) for _ in range(many)]


def test_an_answer_beyond_the_sites_own_limit_is_no_refusal_of_the_servers(folder, listener):
    line = ServerLine(f"127.0.0.1:{listener.port}", folder / "north", "north", 1000)
    with pytest.raises(TooLarge, match=r"1,506 bytes, and this site takes 1,000 .*--max-megabytes"):
        line.call("join", bytes(1500), 10)
    line.close()


def test_a_stranger_is_turned_away_before_anything_of_its_call_is_read(listener, line):
    halt = threading.Event()
    many = 3 * OPEN_CALLS  # on one line, which takes four times CALLS
    calls = [c for _ in range(3) for c in silent(line("stranger"), many, halt)]
    assert len(calls) > OPEN_CALLS * len(NAMES) + SPARE
    began = time.monotonic()
    for call in calls:  # none has sent a byte of its message
        assert call.code() == grpc.StatusCode.PERMISSION_DENIED
    assert time.monotonic() - began < 20
    halt.set()
    # claiming a name changes nothing: the certificate says who calls
    with pytest.raises(Refused, match="not one of this run's sites"):
        line("stranger", "north").call("join", b"x", 10)


def test_a_site_that_holds_calls_open_takes_no_other_sites_place(listener, line):
    halt, evil, honest = threading.Event(), line("south"), line("north")
    calls = silent(evil, 3 * OPEN_CALLS, halt)
    until(lambda: sum(c.done() for c in calls) == 2 * OPEN_CALLS)
    refused, held = [[c for c in calls if c.done() is d] for d in (True, False)]
    assert {c.code() for c in refused} == {grpc.StatusCode.UNAVAILABLE}
    with pytest.raises(Unreachable, match=f"{OPEN_CALLS} calls open"):
        line("south").call("join", b"x", 10)
    for k in range(20):
        assert honest.call("join", b"%d" % k, 10) == b"north:%d" % k
    halt.set()
    for call in held:  # closed without a message
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert line("south").call("join", b"y", 10) == b"south:y"


def test_a_site_may_wait_for_work_and_report_at_once(listener, line):
    waiting, done = [line("north") for _ in range(OPEN_CALLS - 1)], []
    for one in waiting:
        call = threading.Thread(target=lambda one=one: done.append(one.call("fetch", b"", 30)))
        call.start()
    assert line("north").call("report", b"r", 10) == b"north:r"
    listener.go.set()
    until(lambda: len(done) == len(waiting))
    assert done == [b"north:"] * len(waiting)


def test_every_call_has_a_deadline_that_the_server_keeps(listener, line):
    north, halt = line("north"), threading.Event()
    ask = north.channel.unary_unary("/fedtorch.Sites/join")
    for seconds in (None, rpc.LONGEST_CALL + 60):
        with pytest.raises(grpc.RpcError) as e:
            ask(b"x", timeout=seconds)
        assert "deadline" in e.value.details()
    (call,) = silent(north, 1, halt, seconds=0.5)
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: not listener.desk.open)  # the server has its place back
    halt.set()


def test_small_bombs_stay_small(listener, folder):
    key, own, authority = rpc.read_keys(folder / "north")
    credentials = grpc.ssl_channel_credentials(authority, key, own)
    options = [("grpc.max_send_message_length", -1)]
    channel = grpc.secure_channel(
        f"127.0.0.1:{listener.port}", credentials, options, grpc.Compression.Gzip
    )
    for size in (1 << 10, 1 << 24):  # even where it would fit: what is packed is not unpacked
        with pytest.raises(grpc.RpcError) as e:
            channel.unary_unary("/fedtorch.Sites/join")(bytes(size), timeout=20)
        assert e.value.code() == grpc.StatusCode.UNIMPLEMENTED
    channel.close()


def test_nobody_fills_the_log(caplog, monkeypatch):
    clock = itertools.count(0, 0.5)
    monkeypatch.setattr(rpc.time, "monotonic", lambda: next(clock))
    quiet = Quiet()
    with caplog.at_level(logging.WARNING):
        for k in range(150):  # 75 seconds
            quiet.warn("north", f"north again, {k}")
        quiet.warn("south", "south for the first time")
    lines = [r.message for r in caplog.records]
    assert lines[:LINES] == [f"north again, {k}" for k in range(LINES)]
    assert lines[LINES] == f"north again, 121 ({121 - LINES} more in the minute before)"
    assert lines[-1] == "south for the first time" and len(lines) <= 2 * LINES + 1


def certificate(*names) -> bytes:
    own, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "CN=south, Inc")]
    parts += [x509.NameAttribute(NameOID.COMMON_NAME, n) for n in names]
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(parts))
        .issuer_name(x509.Name(parts))
        .public_key(own.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(own, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_certificate_has_one_common_name_and_it_is_a_sites():
    assert keys.common_name(certificate("north")) == "north"
    assert keys.common_name(certificate("fed-1.example_x")) == "fed-1.example_x"
    for names in (
        (),
        ("north", "south"),
        ("north", "north"),
        ("north\0",),
        ("north\0.example",),
        (" north",),
        ("north\n",),
        ("n\u043erth",),
        ("north,CN=south",),
        ("x=north",),
        ("north/south",),
    ):
        assert keys.common_name(certificate(*names)) == ""
    assert keys.common_name(b"no certificate") == ""
