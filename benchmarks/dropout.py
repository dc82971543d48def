"""Models with dropout: fast and general path against the bare loop, round by round in one process.

    python -m benchmarks.dropout --rounds 30

The 2NN with dropout of 0.5 behind both hidden layers, and the network of PyTorch's MNIST example; ten
clients of 60 examples, batches of 10. The private ones are with DP-SGD, their bare loop without, and
their general path is what the plan picks from Opacus. "without" is the same model with p = 0. All take
turns, and what is compared is the processor time of rounds that follow each other, as in
``benchmarks.general``.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.bare import Bare
from benchmarks.general import seconds
from benchmarks.ours import Ours
from benchmarks.workloads import MNIST, WORKLOADS, Problem, problem
from fedtorch import Local, seeds

KINDS = {"mlp": "w1", "cnn": "w2", "private": "w3", "private-cnn": "w2"}
"""Models, and the workloads they take the place of."""


@dataclass(frozen=True)
class Dropping(Problem):
    """A workload with another model."""

    kind: str = "mlp"
    rate: float = 1.0
    """What dropout's p is multiplied by."""

    def model(self) -> nn.Module:
        """Images of 28 x 28 pixels."""
        with seeds.seeded(self.seed + 1):
            return cnn(self.rate) if "cnn" in self.kind else mlp(self.rate)


def mlp(rate: float) -> nn.Module:
    """784-200-200-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Dropout(0.5 * rate), nn.Linear(200, 200),
        nn.ReLU(), nn.Dropout(0.5 * rate), nn.Linear(200, 10),
    )  # fmt: skip


def cnn(rate: float) -> nn.Module:
    """As in github.com/pytorch/examples/tree/main/mnist; cross entropy takes log-softmax as it is."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25 * rate), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5 * rate),
        nn.Linear(128, 10), nn.LogSoftmax(1),
    )  # fmt: skip


def compare(kind: str, rounds: int, mnist: Path) -> str:
    """A line of the table: medians in ms, and the median and quartiles of the ratios."""
    privacy = "sample" if "private" in kind else "none"
    work = replace(WORKLOADS[KINDS[kind]], rounds=rounds, privacy=privacy)
    made = problem(work, mnist)
    same = {k: getattr(made, k) for k in ("work", "shards", "test", "facts", "seed", "noise")}
    with_, without = (Dropping(**same, kind=kind, rate=rate) for rate in (1.0, 0.0))
    all_ = [
        Bare(with_),
        Ours(with_, engine=Local(solver="general")),
        Ours(with_, engine=Local(solver="fast")),
        Ours(without, engine=Local(solver="fast")),
    ]
    for one in all_:
        one.round()
    times = [[seconds(one.round) for one in all_] for _ in range(rounds)]
    middle = [f"{statistics.median(column) * 1e3:.1f}" for column in zip(*times, strict=True)]
    quartiles = (statistics.quantiles([t[0] / t[j] for t in times], n=4) for j in (1, 2))
    ratios = [f"{q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})" for q in quartiles]
    return f"| {' | '.join((kind, *middle, *ratios))} |"


def main() -> None:
    """Compare both models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--mnist", default=str(MNIST), help="folder of IDX files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | bare | general | fast | fast without | bare / general | bare / fast |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.models:
        print(compare(kind, options.rounds, Path(options.mnist)), flush=True)


if __name__ == "__main__":
    main()
