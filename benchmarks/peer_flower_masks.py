"""One client of Flower's SecAgg+, by its own code: ``PYTHON peer_flower_masks.py n neighbours t d``.

Runs where flwr 1.41 is installed, and needs nothing of fedtorch. It calls the steps of flwr's client with
messages that are prepared beside; the server's seconds are its joining of shares and its mask generator,
times how often the protocol needs them when a tenth of the clients drop out.
"""

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

logging.disable(logging.CRITICAL)


def main(n: int, near: int, threshold: int, d: int) -> dict[str, Any]:
    """Processor milliseconds of the client, seconds of the server, and bytes."""
    root = "flwr.common.secure_aggregation"
    mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    key = importlib.import_module(f"{root}.secaggplus_constants").Key
    utils = importlib.import_module(f"{root}.secaggplus_utils")
    shamir = importlib.import_module(f"{root}.crypto.shamir")
    to_parameters = importlib.import_module("flwr.common").ndarrays_to_parameters
    spent = {"ms": 0.0}

    def timed(work: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = work()
        spent["ms"] += (time.process_time() - start) * 1e3
        return found

    state, ids = mod.SecAggPlusState(), [*range(2, near + 2)]
    state.nid = 1
    setup = {
        key.SAMPLE_NUMBER: n,
        key.SHARE_NUMBER: near + 1,
        key.THRESHOLD: threshold,
        key.CLIPPING_RANGE: 8.0,
        key.TARGET_RANGE: 1 << 22,
        key.MOD_RANGE: 1 << 32,
        key.MAX_WEIGHT: 1000.0,
    }
    timed(lambda: mod._setup(state, setup))
    others = {i: (mod.generate_key_pairs(), mod.generate_key_pairs()) for i in ids}
    keys = {"1": [state.pk1, state.pk2]}
    keys |= {
        str(i): [mod.public_key_to_bytes(a[1]), mod.public_key_to_bytes(b[1])]
        for i, (a, b) in others.items()
    }
    boxes = timed(lambda: mod._share_keys(state, keys))
    share = state.rd_seed_share_dict[1]
    own = mod.bytes_to_public_key(state.pk2)
    came = [
        mod.encrypt(
            mod.generate_shared_key(b[0], own),
            utils.share_keys_plaintext_concat(i, 1, share, share),
        )
        for i, (_, b) in others.items()
    ]
    update = to_parameters([np.random.default_rng(0).standard_normal(d).astype(np.float32)])
    given = {key.CIPHERTEXT_LIST: came, key.SOURCE_LIST: ids}
    sent = timed(lambda: mod._collect_masked_vectors(state, given, 100, update))
    client = spent["ms"]
    shares = shamir.create_shares(os.urandom(32), threshold, near + 1)
    spent["ms"] = 0.0
    timed(lambda: shamir.combine_shares(shares[:threshold]))
    joined, spent["ms"] = spent["ms"], 0.0
    timed(lambda: utils.pseudo_rand_gen(os.urandom(32), 1 << 32, [(d,)]))
    stream, gone = spent["ms"], n // 10
    server = n * joined + (n - gone + gone * near) * stream
    return {
        "clients": n,
        "neighbours": near,
        "threshold": threshold,
        "numbers": d,
        "client_ms": round(client, 1),
        "server_s": round(server / 1e3, 2),
        "protocol_up_kB": round((sum(map(len, boxes[key.CIPHERTEXT_LIST])) + 128) / 1e3, 1),
        "vector_MB": round(sum(map(len, sent[key.MASKED_PARAMETERS])) / 1e6, 2),
    }


if __name__ == "__main__":
    main(4, 3, 2, 1000)  # what is done once in a process is nobody's cost
    print(json.dumps(main(*map(int, sys.argv[1:]))))
