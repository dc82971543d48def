"""Many sites and three enemies: ``python -m benchmarks.sites_hostile --sites 30 --rounds 200``.

A real server (``fedtorch serve``, TLS) and light sites that speak the protocol. Meanwhile a stranger, whose
certificate the authority signed and the server does not list, opens calls that never send their message,
claims other names and sends garbage; one listed site sends what it should not, and another holds calls
open. In every round every honest site must report and nobody else count; the server must end with
exit code 0, without a traceback, and with the memory it had.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.hospitals_checks import demand
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message
from fedtorch.sites import keys
from fedtorch.sites.rpc import Refused, ServerLine, Unreachable

EVIL, HOLDER, STRANGER = "y-evil", "z-holder", "stranger"
FIGURES = ("train_loss", "update_norm", "examples", "visited", "steps")
Change = Callable[[dict[str, Any], dict[str, Any]], Any]
WRONG: list[Change] = [
    lambda f, g: next(iter(g["sent/delta"].values())).fill_(float("nan")),
    lambda f, g: next(iter(g["sent/delta"].values())).fill_(1e300),
    lambda f, g: g[""].update(weight=torch.full((1,), 1e9)),
    lambda f, g: g["metrics"].clear(),
    lambda f, g: g["metrics"].update(examples=torch.full((1,), -1.0)),
    lambda f, g: g["metrics"].update(extra=torch.ones(1)),
    lambda f, g: g.update({"sent/x": {"a": torch.ones(1)}}),
    lambda f, g: f.update(ids=["s000"]),
    lambda f, g: f.update(round=f["round"] + 1),
    lambda f, g: f.update(failures=[[]] * 400),
]


class Federation:
    """Keys, a server process, and lines to it."""

    def __init__(self, folder: Path, sites: int, rounds: int) -> None:
        """Start the server."""
        self.names = [f"s{k:03d}" for k in range(sites)]
        self.folder, self.over = folder, threading.Event()
        self.port = 40_000 + time.time_ns() % 20_000
        keys.make(folder / "keys", ["127.0.0.1"], [*self.names, EVIL, HOLDER, STRANGER], 2)
        self.heard: Counter = Counter()
        words = [
            "--sites",
            ",".join([*self.names, EVIL, HOLDER]),
            "--address",
            f"127.0.0.1:{self.port}",
        ]
        words += ["--credentials", str(folder / "keys/server"), "--run-dir", str(folder / "run")]
        words += ["--input-shape", "[6]", "--model", "mlp", "--privacy", "none", "--deadline", "60"]
        words += ["--rounds", str(rounds), "--minimum", str(sites), "--enough", str(sites)]
        self.log = (folder / "log").open("wb")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "fedtorch", "serve", *words], stdout=self.log, stderr=self.log
        )

    def line(self, who: str, name: str = "") -> ServerLine:
        """A line with the certificate of ``who``."""
        return ServerLine(f"127.0.0.1:{self.port}", self.folder / "keys" / who, name or who, -1)

    def site(self, name: str, change: Change | None = None) -> None:
        """Work until the run is over; with ``change`` on every report, and then it must be refused."""
        line, run = self.line(name), None
        while not self.over.is_set():
            try:
                run = run or self.ask(line, "join").facts["plan"]["run"]
                task = self.ask(line, "fetch", {"run": run})
                if task.kind == "end":
                    break
                if task.kind == "task":
                    line.call("report", report(name, task, run, change), 30)
                    self.heard[name if change else "accepted"] += 1
            except Refused:
                self.heard["refused" if change else f"refused {name}"] += 1
            except Unreachable:
                time.sleep(0.3)
        line.close()

    def ask(self, line: ServerLine, method: str, facts: dict[str, Any] | None = None) -> Message:
        """One call."""
        return wire.decode(line.call(method, wire.encode(Message(method, facts or {})), 30))

    def evil(self) -> None:
        """A listed site: every wrong report in turn."""
        turn = iter(range(10**9))
        self.site(EVIL, lambda f, g: WRONG[next(turn) % len(WRONG)](f, g))

    def hold(self, who: str, many: int) -> None:
        """Calls that never send their message, again and again."""

        def nothing() -> Any:
            self.over.wait(20)
            yield from ()

        line = self.line(who)
        ask = line.channel.stream_unary("/fedtorch.Sites/join")
        while not self.over.is_set():
            calls = [ask.future(nothing(), timeout=20) for _ in range(many)]
            self.heard.update(f"{who} {call.code().name}" for call in calls)
            time.sleep(0.05)
        line.close()

    def garbage(self) -> None:
        """A stranger that claims names and sends what is no message."""
        line = self.line(STRANGER, self.names[0])
        ask = line.channel.unary_unary("/fedtorch.Sites/report")
        while not self.over.wait(0.01):
            with suppress(grpc.RpcError):
                ask(b"[" * 100_000, timeout=5, metadata=line.metadata)
                self.heard["garbage was answered"] += 1
        line.close()

    def memory(self) -> float:
        """MiB that the server holds; 0 when it is gone."""
        with suppress(OSError):
            text = Path(f"/proc/{self.server.pid}/status").read_text()
            found = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")]
            return int(found[0]) / 1024 if found else 0.0
        return 0.0

    def rounds(self) -> list[dict[str, Any]]:
        """Figures of the rounds so far."""
        path = self.folder / "run/metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def report(name: str, task: Message, run: str, change: Change | None) -> bytes:
    """An honest report of little steps, or what ``change`` makes of it."""
    state = messages.read_task(task).state
    delta = {k: torch.full((1, *v.shape), 1e-3).double() for k, v in state.items()}
    one = torch.ones(1)
    update = messages.Released.received(
        (name,), {"delta": delta}, {}, one, {k: one for k in FIGURES}
    )
    facts = {"run": run, "visit": task.facts["visit"], "round": task.facts["round"]}
    message = messages.outcome_message(messages.Outcome(update, [], {}), [name], **facts)
    facts, groups = dict(message.facts), {g: dict(t) for g, t in message.groups.items()}
    if change:
        change(facts, groups)
    return wire.encode(Message("report", facts, groups))


def trial(folder: Path, sites: int, rounds: int, seconds: float) -> None:
    """One run, and what must be so after it."""
    made = Federation(folder, sites, rounds)
    work = [(made.site, (n,)) for n in made.names]
    work += [
        (made.evil, ()),
        (made.hold, (STRANGER, 12)),
        (made.hold, (HOLDER, 8)),
        (made.garbage, ()),
    ]
    threads = [threading.Thread(target=t, args=a, daemon=True) for t, a in work]
    for thread in threads:
        thread.start()
    end, memory = time.monotonic() + seconds, []
    while made.server.poll() is None and time.monotonic() < end:
        if len(made.rounds()) > rounds // 10:
            memory.append(made.memory())
        time.sleep(0.5)
    code = made.server.poll()
    made.over.set()
    if code is None:
        made.server.kill()
    for thread in threads:
        thread.join(30)
    told, log = made.rounds(), (folder / "log").read_text(errors="replace")
    demand(code == 0, "the server did all rounds", (code, log[-500:]))
    demand(len(told) == rounds, "no round is missing", len(told))
    cohorts = {tuple(r["cohort"]) for r in told}
    demand(cohorts == {tuple(made.names)}, "every honest site and no other counts", cohorts)
    demand("Traceback" not in log, "no traceback", log[-2000:])
    demand(
        made.heard["refused"] > 0 and not made.heard[EVIL], "wrong reports are refused", made.heard
    )
    demand(not any(k.startswith("refused s") for k in made.heard), "no honest one is", made.heard)
    long = sorted(r["seconds_train"] for r in told)
    print(
        f"{sites} sites, {rounds} rounds: median {long[len(long) // 2]:.2f} s, slowest {long[-1]:.2f} s; "
        f"server {memory[0] if memory else 0:.0f} MiB at a tenth, {max(memory, default=0):.0f} at most; "
        f"log {len(log) / 1024:.0f} KiB; {dict(made.heard)}"
    )


def main() -> None:
    """One trial."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sites", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1800.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial(Path(folder), given.sites, given.rounds, given.seconds)


if __name__ == "__main__":
    main()
