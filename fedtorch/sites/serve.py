"""The server among the sites: the rounds of ``train.py``, without any data."""

import json
import secrets
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fedtorch import disk, seeds
from fedtorch.data import Data, prepared
from fedtorch.data.base import facts_of
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.report import promise
from fedtorch.run import checkpoint, cli, files
from fedtorch.run import folder as folders
from fedtorch.run.console import Report, StopSignal
from fedtorch.run.evaluate import evaluate
from fedtorch.run.folder import Folder
from fedtorch.run.messages import starting_score, strict, write_results
from fedtorch.server import Server
from fedtorch.sites.ends import EndedEarly, early, enough, over
from fedtorch.sites.engine import Sites, SitesSession, remotes
from fedtorch.sites.offer import Plan
from fedtorch.sites.options import ServeConfig
from fedtorch.tracking import Record, TensorBoard
from fedtorch.training.losses import DEFAULTS, LOSSES, METRICS
from fedtorch.types import ConfigError

LEDGER = "ledger.jsonl"
"""What the run has spent by the server's book, in its folder; each site keeps its own."""

FREE_ON_RESUME = {
    "rounds",
    "resume",
    "run_dir",
    "deadline",
    "minimum",
    "enough",
    "most_examples",
    "patience",
    "address",
}
"""Options a resumed run may change."""


def serve(config: ServeConfig) -> dict[str, Any]:
    """One run; returns the summary. Raises EndedEarly where not all rounds were trained."""
    with ExitStack() as held:  # the lock on the run folder, to the end
        return run(config, held)


def run(config: ServeConfig, held: ExitStack) -> dict[str, Any]:
    """The run; ``held`` keeps the lock on its folder."""
    began = time.perf_counter()
    if not config.run_dir:
        raise ConfigError("--run-dir: in which folder shall the run be kept?")
    folder = Path(config.run_dir)
    plan = make_plan(config, run_id(folder, config.resume))
    if config.resume:
        plan = calibrated(plan, folder)
    with seeds.seeded(seeds.derive(config.seed, "model")):
        model, recipe = plan.build()
    files.savable(model)
    keys = Path(config.credentials) if config.credentials else None
    engine = Sites(
        plan=plan,
        address=config.address,
        keys=keys,
        deadline=config.deadline,
        minimum=config.minimum,
        enough=config.enough,
        most_examples=config.most_examples,
    )
    clients = remotes(config.sites)
    test = own_test(config)
    metric = DEFAULTS[config.kind][1]
    metrics = {"loss": LOSSES[plan.loss], metric: METRICS[metric]}
    server = Server(
        model,
        clients,
        recipe,
        participation=config.participation,
        schedule=config.schedule,
        engine=engine,
        seed=config.seed,
    )
    model = server.model
    with closing(server):
        session = server.session
        assert isinstance(session, SitesSession)
        session.ended = "error"  # unless it turns out otherwise
        kept = open_folder(config, plan, server, held)
        private = server.private is not None
        scores: dict[str, float] = {}
        with (
            Report(config.rounds, server.round_number, times=not strict(server)) as report,
            Record(
                TensorBoard(), folder, server.round_number, report.say, private, kept.seal
            ) as record,
            StopSignal(report) as stop,
        ):
            if strict(server):
                record.strictly(server.mark)
            report.say(f"listening at {config.address}, waiting for {', '.join(config.sites)}")
            for line in promise(server.private) if server.private else ["no privacy: no noise"]:
                report.say(line)
            if test is not None:
                scores = evaluate(model, test, metrics)
                starting_score(record, report, scores, server)
            while not over(server, config, stop) and enough(session, config, stop):
                figures = server.round() | server.mark(session.figures())
                if test is not None:
                    scores = evaluate(model, test, metrics)
                    figures |= {f"test_{k}": v for k, v in scores.items()}
                record.round(figures)
                report.round(figures)
                state = server.state_dict()
                report.attempt("checkpoint", kept.save, state, record.seal())
            why = early(server, session, config, stop.asked)
            files.write_model(folder, model, "serve")  # first: whatever is reported later can fail
            session.ended = why.reason if why else ""
    summary = {f"test_{k}": v for k, v in scores.items()} | {
        "rounds": server.round_number,
        "seconds": round(time.perf_counter() - began, 3),
        "epsilon": server.private.spent() if server.private else None,
        "delta": server.private.delta if server.private else None,
    }
    write_results(report, folder, summary, server)
    if why is not None:
        number, rounds = server.round_number, config.rounds
        text = f"ended after {number} of {rounds} rounds: {why}; the model so far is saved"
        text += f" (go on: fedtorch serve --run-dir {folder} --resume)"
        raise EndedEarly(why.code, text, why.reason)
    return summary


def own_test(config: ServeConfig) -> Dataset | None:
    """The server's own test data, where it has some: its classes are those of all sites."""
    if config.dataset is None:
        return None
    data: Data = config.dataset.load(config.seed)
    prepared.agreed(data, config.dataset)
    return data.test


def make_plan(config: ServeConfig, run: str) -> Plan:
    """What the sites are told."""
    return Plan(
        run=run,
        model=config.model,
        model_args=config.model_args,
        facts=facts_of(tuple(config.input_shape), config.outputs, config.kind),
        kind=config.kind,
        loss=DEFAULTS[config.kind][0] if config.loss == "auto" else config.loss,
        strategy=config.strategy,
        aggregator=config.aggregator,
        optimizer=config.optimizer,
        optimizer_args=config.optimizer_args,
        privacy=config.privacy and config.plan,
        rounds=config.rounds,
        **config.training() | {"lr": config.lr or config.plan.default_lr},
    )


def run_id(folder: Path, resume: bool) -> str:
    """The run's name towards the sites: a new one, or that of the run to go on with."""
    if not resume:
        return secrets.token_hex(8)
    try:
        return str(json.loads((folder / "sites.json").read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(f"nothing to resume: {folder} holds no run of sites") from e


def calibrated(plan: Plan, folder: Path) -> Plan:
    """The plan of a run that goes on: its noise is for the rounds that were planned at first."""
    saved = checkpoint.load(folder / "checkpoints").get("privacy")
    if not saved or plan.privacy is None or plan.privacy.target is None:
        return plan
    return replace(plan, privacy=replace(plan.privacy, rounds=saved["rounds"]))


def open_folder(config: ServeConfig, plan: Plan, server: Server, held: ExitStack) -> Folder:
    """A new run folder, or the old one with the server brought to its last checkpoint; locked."""
    folder = Path(config.run_dir)
    if config.resume:
        kept, saved = folders.resume(folder, held)
        private = saved.get("privacy")
        ledger = Ledger.resume(folder / LEDGER, private["ledger"]) if private else None
        server.load_state_dict(saved, ledger)
        return kept
    table = {k: v for k, v in cli.describe(config).items() if k not in ("resume", "run_dir")}
    kept = folders.start(folder, table, held)
    if server.private:
        server.private.ledger = Ledger(folder / LEDGER, server.private.plan.unit)
    disk.replace(folder / "sites.json", json.dumps({"run": plan.run}) + "\n")
    kept.begin(server.state_dict())
    return kept
