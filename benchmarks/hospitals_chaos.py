"""Kill -9 at random, many times: ``python -m benchmarks.hospitals_chaos ../shared/data/heart-disease``.

The four hospitals of ``benchmarks.hospitals`` train with SCAFFOLD, whose sites remember between rounds,
while somebody, the server as likely as a site, is killed every few seconds and started again. In the end
the weights must be those of an undisturbed run in one process. ``--privacy`` trains privately in place of
it, and looks at the ledgers: no visit that was reported may be missing from its site's.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks import hospitals_checks as checks
from benchmarks.hospitals import RUNS, Trial
from fedtorch.engines import wire


def chaos(trial: Trial, kills: int, draw: random.Random) -> Counter:
    """Train to the end; returns how often each party was killed."""
    for who in ("server", *trial.names):
        trial.start(who)
    trial.wait(lambda: trial.rounds_done() >= 1, "round 1")
    killed: Counter = Counter()
    while killed.total() < kills and trial.rounds_done() < trial.rounds - 2:
        time.sleep(draw.uniform(0.0, 3.0))
        who = draw.choice(["server", *trial.names])
        if trial.processes[who].poll() is None and (trial.folder / "run/checkpoints").exists():
            trial.kill(who)
            killed[who] += 1
            again = ["--run-dir", str(trial.folder / "run"), "--resume"] if who == "server" else []
            trial.start(who, *again)
            trial.pid(who)
    trial.finish()
    return killed


def reported_is_charged(trial: Trial) -> str:
    """Every visit of which a report arrived is in its site's ledger."""
    told = []
    for name in trial.names:
        path = trial.folder / name / "state/ledger-example.jsonl"
        own = Counter(e["round"] for e in checks.charges(path))
        facts = [wire.decode(m["data"]).facts for m in trial.received() if m["method"] == "report"]
        visits = Counter(
            r for r, _ in {(f["round"], f["visit"]) for f in facts if f["ids"] == [name]}
        )
        checks.demand(own >= visits, f"{name} charged every visit it reported", (own, visits))
        told.append(f"{name} {own.total()} charges for {visits.total()} reported visits")
    return ", ".join(told)


def main() -> None:
    """One trial."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--privacy", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(
            Path(folder), given.rounds, strace=False, spare=given.kills + 1, scaled=given.privacy
        )
        try:
            trial.prepare(given.data, RUNS["private" if given.privacy else "plain"])
            killed = chaos(trial, given.kills, random.Random(given.seed))
        finally:
            trial.close()
        print(f"{killed.total()} kills: {dict(killed)}")
        print(checks.rounds_are_complete(trial.folder, given.rounds))
        print(checks.only_updates_arrived(trial.received(), trial.inputs + 1))
        if given.privacy:
            print(reported_is_charged(trial))
            print(checks.guarantee(trial.folder, trial.names))
        else:
            print(checks.same_as_undisturbed(trial))


if __name__ == "__main__":
    main()
