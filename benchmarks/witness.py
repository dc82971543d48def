"""The ``fedtorch`` command with a witness inside: ``python -m benchmarks.witness NOTES COMMAND ...``.

The process does what ``fedtorch COMMAND ...`` does. Beside that, NOTES gets ``pid``, ``opened.txt`` (every
file that Python opens, noted by an audit hook, which nothing in the process can take off again) and, where
it is a server, ``received.jsonl`` (every message from a site, byte for byte as it came out of TLS).
"""

import base64
import json
import os
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


if __name__ == "__main__":
    notes = Path(sys.argv[1])
    notes.mkdir(parents=True, exist_ok=True)
    note_opened(notes / "opened.txt")
    if sys.argv[2] == "serve":
        note_received(notes / "received.jsonl")
    (notes / "pid").write_text(str(os.getpid()))
    sys.exit(main(sys.argv[2:]))
