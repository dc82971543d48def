"""Engine flower: sites behind the SuperNodes of a Flower federation, and the server on its SuperLink.

No second port is opened and no code of a job is run; docs/flower.md says what Flower must be started with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedtorch import disk
from fedtorch.sites.handshakes import check_authority
from fedtorch.types import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from fedtorch.sites.relay import GridListener, NodeLine
    from fedtorch.sites.rpc import Handler
    from fedtorch.sites.superlink import Door

LOCAL = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Flower:
    """Calls go over Flower: of a server over its SuperLink, of a site over the SuperNode beside it."""

    address: str = ""
    """HOST:PORT of the SuperLink for a server, of its SuperNode's Runtime API for a site."""
    ca: str = ""
    """File with the certificate of the authority that signed theirs, PEM; none: no TLS, on this machine
    alone."""
    secret: str = ""
    """File with the secret that SuperLink or SuperNode was started with (--superexec-auth-secret-file)."""
    nodes: list[str] = field(default_factory=list)
    """Of a server: at which node each site is, north=8123,south=4711; none: the first that says so."""

    def __post_init__(self) -> None:
        """Refuse what cannot be reached."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(
                "engine.address must be HOST:PORT, of the SuperLink for a server, of the SuperNode for a "
                f"site, got {self.address!r}"
            )
        if not self.ca and host not in LOCAL:
            raise ConfigError(
                "without engine.ca only this machine can be reached (127.0.0.1:PORT), not "
                f"{self.address!r}: --engine.ca FILE is what flower-supernode takes as --root-certificates"
            )
        self.pinned()

    def pinned(self) -> dict[str, int]:
        """At which node each site is, by name."""
        found: dict[str, int] = {}
        for pair in self.nodes:
            name, _, node = pair.partition("=")
            if not name or not node.isdecimal():
                raise ConfigError(f"engine.nodes must be NAME=NODE,NAME=NODE, got {pair!r}")
            if name in found or int(node) in found.values():
                raise ConfigError(f"engine.nodes names {name} or its node twice")
            found[name] = int(node)
        return found

    def open(self, *_: Any) -> NoReturn:
        """Raises ConfigError: clients of a run in one place have no nodes."""
        raise ConfigError(
            "engine flower is for data that stays at its sites: fedtorch serve --engine flower "
            "--engine.address HOST:PORT, and fedtorch site beside each SuperNode (docs/flower.md)"
        )

    def listen(self, limit: int, handle: "Handler", names: Sequence[str]) -> "GridListener":
        """Begin a run at the SuperLink; raises ConfigError where there is none that lets us."""
        pinned = self.pinned()
        if pinned and (missing := [n for n in names if n not in pinned]):
            raise ConfigError(f"engine.nodes does not say at which node {missing[0]!r} is")
        relay = self._relay()
        try:
            return relay.GridListener(self.door(), limit, handle, names, pinned)  # type: ignore[no-any-return]
        except (relay.Unreachable, relay.Refused) as e:
            raise ConfigError(f"no run at the SuperLink: {e}") from e

    def line(self, site: str, limit: int, folder: Path) -> "NodeLine":
        """A site's line to the server."""
        return self._relay().NodeLine(self.door(), site, limit, folder)  # type: ignore[no-any-return]

    def door(self) -> "Door":
        """The address and what opens it; raises ConfigError for files that are not there."""
        from fedtorch.sites.superlink import Door

        authority = self._file("ca")
        if authority is not None:
            check_authority("engine.ca", Path(self.ca))
        return Door(self.address, authority, self._file("secret"))

    def _file(self, option: str) -> bytes | None:
        path = getattr(self, option)
        try:
            return disk.regular(Path(path)).read_bytes() if path else None
        except OSError as e:
            raise ConfigError(f"engine.{option} cannot be read: {disk.reason(e)}") from e

    def _relay(self) -> "ModuleType":
        try:
            from fedtorch.sites import relay
        except ImportError as e:
            raise ConfigError(
                f'engine flower needs Flower 1.41 or newer (pip install "fedtorch[flower]"): {e}'
            ) from e
        return relay
