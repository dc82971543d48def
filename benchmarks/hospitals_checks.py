"""What must hold after the trial of four hospitals; every check can fail, as its test shows."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks.heart import accuracies, hospitals
from fedtorch import Client, Local, Server, evaluate, seeds
from fedtorch.data import Data, Npz
from fedtorch.engines import wire
from fedtorch.privacy.accounting.events import epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.run import BEFORE
from fedtorch.run import checkpoint, cli
from fedtorch.sites.ledgers import SiteLedgers
from fedtorch.sites.serve import ServeConfig, make_plan

if TYPE_CHECKING:
    from benchmarks.hospitals import Trial

FIGURES = {"train_loss", "examples", "visited", "steps", "update_norm"}
"""The named figures a site may send beside its update; see docs/sites.md."""


class Broken(AssertionError):
    """A promise that was not kept."""


def demand(holds: bool, promise: str, detail: object = "") -> str:
    """The promise, if it holds; raises Broken otherwise."""
    if not holds:
        raise Broken(f"NOT TRUE: {promise}. {detail}")
    return promise


def everything(trial: "Trial", data: Path, killed: Mapping[str, int]) -> Iterator[str]:
    """Every check, one sentence for each that holds."""
    messages, size = trial.received(), trial.inputs + 1
    yield rounds_are_complete(trial.folder, trial.rounds)
    for who in ("server", *trial.names):
        yield who_opened_what(trial, who, data)
    yield only_updates_arrived(messages, size)
    yield no_row_arrived(messages, {n: numbers(trial.rows(n)) for n in trial.names})
    if (trial.folder / "run/ledger.jsonl").exists():
        yield server_ledger(trial.folder, trial.rounds, trial.names, killed)
        for name in trial.names:
            yield site_ledger(trial.folder, name, trial.rounds, messages, killed)
        yield noise_is_fresh(messages, killed)
        yield guarantee(trial.folder, trial.names)
        yield scaled_alike(trial)
        yield private_accuracy(trial)
    else:
        yield same_as_undisturbed(trial)
        yield accuracy(trial.folder, data)


def rounds_are_complete(folder: Path, rounds: int) -> str:
    """Each round once, to the last."""
    summary = json.loads((folder / "run/summary.json").read_text())
    lines = [json.loads(t) for t in (folder / "run/metrics.jsonl").read_text().splitlines()]
    seen = [m["round"] for m in lines if m["round"]]  # 0 is the score before any training
    good = summary["rounds"] == rounds and seen == [*range(1, rounds + 1)]
    return demand(good, f"training ended at round {rounds}, each round counted once", seen)


def who_opened_what(trial: "Trial", who: str, data: Path) -> str:
    """No process opened a table but the site whose own it is, by either witness."""
    base = trial.folder.resolve()
    foreign = [data.resolve(), *(base / n for n in trial.names if n != who)]
    lists = {"audit hook": (base / "notes" / who / "opened.txt").read_text().splitlines()}
    if trial.strace:
        texts = [p.read_text() for p in (base / "notes" / who).glob("strace-*.txt")]
        found = [re.findall(r'open(?:at|at2)?\([^"]*"([^"]*)"', t) for t in texts]
        lists["strace"] = [str(Path(p).resolve()) for paths in found for p in paths]
    for witness, opened in lists.items():
        own = base / "run/metrics.jsonl" if who == "server" else trial.rows(who).resolve()
        demand(str(own) in opened, f"the {witness} of {who} was awake", f"{own} is not in its list")
        bad = {p for p in opened if any(Path(p).is_relative_to(f) for f in foreign)}
        demand(not bad, f"{who} opened nobody else's file", bad)
    counts = ", ".join(f"{w}: {len(o)} opens" for w, o in lists.items())
    whose = "no hospital's file" if who == "server" else "no hospital's file but its own"
    return f"{who} opened {whose} ({counts})"


def only_updates_arrived(messages: Sequence[Mapping[str, Any]], size: int) -> str:
    """Calls without numbers, and reports of one update of the model's size and named figures."""
    kinds, largest, told = Counter(m["method"] for m in messages), 0, Counter[str]()
    for m in messages:
        message, numbers = wire.decode(m["data"]), 0
        if m["method"] != "report":
            demand(not message.groups and len(m["data"]) < 1000, "a call holds no tensor", m)
            continue
        largest = max(largest, len(m["data"]))
        figures, _ = (message.groups.pop(k, {}) for k in ("metrics", "buffers"))
        demand(figures.keys() <= FIGURES, "only known figures arrived", figures.keys())
        for group, tree in message.groups.items():
            known = ("sent/delta", "sent/c", "sent/statistics", "")
            demand(group in known, "only an update arrived", group)
            numbers += sum(t.numel() for t in tree.values())
        if "sent/statistics" in message.groups:
            told[m["site"]] += 1
            demand(numbers == 16 * 5 + 1, "statistics are 16 numbers of each column", numbers)
            continue
        singles = all(t.shape == (1,) for t in figures.values())
        whole = size * (1 + ("sent/c" in message.groups)) + 1  # SCAFFOLD sends twice as much
        demand(singles and numbers == whole, "an update has the model's size", numbers)
        demand(len(m["data"]) < 4000, "a report holds nothing else", len(m["data"]))
    demand(not told or {*told.values()} == {1}, "each site told statistics of columns once", told)
    all_ = ", ".join(f"{n} {k}" for k, n in sorted(kinds.items()))
    first = f", {told.total()} of them noised histograms of columns before round 1" if told else ""
    return (
        f"the server received {all_}{first}, the largest of {largest} bytes: each report one update of the "
        f"model's {size} numbers, its weight and named figures, every other call no number at all"
    )


def numbers(path: Path) -> np.ndarray:
    """The rows of a hospital's table, the columns that are learned from."""
    if path.suffix == ".npz":
        with np.load(path) as table:
            return np.concatenate([table["x"], table["x_test"]])
    lines = [line.replace("?", "nan").split(",") for line in path.read_text().split()]
    return np.array(lines, dtype=float)[:, :10]


def no_row_arrived(messages: Sequence[Mapping[str, Any]], tables: Mapping[str, np.ndarray]) -> str:
    """The bytes of no row, as float32 or float64, are anywhere in what arrived."""
    everything, rows = b"\0".join(m["data"] for m in messages), 0
    for name, table in tables.items():
        for row in table:
            rows += 1
            for kind in ("<f4", "<f8"):
                found = row.astype(kind).tobytes() in everything
                demand(not found, f"no row of {name} arrived", row)
    return f"none of {rows} rows is in the {len(everything):,} bytes that the server received"


def charges(path: Path) -> list[dict[str, Any]]:
    """Entries of a ledger."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def server_ledger(
    folder: Path, rounds: int, names: Iterable[str], killed: Mapping[str, int]
) -> str:
    """Every round is charged to everybody, the one that was done again twice."""
    saved = checkpoint.load(folder / "run/checkpoints")["privacy"]["ledger"]
    Ledger.resume(folder / "run/ledger.jsonl", saved)  # raises where its chain of digests is broken
    entries = charges(folder / "run/ledger.jsonl")
    wanted = Counter([BEFORE, *range(rounds), killed["server"]])
    good = Counter(e["round"] for e in entries) == wanted
    everybody = [{*names} if e["clients"] is None else {*e["clients"]} for e in entries]
    good = good and all(who == {*names} for who in everybody)
    return demand(good, f"the server's ledger: {len(entries)} charges, none lost", entries)


def site_ledger(
    folder: Path,
    name: str,
    rounds: int,
    messages: Sequence[Mapping[str, Any]],
    killed: Mapping[str, int],
) -> str:
    """A charge for every visit that was begun, and for nothing else."""
    own = Counter(e["round"] for e in charges(folder / name / "state/ledger-example.jsonl"))
    visits = {
        (f["round"], f["visit"])
        for f in (wire.decode(m["data"]).facts for m in messages if m["method"] == "report")
        if f["ids"] == [name]
    }
    begun = Counter(round for round, _ in visits)
    if name in killed:
        begun[killed[name]] += 1  # charged, and killed before it reported
    # statistics, once, and then every round
    good = own == begun and {*own} == {BEFORE, *range(rounds)} and own[BEFORE] == 1
    return demand(
        good, f"{name}'s ledger: {own.total()} charges for {begun.total()} visits", (own, begun)
    )


def noise_is_fresh(messages: Sequence[Mapping[str, Any]], killed: Mapping[str, int]) -> str:
    """A visit that is done again draws new noise: what was reported twice differs by two noises."""
    again: dict[str, dict[str, torch.Tensor]] = {}
    for m in messages:
        message = wire.decode(m["data"])
        if m["method"] == "report" and message.facts["round"] == killed["server"]:
            numbers = torch.cat([t.flatten() for t in message.groups["sent/delta"].values()])
            again.setdefault(m["site"], {})[message.facts["visit"]] = numbers
    pairs = {s: [*v.values()] for s, v in again.items() if len(v) == 2}
    apart = [float((a - b).norm()) for a, b in pairs.values()]
    return demand(
        len(pairs) >= 2 and min(apart) > 0,
        f"{len(pairs)} sites did round {killed['server'] + 1} twice, each time with other noise",
        apart,
    )


def guarantee(folder: Path, names: Iterable[str]) -> str:
    """The run and every site stayed within what was promised, by an account of the ledgers alone."""
    summary = json.loads((folder / "run/summary.json").read_text())
    promised, spent = 8.0, {"the run": summary["epsilon"]}
    config = cli.parse(ServeConfig, ["--config", str(folder / "serve.toml")])
    for name in names:
        spent[name] = SiteLedgers(folder / name / "state", name, None, 1e-5).spent()
    plan = make_plan(config, "").privacy
    assert plan is not None
    entries = charges(folder / "run/ledger.jsonl")
    rounds = [plan.event(e["noise"]) for e in entries if e["round"] != BEFORE]
    priced = epsilon([*rounds, *plan.once], plan.delta)
    demand(
        abs(priced - summary["epsilon"]) < 1e-9, "the summary says what the ledger costs", priced
    )
    told = ", ".join(f"{k} {v:.3f}" for k, v in spent.items())
    return demand(max(spent.values()) <= promised, f"epsilon at most {promised:g}: {told}")


def same_as_undisturbed(trial: "Trial") -> str:
    """Without noise: the weights of a run in one process that nobody disturbed."""
    config = cli.parse(ServeConfig, ["--config", str(trial.folder / "serve.toml")])
    with seeds.seeded(seeds.derive(config.seed, "model")):
        model, recipe = make_plan(config, "").build()
    clients = [Client(n, Npz(str(trial.rows(n)), kind="binary").load(0).train) for n in trial.names]
    server = Server(model, clients, recipe, engine=Local(chunk=1), seed=config.seed)
    for _ in server.rounds(trial.rounds):
        pass
    got = checkpoint.load(trial.folder / "run/checkpoints")["model"]
    worst = max(float((v - got[k]).abs().max()) for k, v in server.model.state_dict().items())
    return demand(worst <= 1e-6, f"weights differ from one process's by at most {worst:.1g}")


def scaled(trial: "Trial") -> dict[str, Data]:
    """Each hospital's rows as it scaled them."""
    kept = json.loads((trial.folder / "run/sites.json").read_text())
    numbers = [kept["center"], kept["width"]]
    found = {}
    for name in trial.names:
        asks = trial.table(name).load(0).asks
        assert asks is not None
        found[name] = asks.answer(*numbers, "")
    return found


def scaled_alike(trial: "Trial") -> str:
    """Every site keeps the numbers that the server has, and nothing was released a second time."""
    kept = json.loads((trial.folder / "run/sites.json").read_text())
    for name in trial.names:
        text = (trial.folder / name / "state/statistics.json").read_text()
        own = json.loads(text)[kept["run"]]
        same = all(own[k] == kept[k] for k in ("center", "width"))
        demand(same, f"{name} scales by the numbers of all", own)
    each = zip(kept["center"], kept["width"], strict=True)
    told = ", ".join(f"{center:.3g} +- {width:.3g}" for center, width in each)
    return f"all hospitals scale by the same private statistics: {told}"


def private_accuracy(trial: "Trial") -> str:
    """The same of rows that are scaled by private statistics."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(trial.inputs, 1))
    model.load_state_dict(checkpoint.load(trial.folder / "run/checkpoints")["model"])
    right, all_, each = 0.0, 0, []
    for data in scaled(trial).values():
        n = len(data.test)  # type: ignore[arg-type]
        each.append(evaluate(model, data.test, ["binary_accuracy"])["binary_accuracy"])
        right, all_ = right + each[-1] * n, all_ + n
    return (
        f"test accuracy: pooled {right / all_:.3f}, mean over hospitals {sum(each) / len(each):.3f}"
    )


def accuracy(folder: Path, data: Path) -> str:
    """How good the model became: a figure, not a promise."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(13, 1))
    model.load_state_dict(checkpoint.load(folder / "run/checkpoints")["model"])
    whole, mean = accuracies(model, *hospitals(data))
    return f"test accuracy: pooled {whole:.3f}, mean over hospitals {mean:.3f}"
