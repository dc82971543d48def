"""Why a line between site and server never opens: what its TLS says, in a sentence that names the file.

gRPC tells such a line from a server that is away by words alone, and tells nothing where the other side
hangs up on a certificate: then the line is tried once more, by Python's own TLS.
"""

import socket
import ssl
from pathlib import Path

from fedtorch.types import ConfigError

SECONDS = 5.0
"""How long a try takes at most."""


def check_usable(folder: Path) -> None:
    """Raises ConfigError where TLS cannot use the three files: gRPC ends the process over some."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    names = "key.pem and cert.pem"
    try:
        # a key under a password would be asked for on a screen that nobody watches
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem", password=lambda: b"")
        names = "ca.pem"
        context.load_verify_locations(folder / "ca.pem")
    except (ssl.SSLError, ValueError) as e:
        why = getattr(e, "reason", None) or e
        raise ConfigError(
            f"{folder}: {names} cannot be used ({why}): they must be whole, in PEM, and under no password; "
            "copy the folder again, or have fedtorch keys make it"
        ) from e


def check_authority(option: str, path: Path) -> None:
    """Raises ConfigError, naming the option, where TLS finds no certificate in the file."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as e:
        raise ConfigError(f"{option}: {path} holds no certificate (PEM) of an authority") from e


def why_closed(address: str, keys: Path | None, said: str) -> str:
    """Why no call will ever come through, by what gRPC ``said`` of one; nothing: it may yet."""
    host = address.rpartition(":")[0]
    if keys is None:
        return _speaks_tls(address) if "Socket closed" in said else ""
    if "Hostname Verification Check failed" in said:
        return (
            f"the server at {address} shows a certificate that is not for {host}: give --server the "
            "address that it was made for, or have one made for this (fedtorch keys --server)"
        )
    if "WRONG_VERSION_NUMBER" in said:
        return (
            f"the server at {address} speaks no TLS: it was started with --insecure, or is another"
        )
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return _unverified(address, keys, said.rpartition("CERTIFICATE_VERIFY_FAILED: ")[2])
    if "Socket closed" in said and _hangs_up(address, keys):
        return (
            f"the server at {address} does not take the certificate {keys / 'cert.pem'}: another authority "
            "than the server's ca.pem has signed it, or it is out of date by the server's clock; copy the "
            "three files from the folder of this site that fedtorch keys made with the server's"
        )
    return ""


def _unverified(address: str, keys: Path, why: str) -> str:
    shown = f"the server at {address} shows a certificate that"
    if "expired" in why or "not yet valid" in why:
        return (
            f"{shown} is not valid by this machine's clock: have another one made, or set the clock"
        )
    if "purpose" in why:
        return f"{shown} is a site's: give the server the folder that fedtorch keys made for it"
    return (
        f"{shown} {keys / 'ca.pem'} has not signed: its keys are of another authority, or it is "
        "another server; take this site's three files from where fedtorch keys made the server's"
    )


def _speaks_tls(address: str) -> str:
    try:
        with _opened(address, None):
            pass
    except OSError:
        return ""
    return f"the server at {address} speaks TLS alone: give --credentials FOLDER in place of --insecure"


def _hangs_up(address: str, keys: Path) -> bool:
    """Whether the server ends the line as soon as it has seen this side's certificate."""
    try:
        with _opened(address, keys) as line:
            # who takes it begins by its settings of HTTP/2
            return not line.recv(1)
    except ssl.SSLError as e:
        return "ALERT" in str(e.reason)
    except OSError:
        return False


def _opened(address: str, keys: Path | None) -> ssl.SSLSocket:
    """A line that trusts anybody, over which nothing is sent; raises OSError."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if keys is not None:
        context.load_cert_chain(keys / "cert.pem", keys / "key.pem")
    plain = socket.create_connection((host.strip("[]"), int(port)), SECONDS)
    try:
        return context.wrap_socket(plain)
    except BaseException:
        plain.close()
        raise
