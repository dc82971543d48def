"""The server: the global model, and one round in the order of the papers' pseudo-code."""

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedtorch import seeds
from fedtorch.aggregation.mean import Gathering, Held, moved
from fedtorch.aggregation.rows import Robust
from fedtorch.channel import base as channel
from fedtorch.checks import combination, handed, secure, strategies
from fedtorch.checks.model import trainable
from fedtorch.client import Client
from fedtorch.engines import Engine, Local
from fedtorch.engines.travels import Weights
from fedtorch.options import NOT_NEGATIVE, fit, within
from fedtorch.privacy import Privacy, models
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.run import BudgetSpent, PrivateRun, opened
from fedtorch.recipe import Recipe
from fedtorch.rounds.figures import Metrics, Reports, norm, traffic
from fedtorch.rounds.gather import Arrival, Gathered, UnderWay, gather
from fedtorch.rounds.history import History
from fedtorch.rounds.observers import Observer, looks
from fedtorch.rounds.participation import Everyone, Participation
from fedtorch.rounds.progress import Bar
from fedtorch.rounds.schedules import Constant, Schedule
from fedtorch.rounds.synchronous import Asked, Rounds, Step, Synchronous
from fedtorch.rounds.threat import Threat, attacked
from fedtorch.secure.aggregator import SecureSum
from fedtorch.secure.he import EncryptedSum
from fedtorch.secure.roster import LEAST
from fedtorch.strategies import lora
from fedtorch.strategies.base import Strategy, sends, uploads
from fedtorch.training.evaluate import Judge, evaluate
from fedtorch.training.losses import Loss
from fedtorch.training.module import load, statistics
from fedtorch.training.outline import copied
from fedtorch.training.personal import personal, shared
from fedtorch.tree import all_finite, to_float64
from fedtorch.types import ConfigError, Failure, Params, Task

NOBODY = "a round in which no client counted, and the model stays as it was"


class Server:
    """Global weights and the rounds that train them.

    ``model`` is trained in place: at any time ``server.model`` is a plain ``nn.Module`` with the global
    weights. Raises ConfigError when clients, model and recipe do not fit, before any training.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[Client],
        recipe: Recipe | None = None,
        *,
        participation: Participation = Everyone(),
        pace: Rounds = Synchronous(),
        schedule: Schedule = Constant(),
        engine: Engine | None = None,
        seed: int = 0,
        observers: Sequence[Observer] = (),
        threat: Threat | None = None,
    ) -> None:
        """Check everything and start the engine; ``seed`` decides every draw of the run.

        ``threat``: which of the clients lie and how, in a simulation.
        """
        fit("the model", model, nn.Module)
        self.recipe: Recipe = fit("recipe", recipe or Recipe(), Recipe)
        self.participation: Participation = fit("participation", participation, Participation)
        self.pace: Rounds = fit("pace", pace, Rounds)
        self.schedule: Schedule = fit("schedule", schedule, Schedule)
        self.seed: int = fit("seed", seed, int)
        runs_on: Engine = fit("engine", engine or Local(), Engine)
        self.ids = handed.names(fit("the clients", clients, Sequence))
        self.observers = [
            fit("an observer", o, Observer) for o in fit("observers", observers, Sequence)
        ]
        """Shown what clients send as it arrives, and each round's figures."""
        participation.check(len(clients))
        combination.check(self.recipe, participation, pace)
        if isinstance(self.recipe.aggregator, Robust):
            self.recipe.aggregator.check(participation.most(len(clients)), self.ids)
        masks = secure.check(self.recipe, participation, len(clients), self.observers, threat)
        self.threat = threat
        if threat is not None:
            fit("threat", threat, Threat)
            self.recipe, clients = attacked(self.recipe, clients, threat, seed)
            combination.check(self.recipe, participation, pace)
        if self.recipe.privacy.fix_model:
            model = models.fixed(model)
        strategy = combination.settled(self.recipe.strategy, pace).prepare(model)
        self.recipe = replace(self.recipe, strategy=strategy)
        self.model = model
        # what is trained, what travels, and what the server keeps
        own = personal(model, strategy.personal)
        self.trainable = shared(model, strategy.personal)
        trainable(model)
        self._parameters = handed.parameters(model)
        averaged = statistics(model) - own if self.recipe.privacy.statistics else set()
        self._weights = Weights(model, {*self.trainable} | averaged)
        params = {k: self._weights.first[k] for k in self.trainable}
        self._dtype = params[self.trainable[0]].dtype
        with seeds.seeded(seeds.derive(seed, "strategy", "init")):
            self.extras, self.hidden = strategy.init(params), strategy.hold(params)
        """Groups of the strategy: those that are broadcast, and those that are not."""
        self.optimizer_state = strategy.server.init(params) if strategy.server else {}
        like = sends(strategy, params, self.extras)
        self.recipe = replace(self.recipe, privacy=self._placed(like))
        self.session = runs_on.open(model, clients, self.recipe)
        strategies.check(strategy, params, self.extras)
        self._coded = uploads(strategy, params, self.extras) if self.recipe.channel else {}
        # of a client that is elsewhere the server knows the name alone
        sizes = [len(c) for c in clients] if all(hasattr(c, "__len__") for c in clients) else None
        groups = {*like, *self.extras, *strategy.remember(params)} - {"delta"}
        combination.check(self.recipe, participation, pace, groups)
        down = sum(v.numel() * v.element_size() for v in params.values())
        up = channel.bytes_of(self.recipe.channel, self._coded) if self._coded else down
        self.under_way = UnderWay(pace, Asked(self.recipe, participation, sizes, down + up))
        self.books = opened(self.recipe.privacy, self.ids, like)
        """Calibration, budget and ledger of the privacy plan; without a plan they ask and give nothing."""
        self.notes = [
            *lora.notes(model, strategy),
            *self.session.notes,
            *handed.notes(model, self.recipe, like, len(clients)),
            *pace.check(self.under_way.asked),
            *masks,
            *secure.notes(self.recipe, model, simulated=sizes is not None),
            *self.books.check(),
        ]
        self.round_number = 0
        self.held: Held = {}
        """What the aggregator keeps from round to round."""
        self.visits = Reports()
        """What each client of the last round reported."""
        self.last_step: Params = {}
        """What the last round added to the trainable weights."""
        self.failed_step = False
        """Whether the last round's step was not finite, and the round before stands."""
        self.nobody = False
        """Whether no client counted in the last round, and nothing was released."""

    @property
    def private(self) -> PrivateRun | None:
        """The privacy plan's calibration, budget and ledger; None: the run is not private."""
        return self.books if isinstance(self.books, PrivateRun) else None

    def round(self) -> Metrics:
        """One round: choose a cohort, let it train, average, step. Returns the round's figures.

        Raises BudgetSpent, before anybody trains, when the privacy budget has no room for it.
        """
        start = time.perf_counter()
        handed.unchanged(self.model, self._parameters)
        step = self._step()
        self.under_way.drawn = None  # coins serve one round: one that is tried again draws anew
        self._charge(step.asked)
        task = self.under_way.tasks[self.round_number] = self._task()
        sampled = time.perf_counter()
        draw = seeds.derive(self.seed, "aggregator", self.round_number)
        total = self.recipe.aggregator.start(self.held, draw, self._dtype)
        if isinstance(total, EncryptedSum):
            total.expect(sum(map(len, step.asked)))
        if isinstance(total, SecureSum):
            total.expect(sum(map(len, step.asked)), self.recipe.privacy)
        came = gather(total, self._arrivals(step), self.recipe, self._coded, self.observers)
        self.visits = came.reports
        trained = time.perf_counter()
        means, buffers = self._move(self._weights.first | task.state, total)
        self.round_number += 1
        self.under_way.land(step)
        figures = {
            "round": self.round_number,
            **self._figures(task, step, came, means, buffers),
            **step.figures,
            **total.figures,
            "seconds_sample": sampled - start,
            "seconds_train": trained - sampled,
            "seconds_aggregate": time.perf_counter() - trained,
            **self.visits.speed(trained - sampled),
        }
        figures["bytes_down"] += total.figures.get("secure_bytes_down", 0)
        figures = self.mark(figures) | self.books.figures()
        for observer in self.observers:
            own = observer.round(figures) or {}
            # who was shown the work of clients may tell what the guarantee does not cover
            figures |= self.mark(dict(own)) if looks(observer) else own
        return figures

    def own(self) -> dict[str, Params]:
        """Weights and buffers that clients keep (``strategy.personal``), by id; not of who never trained.

        Empty where clients live elsewhere, as sites do. Nothing noised them on the client's way here.
        """
        shared, strategy = self._weights.now(), self.recipe.strategy
        found = {i: strategy.own(shared, m, self.extras) for i, m in self.session.memory().items()}
        return {i: own for i, own in found.items() if own}

    def model_of(self, id: str) -> nn.Module:
        """A copy of the model with this client's own weights and buffers in it."""
        if id not in self.ids:
            raise ConfigError(f"there is no client {id!r}")
        made = copied(self.model)
        load(made, self._state() | self.own().get(id, {}))
        return made

    def mark(self, figures: Metrics) -> Metrics:
        """Under privacy, figures of the clients' data that the guarantee does not cover say so."""
        return self.books.mark(figures)

    def within_budget(self) -> bool:
        """Whether the privacy plan's epsilon has room for another round."""
        return all(self.books.affordable(who, self.round_number) for who in self._step().asked)

    def rounds(self, n: int) -> Iterator[Metrics]:
        """Train ``n`` more rounds, one at a time, or until the privacy budget is spent."""
        within("rounds", fit("rounds", n, int), NOT_NEGATIVE)
        for _ in range(n):
            if self.recipe.privacy.budget == "stop" and not self.within_budget():
                return
            try:
                figures = self.round()
            except BudgetSpent:  # whoever is asked twice in a round may have room for once
                if self.recipe.privacy.budget == "error":
                    raise
                return
            if self.nobody:
                warnings.warn(f"{NOBODY}: {_why(figures)}", stacklevel=2)
            yield figures

    def moved(self) -> bool:
        """Whether any round has changed a weight that is trained."""
        now, first = self._weights.now(), self._weights.first
        return any(not torch.equal(now[k], first[k]) for k in self.trainable)

    def fit(self, rounds: int, progress: bool = True) -> History:
        """Train ``rounds`` more rounds, with a bar on a terminal or in a notebook; all their figures."""
        history = History()
        with closing(Bar(self.round_number + rounds)) as bar:
            for figures in self.rounds(rounds):
                history.append(figures)
                if progress:
                    bar.round(figures)
        return history

    def evaluate(
        self,
        data: Any,
        metrics: Mapping[str, Loss | str] | Sequence[str] | None = None,
        batch_size: int | None = 512,
        *,
        step: Judge | None = None,
    ) -> dict[str, float]:
        """The global model on ``data`` of any kind that a client takes; see ``fedtorch.evaluate``.

        Without ``metrics`` or ``step`` it is the loss that clients train by. Raises ConfigError where that
        is not known, as with a recipe that has a step.
        """
        if metrics is None and step is None:
            if self.recipe.step is not None or self.recipe.local is not None:
                raise ConfigError(
                    "what to judge by is not known where clients train by a step of their own: give "
                    "metrics, or step=fn, which returns output and target, or figures by name"
                )
            metrics = {"loss": self.recipe.loss}
        return evaluate(self.model, data, metrics or (), batch_size, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to go on exactly as this one would.

        Of the model only what has changed or will: a run goes on from the same frozen weights, whose digest
        says so.
        """
        model = self._weights.travel()
        return {
            "round": self.round_number,
            "seed": self.seed,
            "model": model,
            "base": self._weights.rest(model),
            "extras": self.extras,
            "optimizer": self.optimizer_state,
            "memory": self.session.memory(),
            "privacy": self.books.state_dict(),
            **self.under_way.state_dict(),
            **({"aggregator": self.held} if self.held else {}),
            **({"hidden": self.hidden} if self.hidden else {}),
        }

    def load_state_dict(self, state: dict[str, Any], ledger: Ledger | None = None) -> None:
        """Go on from ``state_dict()``; raises ConfigError when it belongs to another model.

        ``ledger`` is the privacy ledger where the run kept it in a file (``Ledger.resume``).
        """
        missing = [k for k in self.state_dict() if k not in {"base", *state}]
        if missing:
            raise ConfigError(f"the checkpoint has no {missing[0]!r}: another version wrote it")
        model = self._weights.first | state["model"]
        handed.same_shapes(self._weights.first, model)
        if "base" in state and state["base"] != self._weights.rest(state["model"]):
            raise ConfigError(
                "the checkpoint is of another model: its frozen weights or constants are not these; make "
                "the Server with the model as it was before training"
            )
        self.books.load_state_dict(state["privacy"], ledger)
        load(self.model, model)
        self.round_number, self.seed = state["round"], state["seed"]
        self.extras, self.optimizer_state = state["extras"], state["optimizer"]
        self.session.restore(state["memory"])
        self.under_way.load_state_dict(state, self.seed)
        self.held, self.hidden = state.get("aggregator", {}), state.get("hidden", self.hidden)

    def close(self) -> None:
        """Let the engine's workers go."""
        self.session.close()

    def __repr__(self) -> str:
        """Model, clients and progress."""
        return (
            f"Server({type(self.model).__name__}, {len(self.ids)} clients, "
            f"{self.recipe.strategy}, round {self.round_number})"
        )

    def _step(self) -> Step:
        """Whom this round asks and whose work it takes, found once."""
        return self.under_way.step(self.round_number, self.seed, self._cohort)

    def _cohort(self) -> tuple[list[int], list[int]]:
        # client-level privacy draws by coins nobody can foresee, once a round; others come from the seed
        n = len(self.ids)
        chosen = self.recipe.privacy.cohort(n, self.round_number)
        return self.participation.cohort(n, self.seed, self.round_number, chosen, self.ids)

    def _charge(self, asked: list[list[int]]) -> None:
        # before anything is sent: what is asked for is paid for, whatever comes back
        for who in asked:
            if not self.books.affordable(who, self.round_number):
                raise BudgetSpent(
                    f"round {self.round_number + 1} would spend more than the privacy plan's epsilon: "
                    "the model so far is the last the budget pays for"
                )
            self.books.charge(who, self.round_number)

    def _task(self) -> Task:
        lr = self.recipe.learning_rate * self.schedule(self.round_number)
        numbers = self.books.numbers(self.round_number)
        return Task(self._weights.travel(), self.extras, self.round_number, self.seed, lr, numbers)

    def _placed(self, like: dict[str, Params]) -> Privacy:
        """The plan, which under masks must know how many there are, of clients and of numbers."""
        plan, masks = self.recipe.privacy, self.recipe.secure
        if masks is None or not plan.masked:
            return plan
        most = self.participation.most(len(self.ids))
        numbers = sum(v.numel() for p in like.values() for v in p.values())
        return plan.placed(most, max(LEAST, masks.needed(most)), numbers)

    def _state(self) -> Params:
        """A copy of the model's parameters and buffers, on the CPU."""
        return {k: v.clone() for k, v in self._weights.now().items()}

    def _arrivals(self, step: Step) -> Iterator[Arrival]:
        """Let them train; first who was lost on the way."""
        for i, why in step.lost.items():
            yield Arrival(Failure(self.ids[i], *why), self.under_way.tasks[self.round_number], 1.0)
        for ids, task, due in self.under_way.visits(step, self.ids):
            now = self._state() if due.mixes else None
            self.session.submit(ids, task)
            for outcome in self.session.collect():
                yield Arrival(outcome, task, due.factor, now)

    def _move(self, state: Params, gathered: Gathering) -> tuple[dict[str, Params], Params]:
        """Step from ``state``; returns what was sent as one, before any noise, and the buffers so.

        A step that is not finite is not taken: the round has failed, and what the server keeps stays.
        """
        strategy, reported = self.recipe.strategy, len(self.visits.ids)
        self.failed_step = False
        # noise comes first: all that the strategy and the server optimizer do is post-processing
        few = isinstance(gathered, SecureSum | EncryptedSum) and gathered.short()
        released = None if few else self.books.release(gathered.sums)
        means, buffers = came = gathered.result(state) if reported else ({}, {})
        self.nobody = not (means or released)
        delta: Params = {}
        if means or released:
            sent, buffers = (released, {}) if released else (means, buffers)
            share = self.recipe.privacy.share()
            computes = strategy.server is not None or type(strategy).step is not Strategy.step
            if computes:  # with what was sent, and does not only add it
                sent = {g: to_float64(v) for g, v in sent.items()}
            known = self.extras | self.hidden
            kept = self.optimizer_state
            draw = seeds.derive(self.seed, "strategy", "step", self.round_number)
            # what a step of the user's own draws at random, a resumed run draws again
            with seeds.seeded(draw) if computes else nullcontext():
                delta, extras = strategy.step(sent, known, share or reported / len(self.ids))
                if strategy.server is not None:
                    delta, kept = strategy.server.step_from(state, delta, kept)
            new = moved(state, delta, buffers)
            # one infinite moment would keep the optimizer from ever moving again
            if new is None or not all(map(all_finite, [*extras.values(), *kept.values()])):
                self.failed_step, delta = True, {}
            else:
                self.optimizer_state, self.held = kept, gathered.held
                self.hidden = {g: extras[g] for g in self.hidden}
                self.extras = {g: v for g, v in extras.items() if g not in self.hidden}
                load(self.model, new)
        self.last_step = delta
        return came

    def _figures(
        self, task: Task, step: Step, came: Gathered, means: dict[str, Params], buffers: Params
    ) -> Metrics:
        kinds = [f.kind for f in came.failed]
        reported, mean = len(self.visits.ids), means.get("delta")
        step_norm = norm(self.last_step)
        # the step often is the mean
        mean_norm = step_norm if mean is self.last_step else norm(mean) if mean else None
        if not self.recipe.aggregator.linear:
            mean_norm = None  # a cosine to the mean is one of a weighted mean
        sent = {"buffers": buffers} | ({} if self._coded else means)
        asked = sum(map(len, step.asked))
        return {
            "lr": task.lr,
            # in the order of their ids: chunks are formed by size, which is nobody's to know
            "cohort": sorted(self.visits.ids),
            "failed": {f.id: f.kind for f in sorted(came.failed, key=lambda f: f.id)},
            "clients": reported,
            "dropped": kinds.count("dropped"),
            "nonfinite": kinds.count("nonfinite"),
            **self.visits.figures(mean_norm),
            "step_norm": step_norm,
            **({"step_failed": 1} if self.failed_step else {}),
            **({"nobody": 1} if self.nobody else {}),
            **traffic(
                task, self._weights.first, sent, asked=asked, reported=reported, coded=came.coded
            ),
        }


def _why(figures: Metrics) -> str:
    failed = figures.get("failed") or figures.get("nonprivate_failed") or {}
    kinds = Counter(failed.values())
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nobody was there"
