"""Four hospitals under secure aggregation, and ``kill -9`` of a site and of the server in each phase.

    python -m benchmarks.hospitals ../shared/data/heart-disease --secure

Three federations of real processes over TLS, each of 20 rounds. Undisturbed without noise: the weights
are those of one process without masks, and nothing that the server received has an update in it. The same
with a process killed in every phase, a site first and then the server: the weights are those of one
process in which the same sites count. And with noise of each site's own below its masks.
"""

import json
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import hospitals_checks as checks
from benchmarks.hospitals import RUNS, Trial
from fedtorch import Client, Local, Mean, Recipe, Server, seeds
from fedtorch.data import Npz
from fedtorch.engines import wire
from fedtorch.rounds.participation import Participation
from fedtorch.run import checkpoint, cli
from fedtorch.secure.protocol import PHASES
from fedtorch.sites import keys
from fedtorch.sites.openings import Openings
from fedtorch.sites.serve import ServeConfig, make_plan
from fedtorch.types import Released

SECURE = '[aggregator]\nname = "secure"\n'
KINDS = {
    "masks": RUNS["plain"] + SECURE,
    "masks, killed in each phase": RUNS["plain"] + SECURE,
    "masks over noise": RUNS["private"] + SECURE,
}
SENT = PHASES[:-1]
IN_SUM = ("keys", "confirm", "open")
"""A site that dies before it sends these is in the sum: it comes back in time, or has sent its vector."""


@dataclass(frozen=True)
class Deaths:
    """Who dies in which phase of which round (from 0), by party: (phase, round)."""

    by: Mapping[str, Sequence[tuple[str, int]]]

    @classmethod
    def planned(cls, site: str) -> "Deaths":
        """A site in each phase, then the server in each."""
        return cls(
            {
                site: [(phase, 2 + 2 * k) for k, phase in enumerate(SENT)],
                "server": [(phase, 13 + k) for k, phase in enumerate(SENT)],
            }
        )

    def write(self, trial: Trial) -> None:
        """Tell the processes, which kill themselves where they are told to (``benchmarks.witness``)."""
        for who, when in self.by.items():
            notes = trial.folder / "notes" / who
            notes.mkdir(parents=True, exist_ok=True)
            (notes / "dies.json").write_text(json.dumps(when))

    def cohort(self, names: Sequence[str], round: int) -> list[str]:
        """Who is in the sum of a round."""
        gone = {
            who
            for who, when in self.by.items()
            for phase, number in when
            if number == round and phase not in IN_SUM
        }
        return [n for n in names if n not in gone]


def run(trial: Trial, deaths: Deaths) -> int:
    """Start everybody, and start again who was killed; returns how many were."""
    deaths.write(trial)
    for who in ("server", *trial.names):
        trial.start(who)
    killed, end = 0, time.monotonic() + 1800
    while any(p.poll() is None for p in trial.processes.values()):
        for who, process in [*trial.processes.items()]:
            code = process.poll()
            if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
                killed += 1
                again = ("--run-dir", str(trial.folder / "run"), "--resume")
                trial.start(who, *(again if who == "server" else ()))
            else:
                checks.demand(code in (None, 0), f"{who} is well", trial.log(who))
        checks.demand(time.monotonic() < end, "the trial came to its end", trial.log("server"))
        time.sleep(0.05)
    trial.finish()
    return killed


def everything(trial: Trial, data: Path, deaths: Deaths, killed: int) -> Iterator[str]:
    """Every check, one sentence for each that holds."""
    messages = trial.received()
    yield checks.rounds_are_complete(trial.folder, trial.rounds)
    for who in ("server", *trial.names) if trial.strace else ():
        yield checks.who_opened_what(trial, who, data)
    yield checks.no_row_arrived(messages, {n: checks.numbers(trial.rows(n)) for n in trial.names})
    yield only_masked_arrived(messages)
    planned = sum(map(len, deaths.by.values()))
    yield checks.demand(
        killed == planned, f"{killed} processes were killed, and started again", planned
    )
    yield cohorts(trial, deaths)
    yield openings(trial, deaths)
    if "epsilon" not in (trial.folder / "serve.toml").read_text():
        yield from same_without_masks(trial, deaths, messages)
    else:
        yield checks.guarantee(trial.folder, trial.names)
    yield checks.accuracy(trial.folder, data)


def only_masked_arrived(messages: Sequence[Mapping]) -> str:
    """Of each phase what it has, and figures of nobody."""
    kinds, bytes_by = Counter[str](), Counter[str]()
    for m in messages:
        message = wire.decode(m["data"])
        if m["method"] != "report":
            checks.demand(not message.groups and len(m["data"]) < 1000, "a call holds no tensor", m)
            continue
        facts, groups = message.facts, message.groups
        phase = facts.get("phase")
        known = {"run", "visit", "round", "phase", "certificates"}
        good = phase in SENT and facts.keys() <= known
        good = good and all(g.startswith("secure") for g in groups)
        checks.demand(good, "a report is one of the five phases and has no figures", facts)
        kinds[phase] += 1
        bytes_by[phase] += len(m["data"])
    told = ", ".join(
        f"{kinds[p]} {p} ({bytes_by[p] // max(kinds[p], 1):,} bytes each)" for p in SENT
    )
    return f"reports that the server received: {told}; no figure of a site in any"


def cohorts(trial: Trial, deaths: Deaths) -> str:
    """Who was in which sum."""
    lines = (trial.folder / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(t) for t in lines]
    found = {
        r["round"] - 1: r.get("cohort", r.get("nonprivate_cohort")) for r in rows if r["round"]
    }
    wrong = {k: who for k, who in found.items() if who != sorted(deaths.cohort(trial.names, k))}
    less = [k + 1 for k, who in found.items() if len(who) < len(trial.names)]
    told = (
        f"all sites are in every sum but those of rounds {less}" if less else "all are in every sum"
    )
    return checks.demand(
        not wrong, f"{told}: there the sum of the others came out" if less else told, wrong
    )


def openings(trial: Trial, deaths: Deaths) -> str:
    """What each site has signed: one list for each round, done again or not."""
    for name in trial.names:
        kept = Openings(trial.folder / name / "state").runs
        (lists,) = kept.values()
        wanted = [
            (k, frozenset(deaths.cohort(trial.names, k)))
            for k in range(trial.rounds)
            if name in deaths.cohort(trial.names, k)
        ]
        signed = {(k, who) for k, who in lists}
        # who died before it confirmed has not signed, and is in the sum all the same
        missing = {*wanted} - signed
        dead = {k for phase, k in deaths.by.get(name, ()) if phase == "confirm"}
        good = len(lists) == len(signed) and signed <= {*wanted} and {k for k, _ in missing} <= dead
        checks.demand(good, f"{name} signed one list of each round", lists)
    return "each site signed one list of survivors for each round, rounds done again included"


@dataclass(frozen=True, kw_only=True)
class Given(Participation):
    """The cohorts that were."""

    deaths: Deaths

    def choose(self, who: Sequence, seed: int, round: int) -> list[int]:
        """By place."""
        there = self.deaths.cohort([str(w) for w in who], round)
        return [k for k, w in enumerate(who) if w in there]


class Seen:
    """An observer of the run in one process: what each client sends in the clear."""

    def __init__(self) -> None:
        self.numbers: list[torch.Tensor] = []

    def sent(self, update: Released) -> None:
        """One chunk."""
        for group in update.sent.values():
            self.numbers += [v.flatten() for v in group.values()]

    def round(self, figures: Mapping) -> None:
        """Nothing to add."""


def same_without_masks(trial: Trial, deaths: Deaths, messages: Sequence[Mapping]) -> Iterator[str]:
    """One process, the same cohorts, no masks: its weights, and none of its updates in what arrived."""
    config = cli.parse(ServeConfig, ["--config", str(trial.folder / "serve.toml")])
    with seeds.seeded(seeds.derive(config.seed, "model")):
        model, recipe = make_plan(config, "").build()
    recipe = Recipe(
        type(recipe.strategy)(weighting="uniform"),
        loss=recipe.loss,
        aggregator=Mean(),
        lr=config.lr,
        steps=config.steps,
        batch_size=config.batch_size,
    )
    clients = [Client(n, Npz(str(trial.rows(n)), kind="binary").load(0).train) for n in trial.names]
    seen = Seen()
    server = Server(
        model,
        clients,
        recipe,
        engine=Local(chunk=1),
        seed=config.seed,
        participation=Given(deaths=deaths),
        observers=[seen],
    )
    for _ in server.rounds(trial.rounds):
        pass
    got = checkpoint.load(trial.folder / "run/checkpoints")["model"]
    worst = max(float((v - got[k]).abs().max()) for k, v in server.model.state_dict().items())
    yield checks.demand(
        worst <= 1e-9, f"weights differ from those without masks by at most {worst:.1g}"
    )
    everything = b"\0".join(m["data"] for m in messages)
    clear = torch.cat(seen.numbers).double().numpy()
    clear = clear[np.abs(clear) > 1e-9]
    words = np.rint(clear * 2.0**40).astype("<i8")
    for numbers in (clear.astype("<f8"), words):
        found = [n for n in numbers if n.tobytes() in everything]
        checks.demand(not found, "no number of an update arrived in the clear", found)
    yield (
        f"none of the {len(clear):,} numbers of single updates is in the {len(everything):,} bytes that "
        "the server received, as float64 or as a fixed-point word"
    )


def main(data: Path, kinds: Sequence[str] = tuple(KINDS), rounds: int = 20) -> None:
    """All three."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            kills = "killed" in kind
            trial = Trial(
                Path(folder), rounds, strace="killed" not in kind, minimum=3 if kills else 4
            )
            deaths = Deaths.planned("va") if kills else Deaths({})
            began = time.perf_counter()
            try:
                trial.prepare(data, KINDS[kind])
                trial.extra = {
                    f"peers.{n}": p for n, p in keys.fingerprints(trial.folder / "keys").items()
                } | {"require-secure": "true"}
                killed = run(trial, deaths)
            finally:
                trial.close()
            print(f"{kind}: {time.perf_counter() - began:.1f} s, {killed} processes killed")
            for line in everything(trial, data, deaths, killed):
                print(f"  {line}", flush=True)
