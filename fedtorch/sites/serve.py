"""The server among the sites: the rounds of ``train.py``, without any data."""

import json
import secrets
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fedtorch import checkpoint, cli, disk, folders, runs, seeds
from fedtorch.client import Recipe, default_lr
from fedtorch.console import Report, StopSignal
from fedtorch.data import Data, prepared
from fedtorch.data.base import facts_of
from fedtorch.evaluate import evaluate
from fedtorch.folders import Folder
from fedtorch.losses import DEFAULTS, LOSSES, METRICS
from fedtorch.narrate import strict, write_results
from fedtorch.options import COUNT, POSITIVE, check
from fedtorch.participation import Everyone, Participation
from fedtorch.privacy import Privacy, SampleLevel
from fedtorch.privacy.ledger import Ledger
from fedtorch.privacy.report import promise
from fedtorch.schedules import Constant, Schedule
from fedtorch.server import Server
from fedtorch.sites.engine import Sites, SitesSession, remotes
from fedtorch.sites.keys import SITE_NAME
from fedtorch.sites.plan import Plan
from fedtorch.strategies import FedAvg, Strategy
from fedtorch.tracking import Record, TensorBoard
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Every option of a server of sites. ``--config serve.toml`` sets them, flags override."""

    sites: list[str] = field(default_factory=list)
    """Names of the sites, as in their certificates."""
    address: str = "127.0.0.1:8443"
    """Where to listen, HOST:PORT; 0.0.0.0:8443 for every network of this machine."""
    credentials: str = ""
    """Folder with key.pem, cert.pem and ca.pem."""
    insecure: bool = False
    """No TLS and no keys: only for sites on this very machine."""
    input_shape: list[int] = field(default_factory=list)
    """Shape of one example, agreed with the sites."""
    outputs: int = 2
    """Classes, or numbers to predict."""
    kind: str = "classification"
    """classification, binary or regression: the default loss and metric."""
    dataset: Any = None
    """Data of the server's own to test the model on; none: sites test for themselves."""
    model: str = "mlp"
    """A model that every site has too."""
    model_args: dict[str, Any] = field(default_factory=dict)
    loss: str = "auto"
    """cross_entropy, bce or mse."""
    strategy: Strategy = FedAvg()
    """fedavg, fedprox, scaffold; --strategy.server sgd, adam, yogi, adagrad."""
    participation: Participation = Everyone()
    """Who takes part in a round: everyone, uniform, poisson."""
    privacy: Privacy | None = SampleLevel()
    """sample (noise at each site), client (noise at the server), local (noise at each site, nobody is
    trusted), or none; --privacy.epsilon 8 for the whole run."""
    rounds: int = 30
    """Rounds to train in all."""
    optimizer: str = "sgd"
    """The sites' optimizer, any of torch.optim."""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    """The sites' learning rate; none: 0.1, and 1 under sample-level privacy, which clips gradients."""
    schedule: Schedule = Constant()
    """Learning rate over rounds: constant, exponential, step, cosine."""
    epochs: int = Recipe.epochs
    """Passes over a site's data in a round."""
    steps: int | None = None
    """Local steps in a round, in place of epochs."""
    batch_size: int | None = Recipe.batch_size
    """Examples in a local step; null: all of a site's."""
    drop_last: bool = False
    """Leave out the last, smaller batch of each pass."""
    deadline: float = 600.0
    """Seconds a round waits for its sites."""
    minimum: int = 1
    """Sites that must be there for a round to start, and report for it to count."""
    enough: int | None = None
    """Over-selection: a round ends when so many sites have reported, the others are late; none: it waits
    for all that participation has chosen."""
    most_examples: int = 10_000_000
    """Largest number of examples a site may say it has; without privacy that is its weight."""
    patience: float = 3600.0
    """Seconds to wait for enough sites before giving up."""
    seed: int = 0
    """Decides every draw of the run."""
    run_dir: str = ""
    """Folder of the run."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint; sites may have stayed up."""

    def __post_init__(self) -> None:
        """Refuse what no run can do."""
        counts = (
            "rounds",
            "outputs",
            "epochs",
            "steps",
            "batch_size",
            "minimum",
            "enough",
            "most_examples",
        )
        times = dict.fromkeys(("lr", "deadline", "patience"), POSITIVE)
        check(self, "", **times, **dict.fromkeys(counts, COUNT))
        if bool(self.credentials) == self.insecure:
            raise ConfigError(
                "give --credentials FOLDER (fedtorch keys makes them), or --insecure alone"
            )
        if not self.sites or not self.input_shape:
            raise ConfigError("sites and input_shape are needed; see docs/sites.md")
        for name in self.sites:
            if not SITE_NAME.fullmatch(name):
                raise ConfigError(f"{name!r} cannot be a site's name: letters, digits, . _ - only")
        if self.kind not in DEFAULTS:
            raise ConfigError(f"kind must be one of {', '.join(DEFAULTS)}, got {self.kind!r}")
        if self.loss not in ("auto", *LOSSES):
            raise ConfigError(f"loss must be one of {', '.join(LOSSES)}: sites have no other")


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
    """One run; returns the summary."""
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
        kept = open_folder(config, plan, server, held)
        private = server.private is not None
        session = server.session
        assert isinstance(session, SitesSession)
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
            while not over(server, config, stop):
                if not enough(session, config, stop):
                    continue
                figures = server.round() | server.mark(session.figures())
                if test is not None:
                    scores = evaluate(model, test, metrics)
                    figures |= {f"test_{k}": v for k, v in scores.items()}
                record.round(figures)
                report.round(figures)
                kept.save(server.state_dict(), record.seal())
            runs.write_model(folder, model)  # first: whatever is reported later can fail
    summary = {f"test_{k}": v for k, v in scores.items()} | {
        "rounds": server.round_number,
        "seconds": round(time.perf_counter() - began, 3),
        "epsilon": server.private.spent() if server.private else None,
        "delta": server.private.delta if server.private else None,
    }
    write_results(report, folder, summary, server)
    return summary


def own_test(config: ServeConfig) -> Dataset | None:
    """The server's own test data, where it has some: its classes are those of all sites."""
    if config.dataset is None:
        return None
    data: Data = config.dataset.load(config.seed)
    prepared.agreed(data, config.dataset)
    return data.test


def over(server: Server, config: ServeConfig, stop: StopSignal) -> bool:
    """All rounds are trained, somebody asked to stop, or the privacy budget has no room for more."""
    done = server.round_number >= config.rounds
    return stop.asked > 0 or done or not server.within_budget()


def enough(session: SitesSession, config: ServeConfig, stop: StopSignal) -> bool:
    """Wait for enough sites to start a round; raises ConfigError when they stay away."""
    end = time.monotonic() + config.patience
    while not stop.asked:
        here = session.wait_for_sites(1.0)
        if len(here) >= config.minimum:
            return True
        if time.monotonic() > end:
            away = ", ".join(s for s in config.sites if s not in here)
            raise ConfigError(f"waited {config.patience:g} s; away are {away}")
    return False


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
        optimizer=config.optimizer,
        optimizer_args=config.optimizer_args,
        privacy=config.privacy
        and replace(config.privacy, rounds=config.privacy.rounds or config.rounds),
        lr=config.lr or default_lr(config.privacy),
        epochs=config.epochs,
        steps=config.steps,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
    )


def run_id(folder: Path, resume: bool) -> str:
    """The run's name towards the sites: a new one, or that of the run to go on with."""
    if not resume:
        return secrets.token_hex(8)
    try:
        return str(json.loads((folder / "sites.json").read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError) as e:
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
