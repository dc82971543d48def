"""The smallest rounds: clients of 20 examples, a net 8-16-3 and steps of five, plain and at sample level.

    python -m benchmarks.smallest [CLIENTS] [ROUNDS]

Prints the fastest round and the middle one by the processor's clock: what of a round is no arithmetic.
"""

import sys
import time
import warnings

import torch
from torch import nn

from benchmarks.machine import machine
from fedtorch import Client, Recipe, Server
from fedtorch.privacy import SampleLevel

EXAMPLES, BATCH, WARM = 20, 5, 5


def server(clients: int, rounds: int, private: bool) -> Server:
    """Ready to train; four steps in either case."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = ((torch.randn(EXAMPLES, 8), torch.randint(3, (EXAMPLES,))) for _ in range(clients))
    rate, steps = BATCH / EXAMPLES, EXAMPLES // BATCH
    plan = SampleLevel(
        noise_multiplier=1.0, sample_rate=rate, steps=steps, batch_size=BATCH, rounds=rounds
    )
    recipe = Recipe(lr=0.1, batch_size=BATCH, privacy=plan if private else None)
    return Server(model, [Client(f"c{k}", d) for k, d in enumerate(data)], recipe)


def seconds(made: Server, rounds: int) -> list[float]:
    """Of each round, the fastest first."""
    found = []
    for _ in made.rounds(WARM):
        pass
    for _ in range(rounds):
        begin = time.process_time()
        made.round()
        found.append(time.process_time() - begin)
    return sorted(found)


def main() -> None:
    """Both kinds."""
    clients, rounds = (int(v) for v in [*sys.argv[1:], *("1", "300")[len(sys.argv) - 1 :]])
    torch.set_num_threads(1)
    print(machine())
    for name, private in (("plain", False), ("sample level", True)):
        found = seconds(server(clients, rounds + WARM, private), rounds)
        fast, middle = (1000 * found[k] for k in (0, rounds // 2))
        print(f"{name}: fastest {fast:.2f} ms, middle {middle:.2f} ms, of {clients} clients")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
