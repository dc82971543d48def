"""What a sum under masks costs: ``python -m benchmarks.secure [--flower PYTHON]``.

Processor seconds of one client and of the server, and bytes, for n clients and d numbers. One client runs
in full, its keys and shares checked, masked, confirmed and opened, with signatures of ECDSA P-256; what the
others send it is made beside. The server's seconds are those of its parts, each timed, times their number
when a tenth of the clients drop out after they have sent shares. ``PYTHON`` is one in which flwr 1.41 is
installed: its own client code is given the same work (``peer_flower_masks.py``).
"""

import argparse
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from fedtorch.secure import costs, shamir, streams
from fedtorch.secure.client import SecureClient
from fedtorch.secure.encode import Coding, Figures, seal, to_words
from fedtorch.secure.opening import Joiner
from fedtorch.secure.primitives import KeyPair, box, derive
from fedtorch.secure.protocol import (
    Boxes,
    Confirmations,
    Roll,
    Survivors,
    survivors_stated,
)
from fedtorch.secure.roster import Member, Terms, default_threshold

CASES = [
    # clients, neighbours, numbers, bits
    (10, None, 100_000, 32),
    (10, None, 1_000_000, 32),
    (100, None, 100_000, 32),
    (100, None, 1_000_000, 32),
    (500, None, 100_000, 32),
    (500, None, 1_000_000, 32),
    (500, 100, 100_000, 32),
    (500, 100, 1_000_000, 32),
    (10, None, 425_335, 32),  # a model of 1.7 MB
    (10, None, 425_335, 64),
    (10, None, 11_180_000, 32),  # and of 45 MB
    (10, None, 11_180_000, 64),
]
GONE = 0.1
PEER = Path(__file__).parent / "peer_flower_masks.py"


class Site:
    """Somebody with a key to sign with."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.public = self.key.public_key()

    def sign(self, statement: bytes) -> bytes:
        """ECDSA over SHA-256."""
        return self.key.sign(statement, ec.ECDSA(SHA256()))

    def signed(self, statement: bytes, signature: bytes) -> bool:
        """Whether it has signed this."""
        try:
            self.public.verify(signature, statement, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


def timed(work: Callable[[], Any], into: dict[str, float], name: str) -> Any:
    """What ``work`` returns; its processor milliseconds are added under ``name``."""
    start = time.process_time()
    found = work()
    into[name] = into.get(name, 0.0) + (time.process_time() - start) * 1e3
    return found


def case(n: int, neighbours: int | None, d: int, width: int) -> dict[str, Any]:
    """One row of the table."""
    sites = [Site() for _ in range(n)]
    members = tuple(Member(f"site{k}", hashlib.sha256(k.to_bytes(4)).digest()) for k in range(n))
    coding = Coding.of(width, n, 1.0 if width == 32 else None)
    near = min(n - 1, neighbours or n)
    values = np.random.default_rng(0).uniform(-1, 1, d)
    ms: dict[str, float] = {}
    words = timed(
        lambda: to_words(seal(coding, values, Figures(0.5, 100, 1.0)), width), ms, "encode"
    )
    terms = Terms(
        run="run",
        round=0,
        attempt=bytes(16),
        task=bytes(32),
        members=members,
        threshold=default_threshold(near + 1) if neighbours is None else 58,
        width=width,
        range=coding.range,
        scale=coding.scale,
        size=len(words),
        neighbours=neighbours,
    )
    verifying = {"ms": 0.0}

    def verify(place: int, statement: bytes, signature: bytes) -> bool:
        return bool(timed(lambda: sites[place].signed(statement, signature), verifying, "ms"))

    def client(place: int) -> SecureClient:
        return SecureClient(terms, place, sites[place].sign, verify)

    others = [client(k) for k in range(1, n)]
    mine = timed(lambda: client(0), ms, "keys")
    keys = {0: timed(mine.keys, ms, "keys")} | {c.place: c.keys() for c in others}
    own = timed(lambda: mine.shares(Roll(keys)), ms, "shares")
    delivery = {j: _box(others[j - 1], mine, terms) for j in own.boxes}
    timed(lambda: mine.masked(Boxes(delivery), words), ms, "masked")
    everyone = Survivors(tuple(range(n)))
    signature = timed(lambda: mine.confirm(everyone), ms, "confirm").signature
    stated = survivors_stated(terms, everyone.places)
    signatures = {j: sites[j].sign(stated) for j in own.boxes}
    opened = timed(lambda: mine.open(Confirmations(signatures)), ms, "open")
    up = 96 + len(keys[0].signature) + sum(map(len, own.boxes.values()))
    up += len(signature) + shamir.SIZE * (len(opened.seeds) + len(opened.masks))
    cost = costs.cost_of(n, n, near, terms.threshold, len(words), width)
    client_ms = sum(ms.values())
    return {
        "clients": n,
        "neighbours": near,
        "threshold": terms.threshold,
        "numbers": d,
        "width": width,
        "client_ms": round(client_ms, 1),
        "of_it_signatures_ms": round(verifying["ms"], 1),
        "of_it": {k: round(v, 1) for k, v in ms.items()},
        "server_s": round(server(terms, near, sites[0]), 3),
        "protocol_up_kB": round(up / 1e3, 1),
        "protocol_down_kB": round(cost.down / 1e3, 1),
        "vector_MB": round(words.nbytes / 1e6, 2),
    }


def _box(sender: SecureClient, receiver: SecureClient, terms: Terms) -> bytes:
    """What a neighbour seals, with shares of nothing."""
    way = f"box {sender.place}>{receiver.place}"
    shared = sender._box.agree(receiver._box.public)
    share = shamir.to_bytes(secrets.randbelow(shamir.PRIME))
    return box(derive(shared, way, terms.context), 2 * share, terms.context + way.encode())


def server(terms: Terms, near: int, site: Site) -> float:
    """Seconds: signatures, every vector added, every secret joined, masks taken off."""
    n, t = len(terms.members), terms.threshold
    gone = int(GONE * n)
    alive = n - gone
    dtype = np.uint64 if terms.width == 64 else np.uint32
    total, some, tries = np.zeros(terms.size, dtype), np.ones(terms.size, dtype), 10
    ms: dict[str, float] = {}
    signature = site.sign(b"statement")
    for _ in range(tries):
        timed(lambda: site.signed(b"statement", signature), ms, "verify")
        timed(lambda: np.add(total, some, out=total), ms, "add")
    keys = [(os.urandom(32), 1) for _ in range(tries)]
    timed(lambda: streams.add(total, keys), ms, "stream")
    pair, other = KeyPair(os.urandom(32)), KeyPair(os.urandom(32)).public
    for _ in range(tries):
        timed(lambda: derive(pair.agree(other), "pair", terms.context), ms, "agree")
    shares = {k: shamir.to_bytes(secrets.randbelow(shamir.PRIME // 2)) for k in range(t)}
    joiner = Joiner(t)
    timed(lambda: joiner.join(0, shares, lambda secret: True), ms, "first")
    for _ in range(tries):
        timed(lambda: joiner.join(0, shares, lambda secret: True), ms, "join")
    one = {k: v / tries for k, v in ms.items()} | {"first": ms["first"]}
    # on the whole graph all secrets are joined of the same helpers; on a ring each of its own
    sets = 1 if near == n - 1 else n
    found = (n + alive) * one["verify"] + alive * one["add"] + sets * one["first"] + n * one["join"]
    found += alive * one["stream"] + gone * near * (one["stream"] + one["agree"])
    return found / 1e3


def main() -> None:
    """Print a line of JSON for each case."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--flower", help="a Python in which flwr 1.41 is installed")
    asked.add_argument("--most", type=int, default=500, help="leave out cases of more clients")
    given = asked.parse_args()
    case(3, None, 1000, 32)  # what is done once in a process is nobody's cost
    for n, neighbours, d, width in CASES:
        if n > given.most:
            continue
        print(json.dumps({"who": "fedtorch"} | case(n, neighbours, d, width)), flush=True)
        near = min(n - 1, neighbours or n)
        if given.flower and width == 32 and (n < 500 or neighbours):
            t = default_threshold(n) if neighbours is None else 58
            command = [given.flower, str(PEER), *map(str, (n, near, t, d))]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                sys.exit(f"flwr did not run: {made.stderr[-500:]}")
            print(
                json.dumps({"who": "flwr"} | json.loads(made.stdout.splitlines()[-1])), flush=True
            )


if __name__ == "__main__":
    main()
