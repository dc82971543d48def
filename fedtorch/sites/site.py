"""One organisation's side: it holds the data, does the work, and decides what it will do."""

import logging
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from fedtorch import zoo
from fedtorch.client import Client
from fedtorch.data import Csv, prepared
from fedtorch.data.base import Data
from fedtorch.engines import Local, messages, wire
from fedtorch.engines.messages import Outcome
from fedtorch.engines.wire import Message, MessageError
from fedtorch.evaluate import evaluate
from fedtorch.losses import DEFAULTS, LOSSES, METRICS
from fedtorch.options import COUNT, INSIDE, POSITIVE, check
from fedtorch.sites import plan as plans
from fedtorch.sites.budget import Budget, OverBudget
from fedtorch.sites.memory import VisitMemory
from fedtorch.sites.rpc import Line, Refused, Unreachable
from fedtorch.solvers import load, snapshot
from fedtorch.types import ClientError, ConfigError, Failure, Task, Update

NOBODY = Update((), {}, {}, torch.zeros(0))
"""The update of a site that sends none."""

log = logging.getLogger("fedtorch.site")


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """Every option of a site. ``--config site.toml`` sets them, flags override."""

    server: str = "127.0.0.1:8443"
    """The server, HOST:PORT; its certificate must be for this HOST."""
    name: str = ""
    """This site's name; with keys it must be the name in its certificate."""
    dataset: Any = Csv()
    """This site's own data: csv, npz, idx, ...; e.g. --dataset csv --dataset.path FILE."""
    credentials: str = ""
    """Folder with key.pem, cert.pem and ca.pem."""
    insecure: bool = False
    """No TLS and no keys: only for a server on this very machine."""
    state: str = "site"
    """Folder for memory, privacy ledger and this site's TensorBoard."""
    models: list[str] = field(default_factory=list)
    """Models it will train; none given: every model it has."""
    max_epsilon: float | None = None
    """Most that this site's data may cost, over all runs; given, it takes part only where the noise is
    added here (privacy sample or local)."""
    max_delta: float = 1e-5
    """The delta of that epsilon, and the largest a run may have."""
    max_parameters: int = 100_000_000
    """Largest model it will train."""
    max_megabytes: int = 2000
    """Largest message it will take."""
    patience: float = 3600.0
    """Seconds to go on trying when the server cannot be reached."""
    device: str = "cpu"
    """Where to train: cpu, cuda, ..."""

    def __post_init__(self) -> None:
        """Refuse what cannot be safe, by name."""
        limits = ("max_epsilon", "patience")
        counts = ("max_parameters", "max_megabytes")
        ranges = dict.fromkeys(limits, POSITIVE) | dict.fromkeys(counts, COUNT)
        check(self, "", max_delta=INSIDE, **ranges)
        if bool(self.credentials) == self.insecure:
            raise ConfigError(
                "give --credentials FOLDER (fedtorch keys makes them), or --insecure alone"
            )
        if not self.name:
            raise ConfigError("--name: which of the server's sites is this?")


class Site:
    """The data, the memory, and the line to the server; one to a process."""

    def __init__(self, config: SiteConfig) -> None:
        """Read the data and what an earlier process of this site has left."""
        self.config = config
        self.data: Data = config.dataset.load(0)
        prepared.agreed(self.data, config.dataset)
        log.info("%s", prepared.said(self.data))
        self.client = Client(config.name, self.data.train)
        self.folder = Path(config.state)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.memory = VisitMemory(self.folder)
        except (OSError, ValueError) as e:
            raise ConfigError(f"state folder {config.state!r}: {e}") from e
        self.budget = Budget(self.folder, config.name, config.max_epsilon, config.max_delta)
        keys = Path(config.credentials) if config.credentials else None
        self.limit = config.max_megabytes << 20
        self.line = Line(config.server, keys, config.name, self.limit)
        self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        self.plan: plans.Plan | None = None

    def run(self) -> int:
        """Work until the run is over; 0 then, 1 when the server stayed away or turned us down."""
        away_since, wait = None, 0.5
        while True:
            try:
                if self.plan is None:
                    self._join()
                if self._work():
                    log.info("the run is over")
                    return 0
                away_since, wait = None, 0.5
            except Unreachable as e:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > self.config.patience:
                    log.error("the server has been away too long: %s", e)
                    return 1
                log.warning("cannot reach %s, trying again: %s", self.config.server, e)
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(wait * 2, 30.0)
            except MessageError as e:
                log.error("what the server sent is not to be trusted: %s", e)
                return 1
            except Refused as e:
                log.error("the server refused: %s", e)
                return 1

    def close(self) -> None:
        """Hang up and close files."""
        self.line.close()
        self.writer.close()

    def _join(self) -> None:
        answer = self._ask("join", Message("join"), 30)
        table = answer.facts.get("plan")
        if answer.kind != "plan" or not isinstance(table, dict):
            raise ConfigError("the server's answer is no plan")
        plan = plans.read(table, self.config.models or zoo.names(), self.config.max_parameters)
        self.budget.admit(plan.privacy, self.config.insecure)
        shape = self.data.facts["input_shape"]
        if list(plan.facts.get("input_shape", shape)) != list(shape):
            raise ConfigError(
                f"the run is about examples of shape {list(plan.facts['input_shape'])}, "
                f"but this site's data has {list(shape)}"
            )
        if plan.kind != self.data.kind:
            raise ConfigError(
                f"the run's targets are {plan.kind}, but this site's data was read as "
                f"{self.data.kind}; see --dataset.kind"
            )
        self.model, recipe = plan.build()
        self.session = Local(chunk=1, device=self.config.device).open(
            self.model, [self.client], recipe
        )
        self.schema = messages.schema(snapshot(self.model))
        self.plan = plan
        log.info("joined run %s: %s, %s", plan.run, plan.model, plan.strategy)

    def _work(self) -> bool:
        """One call for work, and the work; True when the run is over."""
        assert self.plan is not None
        answer = self._ask("fetch", Message("fetch", {"run": self.plan.run}), 60)
        if answer.kind == "rejoin":
            self.plan = None
        elif answer.kind == "task":
            self._visit(answer)
        elif answer.kind not in ("wait", "end"):
            raise MessageError(f"the server sent {answer.kind[:40]!r}")
        return answer.kind == "end"

    def _visit(self, message: Message) -> None:
        assert self.plan is not None
        task = messages.read_task(message)
        messages.same_schema(task.state, self.schema)
        if self.plan.privacy:
            try:
                self.plan.privacy.hold(task.privacy)
            except ConfigError as e:
                raise MessageError(f"round {task.round + 1}: {e}") from e
        visit, after = message.facts.get("visit"), message.facts.get("after")
        if not (isinstance(visit, str) and isinstance(after, str) and len(visit) == 32):
            raise MessageError("the task names no visit")
        kept = self.memory.after(after)
        if kept is None:
            log.warning(
                "round %d: memory of visit %s is gone, starting afresh", task.round + 1, after
            )
        self.client.memory = kept or {}
        outcome = self._charged(task) or self._train(task)
        self.memory.keep(visit, self.client.memory)
        facts = {"run": self.plan.run, "visit": visit, "round": task.round}
        reply = messages.outcome_message(outcome, [self.client.id], **facts)
        self._send(Message("report", reply.facts, reply.groups), task)
        self._show(task, outcome)

    def _charged(self, task: Task) -> Outcome | None:
        """Charge this site's own ledger; None when it has room, else the refusal to send."""
        assert self.plan is not None
        try:
            self.budget.charge(self.plan.privacy, task.round, task.privacy.get("noise", 0.0))
        except OverBudget as e:
            log.warning("round %d: not done, %s", task.round + 1, e)
            spent = Failure(self.client.id, "budget", "its privacy budget is spent")
            return Outcome(NOBODY, [spent], {})
        return None

    def _train(self, task: Task) -> Outcome:
        self.session.submit([self.client.id], task)
        try:
            (outcome,) = [*self.session.collect()]
        except ClientError as e:
            # the text may quote a row of data: it stays in this site's own log
            log.error("round %d: %s", task.round + 1, e)
            outcome = Failure(self.client.id, "error", "its model or data raised an error")
        if isinstance(outcome, Failure):
            return Outcome(NOBODY, [outcome], {})
        return Outcome(outcome, [], {})

    def _send(self, message: Message, task: Task) -> None:
        """Report, again and again while the line is down; a late report is let go."""
        data, wait = wire.encode(message), 0.5
        end = time.monotonic() + self.config.patience
        while True:
            try:
                self.line.call("report", data, 600)
                return
            except Refused as e:
                log.warning("round %d: the report was refused: %s", task.round + 1, e)
                return
            except Unreachable as e:
                if time.monotonic() > end:
                    raise
                log.warning("round %d: cannot report, trying again: %s", task.round + 1, e)
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(wait * 2, 30.0)

    def _show(self, task: Task, outcome: Outcome) -> None:
        """This site's own figures, for its own eyes: how the global model does on its test rows."""
        assert self.plan is not None
        metric = DEFAULTS[self.plan.kind][1]
        wanted = {"loss": LOSSES[self.plan.loss], metric: METRICS[metric]}
        load(self.model, task.state)
        scores = evaluate(self.model, self.data.test, wanted)
        figures = {f"site/test_{k}": v for k, v in scores.items()}
        if self.plan.privacy is not None:
            # RDP's bound: a little above what the budget is held to, and much quicker to find
            figures["site/epsilon_at_most"] = self.budget.spent("rdp")
        for name in ("train_loss", "update_norm"):
            # a visit that failed has none, and under strict privacy the loss is not told
            if outcome.update.ids and name in outcome.update.metrics:
                figures[f"site/{name}"] = float(outcome.update.metrics[name])
        for tag, value in figures.items():
            self.writer.add_scalar(tag, value, task.round + 1)
        self.writer.flush()
        told = "  ".join(f"{k.removeprefix('site/')} {v:.4f}" for k, v in figures.items())
        log.info("round %d: %s", task.round + 1, told)

    def _ask(self, method: str, message: Message, seconds: float) -> Message:
        return wire.decode(self.line.call(method, wire.encode(message), seconds), self.limit)
