"""The server: the global model, and one round in the order of the papers' pseudo-code."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedtorch import seeds
from fedtorch.aggregation.mean import Gathering, added
from fedtorch.channel.base import without_unsent
from fedtorch.checks import combination, handed, secure, strategies
from fedtorch.client import Client
from fedtorch.engines import Engine, Local
from fedtorch.engines.travels import Weights
from fedtorch.options import NOT_NEGATIVE, fit, near, within
from fedtorch.privacy import models, persons
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.run import PrivateRun, charge, opened
from fedtorch.recipe import Recipe
from fedtorch.rounds.figures import Metrics, Reports, why_nobody
from fedtorch.rounds.fitting import fitted
from fedtorch.rounds.gather import Gathered, UnderWay, gather, start_sum
from fedtorch.rounds.history import History
from fedtorch.rounds.judged import Judged, asked_of_clients, judging, of_clients
from fedtorch.rounds.moved import Moved
from fedtorch.rounds.observers import Observer, Remembered, asks_to_stop, attending, tell
from fedtorch.rounds.participation import Everyone, Participation
from fedtorch.rounds.schedules import Constant, Schedule
from fedtorch.rounds.state import ServerState
from fedtorch.rounds.synchronous import Demands, Rounds, ServerStep, Synchronous
from fedtorch.rounds.threat import Threat
from fedtorch.strategies.still import sends, uploads
from fedtorch.training.evaluate import Judge, evaluate
from fedtorch.training.losses import Loss
from fedtorch.training.module import load
from fedtorch.training.outline import copied
from fedtorch.training.predict import predict
from fedtorch.training.told import right
from fedtorch.types import TOLD, ConfigError, Params, Task

if TYPE_CHECKING:
    from fedtorch.data.base import Data


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
        # what was handed over, and whether it goes together
        fit("the model", model, nn.Module)
        self.recipe: Recipe = fit("recipe", recipe or Recipe(), Recipe)
        self.participation: Participation = fit("participation", participation, Participation)
        self.pace: Rounds = fit("pace", pace, Rounds)
        self.schedule: Schedule = fit("schedule", schedule, Schedule)
        self.seed: int = fit("seed", seed, int)
        runs_on: Engine = fit("engine", engine or Local(), Engine)
        self.ids = handed.names(fit("the clients", clients, Sequence))
        # several runs may go over one list, each with what its clients remember of it
        clients = [c.apart() if isinstance(c, Client) else c for c in clients]
        self.observers = [
            fit("an observer", o, Observer) for o in fit("observers", observers, Sequence)
        ]
        """Shown what clients send as it arrives, and each round's figures."""
        self.threat = threat
        self.recipe, clients, masks = handed.with_liars(
            self.recipe, clients, participation, pace, self.observers, threat, seed
        )
        # what is trained, what travels, and what is remembered
        self.model = models.mended(model, self.recipe.privacy)
        strategy = self.recipe.strategy.prepare(self.model)
        self._weights = Weights(self.model, replace(self.recipe, strategy=strategy))
        params = self._weights.trained
        self.state = ServerState.first(strategy, params, seed)
        """What is remembered from round to round beside the weights."""
        like = sends(strategy, params, self.extras) | self.recipe.privacy.beside
        self.recipe = replace(self.recipe, strategy=strategy)
        self.recipe = secure.placed(self.recipe, participation.most(len(clients)), like)
        # who trains them, when, and at what price
        self.session = runs_on.open(self.model, clients, self.recipe)
        strategies.check(strategy, params, self.extras)
        self._coded = uploads(strategy, params, self.extras) if self.recipe.channel else {}
        groups = {*like, *self.extras, *strategy.remember(params)} - {"delta", TOLD}
        combination.check(self.recipe, participation, pace, groups)
        asked = Demands.of(self.recipe, participation, handed.sizes(clients), params, self._coded)
        self.under_way = UnderWay(pace, asked)
        persons.check(self.recipe.privacy, clients)
        self.books = opened(self.recipe.privacy, self.ids, like)
        """Calibration, budget and ledger of the privacy plan; without a plan they ask and give nothing."""
        said = handed.notes(self.model, self.recipe, like, self._coded, clients)
        self.notes = [*said, *self.session.notes, *pace.check(asked), *masks, *self.books.check()]
        self.clients = tuple(clients)
        """Those of this run, each with its memory; they stay as they are."""
        self.round_number = 0
        self.history = History()
        """Figures of all rounds that ``fit`` trained, those of one that was interrupted too."""
        self.remembered = Remembered()
        """What callbacks remember that are not here now."""
        self.visits = Reports()
        """What each client of the last round reported."""
        self.last_step: Params = {}
        """What the last round added to the trainable weights; nothing while one is under way."""
        self.nobody = False
        """Whether no client counted in the last round, and nothing was released."""

    @property
    def trainable(self) -> list[str]:
        """Names of the weights that are trained and everybody's."""
        return list(self._weights.trained)

    @property
    def extras(self) -> dict[str, Params]:
        """Groups of the strategy that are broadcast."""
        return self.state.extras

    @property
    def private(self) -> PrivateRun | None:
        """The privacy plan's calibration, budget and ledger; None: the run is not private."""
        return self.books if isinstance(self.books, PrivateRun) else None

    def round(self) -> Metrics:
        """One round: choose a cohort, let it train, average, step. Returns the round's figures.

        Raises BudgetSpent, before anybody trains, when the privacy budget has no room for it.
        """
        start = time.perf_counter()
        self._weights.unchanged()
        self._weights.back()
        # whom to ask: paid for before anything is sent
        step = self._step()
        self.under_way.drawn = None  # coins serve one round: one that is tried again draws anew
        charge(self.books, step.asked, self.round_number)
        task = self.under_way.tasks[self.round_number] = self._task()
        sampled = time.perf_counter()
        # they train, and are added up as they come
        asked, dtype = sum(map(len, step.asked)), self._weights.dtype
        total = start_sum(self.recipe, self.state.held, task, dtype, asked)
        self.last_step = {}  # its memory may hold the sum of this round
        came = self._gathered(total, step, task)
        trained = time.perf_counter()
        # the model moves
        moved = self._move(task, total, came)
        self.visits, self.last_step, self.nobody = came.reports, moved.delta, moved.nobody
        self.round_number += 1
        self.under_way.land(step)
        # what there is to tell, and who is told
        figures = {
            "round": self.round_number,
            **moved.figures(task, step, came, self.recipe, self._weights.first),
            **moved.told,
            **step.figures,
            **total.figures,
            "seconds_sample": sampled - start,
            "seconds_train": trained - sampled,
            "seconds_aggregate": time.perf_counter() - trained,
            **came.reports.speed(trained - sampled),
        }
        figures["bytes_down"] += total.figures.get("secure_bytes_down", 0)
        return tell(self.observers, self.mark(figures) | self.books.figures(), self.mark)

    def own(self) -> dict[str, Params]:
        """Weights and buffers that clients keep (``strategy.personal``), by id; not of who never trained.

        Empty where clients live elsewhere, as sites do. Nothing noised them on the client's way here.
        """
        shared, strategy = self._weights.now(), self.recipe.strategy
        kept = {i: without_unsent(m) for i, m in self.session.memory().items()}
        found = {i: strategy.own(shared, m, self.extras) for i, m in kept.items()}
        return {i: own for i, own in found.items() if own}

    def model_of(self, id: str) -> nn.Module:
        """A copy of the model with this client's own weights and buffers in it."""
        if id not in self.ids:
            raise ConfigError(f"there is no client {id!r}{near(str(id), self.ids)}; see Server.ids")
        made = copied(self.model)
        load(made, self._weights.now() | self.own().get(id, {}))
        return made

    def mark(self, figures: Metrics) -> Metrics:
        """Under privacy, figures of the clients' data that the guarantee does not cover say so."""
        return self.books.mark(figures)

    def within_budget(self) -> bool:
        """Whether the privacy plan's epsilon has room for another round."""
        return self.books.affordable(self._step().asked, self.round_number)

    @property
    def stopped(self) -> str:
        """Why an observer wants no more rounds, or wanted none in the last fit; empty: none of them."""
        return asks_to_stop(self.observers) or self.remembered.enough

    def rounds(self, n: int) -> Iterator[Metrics]:
        """Train ``n`` more rounds, one at a time, or until the privacy budget is spent."""
        within("rounds", fit("rounds", n, int), NOT_NEGATIVE)
        last = self.round_number + n
        with attending(self, (), (), last, {"round": self.round_number}):
            yield from self._rounds(last)

    def _rounds(self, last: int) -> Iterator[Metrics]:
        while self.round_number < last and not asks_to_stop(self.observers):
            if self.recipe.privacy.budget == "stop" and not self.within_budget():
                return
            figures = self.round()
            if self.nobody:
                warnings.warn(why_nobody(figures), stacklevel=3)
            yield figures

    def moved(self) -> bool:
        """Whether any round has changed a weight that is trained."""
        return self._weights.moved()

    def fit(
        self,
        rounds: int,
        test: Any = None,
        metrics: Mapping[str, Loss | str] | Sequence[str] | None = None,
        *,
        callbacks: Sequence[Observer] = (),
        every: int = 1,
        step: Judge | None = None,
        progress: bool = True,
    ) -> History:
        """Train ``rounds`` more rounds, with a bar on a terminal or in a notebook; all their figures.

        ``test``: data of any kind that a client takes. With it, or ``metrics``, the model is judged before
        the first round and then every so many (``every``): ``test_loss``, what is usual beside the loss or
        ``metrics`` (by name, ``["auroc"]``) or ``step`` as of ``evaluate``; and clients that have
        validation data on those, ``validation_loss``. ``callbacks``: observers of this fit alone,
        ``EarlyStopping``, ``BestModel``, ``Checkpoint``, ``Record`` or your own.

        An interrupt (Ctrl-C, a notebook's stop) ends training after the round; a second one ends it at
        once. Both raise KeyboardInterrupt, and ``server.history`` has what was trained. Raises ConfigError
        before any training where something does not fit.
        """
        within("rounds", fit("rounds", rounds, int), NOT_NEGATIVE)
        fit("callbacks", callbacks, Sequence)
        secure.seen(self.recipe, [fit("a callback", c, Observer) for c in callbacks])
        last = self.round_number + rounds
        self._weights.back()
        asked = any(part is not None for part in (test, metrics, step))
        judge = Judged(self, test, metrics, every, step) if asked else None
        return fitted(self, self._rounds(last), last, judge, callbacks, progress)

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
        chosen = judging(self.recipe, metrics, step)
        return evaluate(self.model, data, chosen, batch_size, step=step)

    def evaluate_clients(
        self,
        metrics: Mapping[str, Loss | str] | Sequence[str] | None = None,
        *,
        step: Judge | None = None,
    ) -> dict[str, dict[str, float]]:
        """The global model on each client's own validation data, with the weights that it keeps, by id.

        Metrics as of ``fit``. No privacy guarantee covers these figures. Raises ConfigError where no client
        has validation data, or an aggregator or a strict plan hides what is a single client's.
        """
        asked_of_clients(self.recipe, self.clients)
        chosen = judging(self.recipe, metrics, step, usual=True)
        return of_clients(self, self.clients, chosen, step)

    def predict(self, x: Any, batch_size: int = 512) -> Any:
        """What the global model gives for inputs ``x``, a row for each example, as ``fedtorch.predict``."""
        return predict(self.model, x, batch_size)

    def save(self, path: str | Path, data: "Data | None" = None) -> None:
        """The global model into a safetensors file, which ``fedtorch.load(path, model)`` reads.

        ``data``: what was loaded, whose classes' names and preparation are kept with it.
        """
        from fedtorch.saved import save  # readers of tables and pictures come with it

        save(path, self.model, data)

    def show(self, weights: Params) -> None:
        """Put other weights into the model, such as the best: training goes on from the last round's.

        ``state_dict()`` holds the last round's as well.
        """
        self._weights.show(weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to go on exactly as this one would.

        Of the model only what has changed or will: a run goes on from the same frozen weights, whose digest
        says so.
        """
        kept = self.remembered.of(self.observers)
        return {
            "round": self.round_number,
            "seed": self.seed,
            **self._weights.state_dict(),
            **self.state.state_dict(),
            "memory": self.session.memory(),
            "privacy": self.books.state_dict(),
            **self.under_way.state_dict(),
            **({"observers": kept} if kept else {}),
        }

    def load_state_dict(self, state: dict[str, Any], ledger: Ledger | None = None) -> None:
        """Go on from ``state_dict()``; raises ConfigError when it belongs to another model.

        ``ledger`` is the privacy ledger where the run kept it in a file (``Ledger.resume``).
        """
        handed.same_parts(self.state_dict(), state)
        model = self._weights.check(state)
        self.books.load_state_dict(state["privacy"], ledger)
        self._weights.aside = None
        load(self.model, model)
        self.round_number, self.seed = state["round"], state["seed"]
        self.state = self.state.loaded(state)
        self.remembered = Remembered(waiting=dict(state.get("observers", {})))
        self.session.restore(state["memory"])
        self.under_way.load_state_dict(state, self.seed)

    def close(self) -> None:
        """Let the engine's workers go."""
        self.session.close()

    def __repr__(self) -> str:
        """Model, clients and progress."""
        return (
            f"Server({type(self.model).__name__}, {len(self.ids)} clients, "
            f"{self.recipe.strategy}, round {self.round_number})"
        )

    def _step(self) -> ServerStep:
        """Whom this round asks and whose work it takes, found once."""
        return self.under_way.step(self.round_number, self.seed, self._cohort)

    def _cohort(self) -> tuple[list[int], list[int]]:
        # client-level privacy draws by coins nobody can foresee, once a round; others come from the seed
        n = len(self.ids)
        chosen = self.recipe.privacy.cohort(n, self.round_number)
        return self.participation.cohort(n, self.seed, self.round_number, chosen, self.ids)

    def _task(self) -> Task:
        lr = self.recipe.learning_rate * self.schedule(self.round_number)
        numbers = self.books.numbers(self.round_number)
        return Task(self._weights.travel(), self.extras, self.round_number, self.seed, lr, numbers)

    def _gathered(self, total: Gathering, step: ServerStep, task: Task) -> Gathered:
        """What came of the visits; one that is cut short leaves clients as they were."""
        before = self.session.memory()
        came = self.under_way.arrivals(step, task, self.ids, self.session, self._weights.copied)
        try:
            return gather(total, came, self.recipe, self._coded, self.observers)
        except BaseException:
            self.session.restore(before)
            raise

    def _released(self, gathered: Gathering, task: Task) -> dict[str, Params] | None:
        """The noised mean, where the server adds the noise; who audits it sends canaries before."""
        if not self.recipe.privacy.central:
            return None
        for observer in self.observers:
            observer.join(gathered, task)
        released = self.books.release(gathered.sums)
        for observer in self.observers:
            observer.noised(released or {})
        return released

    def _move(self, task: Task, gathered: Gathering, came: Gathered) -> Moved:
        """Step from the weights of ``task``; where that is not finite nothing moves."""
        weights, reported = self._weights.first | task.state, len(came.reports.ids)
        # noise comes first: all that the strategy and the server optimizer do is post-processing
        released = None if came.short else self._released(gathered, task)
        means, buffers = gathered.result(weights) if reported else ({}, {})
        if not (means or released):
            return Moved(means, buffers, nobody=True)
        share = self.recipe.privacy.share() or reported / len(self.ids)
        draw = seeds.derive(self.seed, "strategy", "step", self.round_number)
        sent = released or means
        told = self.books.told(sent, task, reported, right(self.recipe) is not None)
        delta, state = self.state.step(self.recipe.strategy, sent, share, weights, draw)
        new = added(weights, delta, {} if released else buffers)
        if new is None or not state.finite:
            return Moved(means, buffers, failed=True, told=told)
        load(self.model, new)
        self.state = replace(state, held=gathered.held)
        return Moved(means, buffers, delta, told=told)
