"""Calls between site and server: gRPC over TLS, where both sides show a certificate.

Sites call, the server answers; it never calls a site, so a site opens no port. What is sent are the bytes
of ``fedtorch.engines.wire``: gRPC's own way of packing objects is not used. The one file that knows gRPC.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from fedtorch.engines.wire import MessageError
from fedtorch.types import ConfigError

SERVICE = "fedtorch.Sites"
METHODS = ("join", "fetch", "report")
SITE_HEADER = "fedtorch-site"
Handler = Callable[[str, str, bytes], bytes]
"""Method, name of the site, message -> answer; raises MessageError to refuse."""

FINAL = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Answers that trying again will not change; a server that is stopping says other things."""

log = logging.getLogger("fedtorch.sites")


class Unreachable(Exception):
    """The other side is not there, or the line broke; trying again may help."""


class Refused(Exception):
    """The other side said no, and why."""


class Listener:
    """The server's port."""

    def __init__(
        self, address: str, keys: Path | None, sites: int, limit: int, handle: Handler
    ) -> None:
        """Listen at HOST:PORT; without keys anybody can claim any name, so only on loopback."""
        # each site holds one call open while it waits for work
        pool = ThreadPoolExecutor(max_workers=2 * sites + 8, thread_name_prefix="fedtorch-site")
        self.server = grpc.server(
            pool,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        answer = _answerer(handle, secure=keys is not None)
        handlers = {m: grpc.unary_unary_rpc_method_handler(answer(m)) for m in METHODS}
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            if keys is None:
                self.port = self.server.add_insecure_port(loopback(address))
            else:
                key, own, authority = read_keys(keys)
                credentials = grpc.ssl_server_credentials([(key, own)], authority, True)
                self.port = self.server.add_secure_port(address, credentials)
        except RuntimeError as e:
            raise ConfigError(f"cannot listen at {address}: {e}") from e
        self.server.start()

    def close(self) -> None:
        """Let open calls finish for a moment, then stop."""
        self.server.stop(grace=1).wait()


class Line:
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
        if keys is None:
            self.channel = grpc.insecure_channel(loopback(address), options=options)
        else:
            key, own, authority = read_keys(keys)
            credentials = grpc.ssl_channel_credentials(authority, key, own)
            self.channel = grpc.secure_channel(address, credentials, options=options)

    def call(self, method: str, data: bytes, seconds: float) -> bytes:
        """One call; raises Unreachable or Refused."""
        ask = self.channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            return bytes(ask(data, timeout=seconds, metadata=self.metadata))
        except grpc.RpcError as e:
            said = f"{e.code().name}: {e.details()}"
            if e.code() in FINAL:
                raise Refused(e.details() or said) from e
            raise Unreachable(said) from e

    def close(self) -> None:
        """Hang up."""
        self.channel.close()


def _answerer(handle: Handler, secure: bool) -> Callable[[str], Any]:
    def method(name: str) -> Any:
        def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
            site = identity(context, secure)
            try:
                return handle(name, site, data)
            except PermissionError as e:
                log.warning("turned away %s at %s: %s", site, context.peer(), e)
                context.abort(grpc.StatusCode.PERMISSION_DENIED, str(e))
            except MessageError as e:
                log.warning("refused a message of %s: %s", site, e)
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
            raise AssertionError("abort raises")

        return answer

    return method


def identity(context: grpc.ServicerContext, secure: bool) -> str:
    """Whom the certificate names; on a line without one, who the caller says it is."""
    if secure:
        names = context.auth_context().get("x509_common_name", [])
        return names[0].decode(errors="replace") if len(names) == 1 else ""
    return str(dict(context.invocation_metadata()).get(SITE_HEADER, ""))


def read_keys(folder: Path) -> tuple[bytes, bytes, bytes]:
    """Own key, own certificate, and the authority that the other side must be signed by."""
    try:
        key, own, authority = ((folder / n).read_bytes() for n in ("key.pem", "cert.pem", "ca.pem"))
    except OSError as e:
        raise ConfigError(
            f"keys {str(folder)!r} must hold key.pem, cert.pem and ca.pem: {e.strerror} "
            f"({e.filename}); fedtorch keys makes them"
        ) from e
    if (folder / "key.pem").stat().st_mode & 0o077:
        raise ConfigError(f"{folder / 'key.pem'} can be read by others: chmod 600 it")
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
