"""The ``fedtorch`` command with a witness inside: ``python -m benchmarks.witness NOTES COMMAND ...``.

The process does what ``fedtorch COMMAND ...`` does. Beside that, NOTES gets ``pid``, ``opened.txt`` (every
file that Python opens, noted by an audit hook, which nothing in the process can take off again) and, where
it is a server, ``received.jsonl`` (every message from a site, byte for byte as it came out of TLS). Where
there is a ``dies.json``, it kills itself in the phases of secure rounds that are listed there.
"""

import base64
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fedtorch.__main__ import main
from fedtorch.engines import wire

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def note_opened(path: Path) -> None:
    """Note every file from now on; processes that come later under the same name add to the list."""
    file = os.open(path, APPEND, 0o600)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            os.write(file, os.path.realpath(os.fsdecode(args[0])).encode() + b"\n")

    sys.addaudithook(hook)


def note_received(path: Path) -> None:
    """Note every message a server takes, with the kind and round of its answer."""
    from fedtorch.sites.engine import SitesSession

    file, handle = os.open(path, APPEND, 0o600), SitesSession.handle

    def noted(self: SitesSession, method: str, site: str, data: bytes) -> bytes:
        said: dict[str, Any] = {"answer": "refused"}
        try:
            answer = handle(self, method, site, data)
            message = wire.decode(answer)
            said = {"answer": message.kind, "given": message.facts.get("round")}
            return answer
        finally:
            line = {"method": method, "site": site, "data": base64.b64encode(data).decode()} | said
            os.write(file, json.dumps(line).encode() + b"\n")

    SitesSession.handle = noted  # type: ignore[method-assign]


def die_when_told(path: Path) -> None:
    """Kill -9 of this process where ``path`` says: a list of [phase, round] of secure rounds, once each.

    A site dies before it sends what is due in the phase, the server when all that was due has come.
    """
    from fedtorch.secure.server import SecureServer
    from fedtorch.sites.masks import Party

    def due(phase: str, round: int) -> None:
        left = json.loads(path.read_text())
        if [phase, round] in left:
            left.remove([phase, round])
            path.write_text(json.dumps(left))
            os.kill(os.getpid(), signal.SIGKILL)

    begin, go_on, close = Party.begin, Party.go_on, SecureServer.close

    def begun(self: Party, update: Any) -> Any:
        due("keys", self.task.round)
        return begin(self, update)

    def gone_on(self: Party, message: Any) -> Any:
        due(self.half.phase, self.task.round)
        return go_on(self, message)

    def closed(self: SecureServer) -> Any:
        due(self.phase, self.terms.round)
        return close(self)

    Party.begin, Party.go_on = begun, gone_on  # type: ignore[method-assign]
    SecureServer.close = closed  # type: ignore[method-assign]


if __name__ == "__main__":
    notes = Path(sys.argv[1])
    notes.mkdir(parents=True, exist_ok=True)
    note_opened(notes / "opened.txt")
    if sys.argv[2] == "serve":
        note_received(notes / "received.jsonl")
    if (notes / "dies.json").exists():
        die_when_told(notes / "dies.json")
    (notes / "pid").write_text(str(os.getpid()))
    sys.exit(main(sys.argv[2:]))
