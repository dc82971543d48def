"""What a homomorphic sum costs for 100,000 numbers: ``python -m benchmarks.he [CLIENTS]``, CPU seconds."""

import json
import sys
import time

import numpy as np

from fedtorch.secure.encryption import Adder, Holder, make_keys

NUMBERS = 100_000


def main(clients: int) -> None:
    secret, public = make_keys()
    client, server = Holder(secret), Adder(public)
    values = np.random.default_rng(0).uniform(-1, 1, (clients, NUMBERS))
    start = time.process_time()
    codes = [client.encrypt(v) for v in values]
    encrypted = time.process_time()
    total = server.add(codes)
    added = time.process_time()
    found = client.opened(total)
    opened = time.process_time()
    size = sum(map(len, codes[0]))
    print(
        json.dumps(
            {
                "clients": clients,
                "MB of one client": round(size / 1e6, 2),
                "times float32": round(size / 4 / NUMBERS, 1),
                "seconds to encrypt, one client": round((encrypted - start) / clients, 3),
                "seconds to add, all": round(added - encrypted, 3),
                "seconds to open": round(opened - added, 3),
                "largest error of the sum": float(np.abs(found - values.sum(0)).max()),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
