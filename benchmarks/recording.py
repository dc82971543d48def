"""What recording a run costs: share of the processor time, bytes on disk, and what is paid once.

    python benchmarks/recording.py                    # the default job, which is private, everything on
    python benchmarks/recording.py --privacy none     # the same without privacy
    python benchmarks/recording.py --clients 1000     # 1,000 clients, 100 rounds, linear, not private

Processor time of the process, not wall time, so that other work on the machine does not count. The
baseline of the share is the same run: all it did, recording included.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtorch.commands.train import train_module
from fedtorch.run.versions import git_commit
from fedtorch.tracking.record import Record
from fedtorch.tracking.tensorboard.pictures import Pictures

MANY = ["--model", "logistic", "--partition", "iid", "--epochs", "1", "--checkpoint-every", "10"]


class Clock:
    """Processor seconds by name, spent inside wrapped functions; calls inside one another count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def add(self, name: str, seconds: float) -> None:
        """Count."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Count what a method spends."""
        real = getattr(owner, method)

        def timed(*args: Any) -> Any:
            if self.inside:
                return real(*args)
            self.inside, start = True, time.thread_time()
            try:
                return real(*args)
            finally:
                self.add(name, time.thread_time() - start)
                self.inside = False

        setattr(owner, method, timed)

    def wrap_drawing(self, rounds: int) -> None:
        """Count what the thread beside the training spends on pictures."""
        real = Record.picture

        def picture(
            self_: Record, tag: str, step: int, draw: Callable[..., bytes], *args: Any
        ) -> None:
            def timed(*inner: Any) -> bytes:
                start = time.thread_time()
                try:
                    return draw(*inner)
                finally:
                    name = {0: "once: first picture", rounds: "once: last pictures"}
                    self.add(name.get(step, "drawing"), time.thread_time() - start)

            real(self_, tag, step, timed, *args)

        Record.picture = picture  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--privacy")
    options = parser.parse_args()
    words = ["--privacy", options.privacy] if options.privacy else []
    if options.clients:
        words = [*MANY, "--privacy", "none", "--rounds", "100"]
        words += ["--clients", str(options.clients)]
    clock = Clock()
    clock.wrap_drawing(100 if options.clients else 30)
    for method in ("config", "text", "round", "__exit__"):
        clock.wrap(Record, method, "writing")
    clock.wrap(Pictures, "round", "writing")
    clock.wrap(Pictures, "sent", "writing")
    clock.wrap(Pictures, "start", "once: start")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train = train_module()
        loop = train.Server.round
        spent = []

        def timed_round(server: Any) -> Any:
            spent.append((time.process_time(), time.perf_counter()))
            return loop(server)

        train.Server.round = timed_round
        assert train.main([*words, "--run-dir", str(run)]) == 0
        end = time.process_time()
        events = sum(p.stat().st_size for p in run.rglob("*tfevents*"))
        lines = (run / "metrics.jsonl").stat().st_size
        points = sum(p.stat().st_size for p in (run / "projector").glob("*"))
    total, rounds = end - spent[0][0], len(spent)
    per_round = {k: v for k, v in clock.seconds.items() if not k.startswith("once")}
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.python_version()}",
        "commit": git_commit(),
        "command": words,
        "processor_seconds_per_round": round(total / rounds, 4),
        "logging_share": round(sum(per_round.values()) / total, 4),
        "share_by_part": {k: round(v / total, 4) for k, v in per_round.items()},
        "once_seconds": {k: round(v, 3) for k, v in clock.seconds.items() if k not in per_round},
        "bytes_per_round": {
            "event files": events // rounds,
            "metrics.jsonl": lines // rounds,
            "projector": points // rounds,
        },
        "bytes": events + lines + points,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
