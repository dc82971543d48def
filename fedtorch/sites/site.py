"""One organisation's side: it holds the data, does the work, and decides what it will do."""

import logging
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedtorch import disk
from fedtorch.checks.outputs import classes_fit
from fedtorch.client import Client
from fedtorch.data import prepared
from fedtorch.data.base import Data
from fedtorch.engines import Local, messages, wire
from fedtorch.engines.messages import Outcome
from fedtorch.engines.wire import Message, MessageError
from fedtorch.privacy.run import BEFORE
from fedtorch.run import huggingface
from fedtorch.secure.refused import Refused as NotSecure
from fedtorch.sites import alike, letters, visits
from fedtorch.sites import offer as plans
from fedtorch.sites.callers import new_process
from fedtorch.sites.curves import Curves
from fedtorch.sites.ends import ENDS
from fedtorch.sites.joined import Joined
from fedtorch.sites.keys import check_named
from fedtorch.sites.ledgers import SiteLedgers
from fedtorch.sites.limits import accept
from fedtorch.sites.masks import HARMLESS, Party
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.parties import Parties
from fedtorch.sites.rpc import NeverOpens, Refused, ServerLine, TooLarge, Unreachable
from fedtorch.sites.sealed import Sealing
from fedtorch.sites.state import Answered, Base, VisitMemory
from fedtorch.sites.statistics import Told, portion, told, words
from fedtorch.training.evaluate import evaluate
from fedtorch.training.module import load
from fedtorch.training.personal import GROUP
from fedtorch.types import ConfigError, OverBudget, Params, Task

if TYPE_CHECKING:
    from fedtorch.sites.relay import NodeLine

MOST_PLAN = 1 << 16
"""Bytes of a plan's header."""
log = logging.getLogger("fedtorch.site")


class Site:
    """The data, the memory, and the line to the server; one to a process."""

    def __init__(self, config: SiteConfig) -> None:
        """Read the data and what an earlier process of this site has left."""
        self.config = config
        self.data: Data = config.dataset.load(0)
        if self.data.persons is not None:
            raise ConfigError(
                "dataset.person: a site does not know how many rows a person has elsewhere: leave the "
                "column out (--dataset.drop), and give the server a public --privacy.person"
            )
        prepared.agreed(self.data, config.dataset)
        log.info("%s", prepared.said(self.data))
        self.unscaled = self.data
        if getattr(config.dataset, "standardize", False) is True:
            log.warning(
                "columns are scaled by this site's own rows, and elsewhere by others: to scale them alike, "
                "give every site the same dataset.bounds, or dataset.standardize private"
            )
        self.client = Client(config.name, self.data.train)
        self.process = new_process()
        self.folder = Path(config.state)
        with ExitStack() as held:
            self._open(held)
            self.held = held.pop_all()
        self.curves = Curves(self.folder / "tensorboard")
        self.joined: Joined | None = None
        self.visits = 0
        """Asked for in this run: those that were answered, by earlier processes too, and those refused."""
        self.offered_again = False
        """Whether the plan was looked at again since the last visit within it."""
        self.parties = Parties(config, self.folder, self.answered)
        self.party: Party | Sealing | None = None
        """This site's part in the attempt at a secure round that is under way."""
        self.unshown: tuple[Joined, Task, Outcome] | None = None
        """The visit whose figures are shown when that round is over."""

    @property
    def server(self) -> str:
        """Where the server is, or what leads to it."""
        engine = self.config.engine
        return f"the SuperNode {engine.address}" if engine else self.config.server

    @property
    def plan(self) -> plans.Plan | None:
        """Of the run that is joined."""
        return self.joined.plan if self.joined else None

    def _open(self, held: ExitStack) -> None:
        """The state folder, as ``held`` will let it go again, and the line to the server."""
        config = self.config
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if warning := held.enter_context(disk.locked(self.folder, "--state")):
                log.warning("%s", warning)
            self.memory = VisitMemory(self.folder)
            self.answered = Answered(self.folder)
            self.told = Told(self.folder)
            self.base = Base(self.folder)
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or e
            raise ConfigError(
                f"state folder {config.state!r} cannot be used: {why}; --state names a folder"
            ) from e
        self.budget = SiteLedgers(self.folder, config.name, config.max_epsilon, config.max_delta)
        charges = sum(map(len, self.budget.ledgers.values()))
        if not config.lost_state:
            self.answered.charged(charges - self.told.charged)
        if charges and not self.answered.path.exists():
            log.warning("%s is not there: visits are counted anew", self.answered.path)
        keys = Path(config.credentials) if config.credentials else None
        if keys:
            check_named(keys, config.name)
        self.limit = config.max_megabytes << 20
        self.line: ServerLine | NodeLine
        if config.engine:
            self.line = config.engine.line(config.name, self.limit, self.folder)
        else:
            self.line = ServerLine(config.server, keys, config.name, self.limit)

    def run(self) -> int:
        """Work until the run is over; 0 when it is done, 1 when it ended early or the server is away."""
        away_since, idle = None, 0
        while True:
            try:
                joined = self.joined or self._join()
                began = time.monotonic()
                answer = self._work(joined)
                kind = answer.kind
                if kind == "end":
                    self._end_party()
                    return _ended(answer.facts.get("why"))
                # an honest server lets a call for work wait itself
                busy = kind in ("task", "phase", "statistics") or time.monotonic() - began > 1
                idle = 0 if busy else idle + 1
                away_since = None
                if idle:
                    _pause(idle)
            except NeverOpens as e:
                raise ConfigError(str(e)) from e
            except Unreachable as e:
                away_since, idle = away_since or time.monotonic(), idle + 1
                if time.monotonic() - away_since > self.config.patience:
                    log.error("the server has been away too long: %s", e)
                    return 1
                log.warning("cannot reach %s, trying again: %s", self.server, e)
                _pause(idle)
            except MessageError as e:
                log.error("what the server sent is not to be trusted: %s", e)
                return 1
            except TooLarge as e:
                raise ConfigError(f"the server cannot be heard: {e}") from e
            except Refused as e:
                log.error("the server refused: %s", e)
                return 1

    def close(self) -> None:
        """Hang up, close files and let the state folder go."""
        self.line.close()
        self.curves.close()
        self.held.close()

    def _join(self) -> Joined:
        answer = self._ask("join", Message("join", {"process": self.process}), 30)
        table = answer.facts.get("plan")
        if answer.kind != "plan" or not isinstance(table, dict):
            raise ConfigError("the server's answer is no plan")
        # what it is, and whether this site takes part in such a run
        other = visits.other_version(answer.facts.get("version"))
        try:
            plan = accept(table, self.config)
        except ConfigError as e:
            raise ConfigError(f"{e}{other and f' ({other})'}") from e
        if other:
            log.warning("%s: the same version everywhere is what is tested", other)
        self._fit(plan)
        model, recipe = plan.build()
        alike.check(model, plan.model, plan.shape, answer.facts.get("model"))
        huggingface.same_weights(model, plan.weights, plan.place)
        recipe = replace(recipe, strategy=recipe.strategy.prepare(model))
        if plan.kind == "classification" and self.data.outputs > 1 and not plan.step:
            # else a step would fail where a row of another class is in it, and tell that there is one
            classes_fit(model, self.data.train, self.data.labels, self.data.outputs)
        derived = bool(self.data.preparation.derived)
        self.budget.admit(recipe, self.config.insecure, derived, self.config.require_secure)
        self.answered.agree(plan, self.budget.most is not None)
        self.party = None
        self.parties.join(plan, recipe, model)
        # statistics of columns come first
        joined = Joined(plan, model, recipe)
        if plan.standardize and not plan.center:
            self.joined = joined
            log.info(
                "joined run %s to tell statistics of columns; %s", plan.run, visits.promise(plan)
            )
            return joined
        # then tasks
        engine = Local(chunk=1, device=self.config.device)
        session = engine.open(model, [self.client], self.budget.told(recipe))
        self.judged = plan.judging(recipe, model, self.data.test)
        joined.open(session, self.base, answer.facts.get("base"))
        self.joined, self.visits = joined, self.answered.visits(plan.run)
        most = min(self.answered.most(plan) or self.config.max_rounds, self.config.max_rounds)
        log.info(
            "joined run %s: %s, %s; %s; %s of at most %s visits are done",
            *(plan.run, plan.model, recipe.strategy, visits.promise(plan)),
            *(f"{self.visits:,}", f"{most:,}"),
        )
        return joined

    def _fit(self, plan: plans.Plan) -> None:
        """Scale this site's data as the plan says; raises ConfigError where it is about others."""
        self.data = self.told.scaled(plan, self.unscaled)
        self.client = Client(self.config.name, self.data.train)
        if plan.center:
            log.info("columns are scaled by private statistics of all sites: %s", words(plan))
        shape = list(self.data.facts.get("input_shape", ()))
        wanted = list(plan.facts.get("input_shape", shape))
        if wanted != shape and not (plan.step and not shape):
            raise ConfigError(
                f"the run is about examples of shape {wanted}, but this site's data has {shape or 'none'}"
            )
        if plan.kind != self.data.kind:
            raise ConfigError(
                f"the run's targets are {plan.kind}, but this site's data was read as "
                f"{self.data.kind}; see --dataset.kind"
            )
        prepared.same_names(self.data, plan.columns, plan.classes)
        huggingface.same_tokens(plan.facts, self.data.facts, plan.model)

    def _work(self, joined: Joined) -> Message:
        """One call for work, and the work; the server's answer."""
        facts = joined.call() | ({"visit": self.party.visit} if self.party else {})
        facts |= {"process": self.process}
        answer = self._ask("fetch", Message("fetch", facts), 60)
        if answer.kind == "rejoin":
            self.joined = None
        elif answer.kind == "task":
            self._visit(joined, answer)
        elif answer.kind == "statistics":
            self._tell(joined.plan, answer)
        elif answer.kind == "phase" and self.parties.any:
            self._take_part(joined, lambda party: party.go_on(answer))
        elif answer.kind not in ("wait", "end"):
            raise MessageError(f"the server sent {wire.short(answer.kind)}")
        return answer

    def _visit(self, joined: Joined, message: Message) -> None:
        plan, task = joined.plan, self._read(joined, message)
        visit, after, saved = visits.visits_of_task(message)
        beyond = self.answered.beyond(plan, task.round)
        if beyond and not self.offered_again:
            # a run that was made longer offers a longer plan, and gives this visit again
            self.joined, self.offered_again = None, True
            return
        if beyond and plan.privacy is None:
            raise MessageError(beyond)
        self.offered_again = bool(beyond)
        self._end_party()
        self.party = self.parties.part(message, plan.run, task)
        self.client.memory = self._memory(joined, task, after)
        self.visits += 1
        outcome = self._declined(plan, task, beyond)
        if outcome is None:
            self.answered.enter(plan)
            outcome = joined.train(self.client, task)
        stay = visits.kept_as(plan, after), visits.kept_as(plan, saved)
        self.memory.keep(visits.kept_as(plan, visit), self.client.memory, *stay)
        if self.party is not None and outcome.update.ids:
            # to look at it takes time, of which phases have little
            self.unshown = joined, task, outcome
            self._take_part(joined, lambda party: party.begin(outcome.update))
            return
        self._send(self._report(plan.run, outcome, visit, task.round), task.round)
        self._show(joined, task, outcome)

    def _tell(self, plan: plans.Plan, message: Message) -> None:
        """Statistics of the columns that the plan names, once in a run; asked again, the same."""
        assert plan.privacy is not None
        if not plan.standardize or plan.center or self.unscaled.asks is None:
            raise MessageError("the server asks for statistics that its plan does not have")
        visit = visits.asked_for(message, "statistics are asked for without a visit")
        outcome, vector = None, self.told.sent(plan.run)
        if vector is None:
            try:
                self.budget.charge_once(plan.privacy)
            except OverBudget as e:
                log.warning("no statistics of columns are told: %s", e)
                outcome = visits.not_done(self.client.id)
            else:
                vector = portion(plan, self.unscaled.asks, self.client.id)
                self.told.keep(plan.run, sent=vector.tolist())
        if vector is not None:
            outcome = told(self.client.id, vector)
        assert outcome is not None  # one of the two
        self._send(self._report(plan.run, outcome, visit, BEFORE), BEFORE)

    def _report(self, run: str, outcome: Outcome, visit: str, round: int) -> Message:
        """What a visit came to, as a report."""
        facts = {"run": run, "visit": visit, "round": round}
        coded = self.joined is not None and bool(self.joined.recipe.channel)
        reply = messages.outcome_message(outcome, [self.client.id], coded, **facts)
        return Message("report", reply.facts, reply.groups)

    def _take_part(self, joined: Joined, step: Callable[[Party | Sealing], Message]) -> None:
        """Report one phase of a secure round; what an honest server may meet with ends the round only."""
        party = self.party
        if party is None:
            raise MessageError("a phase of a visit that this site is not in")
        number = party.task.round
        try:
            self._send(step(party), number)
            if party.done:
                self._end_party()
        except NotSecure as e:
            self.party = None
            if e.kind not in HARMLESS:
                raise MessageError(f"round {number + 1}: {e}") from e
            log.error("round %d: this site declines: %s", number + 1, e)
            declined = visits.not_done(self.client.id, "declined", "")
            self._send(self._report(joined.plan.run, declined, party.visit, number), number)
            self._end_party()

    def _end_party(self) -> None:
        """Nothing more is due in a secure round: now there is time to show what came of it here."""
        self.party = None
        if self.unshown is not None:
            shown, self.unshown = self.unshown, None
            self._show(*shown)

    def _read(self, joined: Joined, message: Message) -> Task:
        """The task in a message; raises MessageError unless it is one of the run, and within its rounds."""
        task, most = joined.read(message), self.config.max_rounds
        if task.round >= most or self.visits >= most:
            raise MessageError(
                f"round {task.round + 1} is beyond this site's max_rounds of {most:,}"
            )
        return task

    def _memory(self, joined: Joined, task: Task, after: str) -> dict[str, Params]:
        """What this site remembers; raises ConfigError where its state folder is another than it was."""
        kept = self.memory.after(visits.kept_as(joined.plan, after))
        if not joined.fits(kept or {}) or (kept is None and self.memory.elsewhere(after)):
            raise MessageError(f"round {task.round + 1} goes on from a visit of another run")
        if kept is not None:
            return kept
        told = (
            f"the server goes on from a visit that this site's state folder {self.config.state!r} does not "
            "know: the folder is new, or older than it was"
        )
        if self.budget.most is not None and not self.config.lost_state:
            raise ConfigError(
                f"{told}, and the ledger in it may lack charges; put the right folder back, or give "
                "--lost-state true if it is gone for good"
            )
        log.warning("round %d: %s; this site starts afresh", task.round + 1, told)
        return {}

    def _declined(self, plan: plans.Plan, task: Task, beyond: str) -> Outcome | None:
        """Charge this site's own ledger; None when it has room, and the plan too, else what to send."""
        try:
            if beyond:
                raise OverBudget(beyond)
            if isinstance(self.party, Sealing) and self.party.declined:
                log.error("round %d: this site declines: %s", task.round + 1, self.party.declined)
                return visits.not_done(self.client.id, "declined", "")
            noise, figures = task.privacy.get("noise", 0.0), task.privacy.get("figures")
            self.budget.charge(plan.privacy, task.round, noise, figures)
        except OverBudget as e:
            log.warning("round %d: not done, %s", task.round + 1, e)
            return visits.not_done(self.client.id)
        return None

    def _send(self, message: Message, round: int) -> None:
        """Report, again and again while the line is down; a late report is let go."""
        data, times = wire.encode(message), 0
        end = time.monotonic() + self.config.patience
        while True:
            try:
                self.line.call("report", data, 600)
                return
            except Refused as e:
                log.warning("round %d: the report was refused: %s", round + 1, e)
                return
            except Unreachable as e:
                if time.monotonic() > end:
                    raise
                log.warning("round %d: cannot report, trying again: %s", round + 1, e)
                times += 1
                _pause(times)

    def _show(self, joined: Joined, task: Task, outcome: Outcome) -> None:
        """This site's own figures, for its own eyes: how the global model does on its test rows."""
        load(joined.model, task.state | self.client.memory.get(GROUP, {}))
        wanted, judge = self.judged
        scores = evaluate(joined.model, self.data.test, wanted, step=judge)
        figures = {f"site/test_{k}": v for k, v in scores.items()}
        if joined.plan.privacy is not None:
            figures["site/epsilon"] = self.budget.spent()  # the very figure that max_epsilon holds
        for name in ("train_loss", "update_norm"):
            # a visit that failed has none, and under strict privacy the loss is not told
            if outcome.update.ids and name in outcome.update.metrics:
                figures[f"site/{name}"] = float(outcome.update.metrics[name])
        self.curves.draw(figures, task.round + 1)
        told = "  ".join(f"{k.removeprefix('site/')} {v:.4f}" for k, v in figures.items())
        log.info("round %d: %s", task.round + 1, told)

    def _ask(self, method: str, message: Message, seconds: float) -> Message:
        data = self.line.call(method, wire.encode(message), seconds)
        room = MOST_PLAN if self.joined is None else wire.header_room(self.joined.schema)
        room += letters.ROSTER if self.parties.sums is not None else 0
        answer = wire.decode(data, self.limit, room)
        if answer.kind == "second":  # it is no use to start it again
            raise ConfigError(
                f"another process calls as {self.config.name} and is at work already, so the server turns "
                "this one away: give each site a name of its own (--name), or end one of the two"
            )
        return answer


def _ended(why: object) -> int:
    """Say how the run ended; the exit code."""
    if why is None:
        log.info("the run is over")
        return 0
    said = ENDS.get(why) if isinstance(why, str) else None
    log.error("the server ended the run early: %s", said or wire.short(str(why)))
    return 1


def _pause(times: int) -> None:
    """Wait before the next try, longer each time, and not in step with other sites."""
    time.sleep(min(0.5 * 2 ** min(times - 1, 10), 30.0) * random.uniform(0.5, 1))
