"""Calls between site and server: gRPC over TLS, where both sides show a certificate.

Sites call, the server answers; it never calls a site, so a site opens no port. What is sent are the bytes
of ``fedtorch.engines.wire``: gRPC's own way of packing objects is not used. The one file that knows gRPC.
"""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from fedtorch import disk
from fedtorch.engines import wire
from fedtorch.engines.wire import MessageError
from fedtorch.sites.handshakes import check_usable, why_closed
from fedtorch.sites.keys import check_pair, common_name
from fedtorch.types import ConfigError

SERVICE = "fedtorch.Sites"
METHODS = ("join", "fetch", "report")
SITE_HEADER = "fedtorch-site"
Handler = Callable[[str, str, bytes], bytes]
"""Method, name of the site, message -> answer; raises MessageError to refuse."""

OPEN_CALLS = 4
"""Calls that one site may have open: one for work, one for a report, and those of a process that died."""
SPARE = 8
"""Threads that turn callers away."""
LONGEST_CALL = 900.0
"""Most seconds that a call may be given."""
LINES = 20

FINAL = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Answers that trying again will not change; a server that is stopping says other things."""

TOO_LARGE = re.compile(r"CLIENT: Received message larger than max \((\d+) vs")
"""What gRPC says of a message that this side will not take; the server has not refused anything."""

log = logging.getLogger("fedtorch.sites")


class Unreachable(Exception):
    """The other side is not there, or the line broke; trying again may help."""


class NeverOpens(Unreachable):
    """The two sides' keys do not fit: trying again will not help, and the sentence says why."""


class Refused(Exception):
    """The other side said no, and why."""


class TooLarge(Refused):
    """What the other side has to say is more than this side takes."""

    def __init__(self, size: int, limit: int) -> None:
        """Bytes that it has, and that are taken."""
        super().__init__(
            f"its message has {size:,} bytes, and this site takes {limit:,} at most: raise "
            "--max-megabytes, or take no part"
        )


class Listener:
    """The server's port.

    Who calls is known before anything of the call is read. A site has at most ``CALLS`` calls open, each
    with a deadline, and there is a thread for all of them: nobody who is not a site ever holds one, and no
    site can hold another's.
    """

    def __init__(
        self,
        address: str,
        keys: Path | None,
        sites: int,
        limit: int,
        handle: Handler,
        names: Sequence[str] | None = None,
    ) -> None:
        """Listen at HOST:PORT; without keys anybody can claim any name, so only on loopback.

        ``names`` are those of the ``sites`` that may call; none: all that the authority has signed.
        """
        threads = OPEN_CALLS * sites + SPARE
        pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="fedtorch-site")
        self.server = grpc.server(
            pool,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", 4 * OPEN_CALLS),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small bomb stays small
                ("grpc.keepalive_time_ms", 60_000),  # a site that is gone gives its calls back
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        self.desk = Desk(handle, names, secure=keys is not None)
        self.certificates = self.desk.certificates
        handlers = {m: grpc.stream_unary_rpc_method_handler(self.desk.answer(m)) for m in METHODS}
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            if keys is None:
                self.port = self.server.add_insecure_port(loopback(address))
            else:
                key, own, authority = read_keys(keys, serves=True)
                credentials = grpc.ssl_server_credentials([(key, own)], authority, True)
                self.port = self.server.add_secure_port(address, credentials)
        except RuntimeError as e:
            raise ConfigError(f"cannot listen at {address}: {e}") from e
        self.server.start()

    def close(self) -> None:
        """Let open calls finish for a moment, then stop."""
        self.server.stop(grace=1).wait()


class ServerLine:
    """A site's line to the server."""

    def __init__(self, address: str, keys: Path | None, site: str, limit: int) -> None:
        """Nothing is sent until the first call."""
        options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.max_reconnect_backoff_ms", 5_000),
        ]
        self.metadata = [(SITE_HEADER, site)]
        self.address, self.keys, self.limit = address, keys, limit
        self.answered = False
        """Whether the other side has ever said anything."""
        if keys is None:
            self.channel = grpc.insecure_channel(loopback(address), options=options)
        else:
            key, own, authority = read_keys(keys)
            credentials = grpc.ssl_channel_credentials(authority, key, own)
            self.channel = grpc.secure_channel(address, credentials, options=options)

    def call(self, method: str, data: bytes, seconds: float) -> bytes:
        """One call; raises Unreachable (NeverOpens, where it will stay so) or Refused."""
        ask = self.channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer = bytes(ask(data, timeout=seconds, metadata=self.metadata))
        except grpc.RpcError as e:
            said = wire.printable(f"{e.code().name}: {e.details()}")
            if found := TOO_LARGE.search(str(e.details())):
                raise TooLarge(int(found[1]), self.limit) from e
            if e.code() in FINAL:
                raise Refused(said.partition(": ")[2] or said) from e
            why = why_closed(self.address, self.keys, str(e.details()))
            if why and not self.answered:
                raise NeverOpens(why) from e
            # a line that was open once is tried again: it is who came between that does not fit
            raise Unreachable(why or said) from e
        self.answered = True
        return answer

    def close(self) -> None:
        """Hang up."""
        self.channel.close()


class Desk:
    """Takes calls: identifies the caller, finds room, reads one message and answers it."""

    def __init__(self, handle: Handler, names: Sequence[str] | None, secure: bool) -> None:
        """Nobody is there yet."""
        self.handle, self.names, self.secure = handle, names, secure
        self.open: Counter[str] = Counter()
        self.certificates: dict[str, bytes] = {}
        """What each site has shown last, PEM; "" on a line without."""
        self.lock = threading.Lock()
        self.quiet = Quiet()

    def answer(self, method: str) -> Callable[..., bytes]:
        """What gRPC calls in a thread of its own; ``messages`` has been sent or not, nothing is read."""

        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            site, shown = identity(context, self.secure)
            try:
                with self._place(site, context):
                    self.certificates[site] = shown
                    return self.handle(method, site, _only(messages))
            except PermissionError as e:
                self.quiet.warn("", f"turned away {site or 'somebody'} at {context.peer()}: {e}")
                context.abort(grpc.StatusCode.PERMISSION_DENIED, str(e))
            except Busy as e:
                self.quiet.warn(site, f"no room for a call of {site}: {e}")
                context.abort(grpc.StatusCode.UNAVAILABLE, str(e))
            except MessageError as e:
                self.quiet.warn(site, f"refused a message of {site}: {e}")
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
            raise AssertionError("abort raises")

        return call

    @contextmanager
    def _place(self, site: str, context: grpc.ServicerContext) -> Iterator[None]:
        if not site or (self.names is not None and site not in self.names):
            raise PermissionError(f"{wire.short(site)} is not one of this run's sites")
        left = context.time_remaining()
        if left is None or left > LONGEST_CALL:
            raise MessageError(f"a call without a deadline of at most {LONGEST_CALL:g} s")
        with self.lock:
            if self.open[site] >= OPEN_CALLS:
                raise Busy(f"it has {OPEN_CALLS} calls open")
            self.open[site] += 1
        try:
            yield
        finally:
            with self.lock:
                self.open -= Counter([site])


class Busy(Exception):
    """A site has more calls open than it needs."""


class Quiet:
    """Warnings, of which nobody can cause more than ``LINES`` a minute."""

    def __init__(self) -> None:
        """Nothing said yet."""
        self.said: dict[str, list[float]] = {}
        self.lock = threading.Lock()

    def warn(self, who: str, text: str) -> None:
        """Log ``text`` unless ``who`` has filled the log enough; what was left out is counted."""
        now = time.monotonic()
        with self.lock:
            since, count = self.said.get(who, (now, 0))
            if now - since > 60:
                since, count, left = now, 0, int(count) - LINES
                text += f" ({left} more in the minute before)" if left > 0 else ""
            self.said[who] = [since, count + 1]
        if count < LINES:
            log.warning("%s", text)


def _only(messages: Iterator[bytes]) -> bytes:
    """The one message of a call; the caller's deadline ends the wait for it."""
    try:
        return next(messages)
    except StopIteration:
        raise MessageError("a call without a message") from None


def identity(context: grpc.ServicerContext, secure: bool) -> tuple[str, bytes]:
    """Whom the certificate names, and it; on a line without one, who the caller says it is."""
    if secure:
        shown = context.auth_context().get("x509_pem_cert", [])
        return (common_name(shown[0]), bytes(shown[0])) if len(shown) == 1 else ("", b"")
    return str(dict(context.invocation_metadata()).get(SITE_HEADER, "")), b""


def read_keys(folder: Path, serves: bool = False) -> tuple[bytes, bytes, bytes]:
    """Own key, own certificate, and the authority that the other side must be signed by.

    ``serves``: as a server's; else as a site's.
    """
    try:
        key, own, authority = (
            disk.regular(folder / n).read_bytes() for n in ("key.pem", "cert.pem", "ca.pem")
        )
    except OSError as e:
        raise ConfigError(
            f"keys {str(folder)!r} must hold key.pem, cert.pem and ca.pem: {e.strerror} "
            f"({e.filename}); fedtorch keys makes them"
        ) from e
    if (folder / "key.pem").stat().st_mode & 0o077:
        raise ConfigError(f"{folder / 'key.pem'} can be read by others: chmod 600 it")
    check_pair(folder, key, own, serves)
    check_usable(folder)
    return key, own, authority


def loopback(address: str) -> str:
    """The address, if it is on this machine; raises ConfigError otherwise."""
    host = address.rpartition(":")[0]
    if host not in ("127.0.0.1", "localhost", "[::1]"):
        raise ConfigError(
            f"without keys only this machine can be reached (127.0.0.1:PORT), not {address!r}; "
            "fedtorch keys makes certificates"
        )
    return address
