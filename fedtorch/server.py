"""The server: the global model, and one round in the order of the papers' pseudo-code."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedtorch.aggregate import Mean
from fedtorch.client import Client, Recipe
from fedtorch.console import Report
from fedtorch.engines import Engine, Local
from fedtorch.history import History
from fedtorch.metrics import Metrics, Visits, length, traffic
from fedtorch.participation import Everyone, Participation
from fedtorch.privacy.ledger import Ledger
from fedtorch.privacy.run import BudgetSpent, PrivateRun
from fedtorch.schedules import Constant, Schedule
from fedtorch.solvers import load, snapshot
from fedtorch.strategies import Strategy
from fedtorch.tree import expand, finite, row
from fedtorch.types import ConfigError, Context, Failure, Params, Task, Update


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
        participation: Participation = Everyone(),
        schedule: Schedule = Constant(),
        engine: Engine | None = None,
        seed: int = 0,
    ) -> None:
        """Check everything and start the engine; ``seed`` decides every draw of the run."""
        self.ids = [c.id for c in clients]
        if not clients:
            raise ConfigError("there are no clients")
        twice = [i for i, n in Counter(self.ids).items() if n > 1]
        if twice:
            raise ConfigError(f"client ids must differ, but {twice[0]!r} is there twice")
        participation.check(len(clients))
        self.model = model
        self.recipe = recipe or Recipe()
        self.participation = participation
        self.schedule = schedule
        self.seed = seed
        self.round_number = 0
        self.session = (engine or Local()).open(model, clients, self.recipe)
        self.trainable = [k for k, p in model.named_parameters() if p.requires_grad]
        state = snapshot(model)
        params = {k: state[k] for k in self.trainable}
        self.extras = self.recipe.strategy.init(params)
        optimizer = self.recipe.strategy.server
        self.optimizer_state = optimizer.init(params) if optimizer else {}
        self.visits = Visits()
        """What each client of the last round reported."""
        self.last_step: Params = {}
        """What the last round added to the trainable weights."""
        self.watch: Callable[[Update], None] | None = None
        """Shown every update as it arrives; for looking, not for changing."""
        self.private: PrivateRun | None = None
        self.notes = list(self.session.notes)
        if self.recipe.privacy is not None:
            groups = _groups(self.recipe.strategy, params, self.extras)
            self.private = PrivateRun(self.recipe.privacy, self.ids, groups)
            self.notes += self.private.check(self.recipe, participation)

    def round(self) -> Metrics:
        """One round: choose a cohort, let it train, average, step. Returns the round's figures.

        Raises BudgetSpent, before anybody trains, when the privacy budget has no room for it.
        """
        start = time.perf_counter()
        strategy, private = self.recipe.strategy, self.private
        reporting, lost = self._cohort()
        if private:
            if not private.affordable([*reporting, *lost], self.round_number):
                raise BudgetSpent(
                    f"round {self.round_number + 1} would spend more than the privacy plan's epsilon: "
                    "the model so far is the last the budget pays for"
                )
            private.charge([*reporting, *lost], self.round_number)
        lr = self.recipe.lr * self.schedule(self.round_number)
        state = snapshot(self.model)
        task = Task(state, self.extras, self.round_number, self.seed, lr)
        if private:
            task = replace(task, privacy=private.numbers(self.round_number))

        sampled = time.perf_counter()
        self.session.submit([self.ids[i] for i in reporting], task)
        failed = [Failure(self.ids[i], "dropped", "it dropped out") for i in lost]
        mean, chunks = Mean(), []
        for outcome in self.session.collect():
            if isinstance(outcome, Failure):
                failed.append(outcome)
            else:
                mean.add(outcome)
                chunks.append(Visits(outcome.ids, outcome.weight, outcome.metrics))
                if self.watch is not None:
                    self.watch(outcome)
        trained = time.perf_counter()

        # noise comes first: all that the strategy and the server optimizer do is post-processing
        released = private.release(mean.sums()) if private else None
        visits = Visits.of(chunks)
        means, buffers = mean.result() if visits.ids else ({}, {})
        delta: Params = {}
        if visits.ids or released:
            sent, buffers = (released, {}) if released else (means, buffers)
            share = self.recipe.privacy and self.recipe.privacy.share()
            cohort = len(visits.ids) / len(self.ids)
            delta, self.extras = strategy.step(sent, self.extras, share or cohort)
            if strategy.server is not None:
                delta, self.optimizer_state = strategy.server.step(delta, self.optimizer_state)
            load(self.model, self._moved(state, delta, buffers))
        self.visits, self.last_step = visits, delta
        self.round_number += 1
        figures = {
            "round": self.round_number,
            **self._figures(task, failed, means),
            "seconds_sample": sampled - start,
            "seconds_train": trained - sampled,
            "seconds_aggregate": time.perf_counter() - trained,
            **visits.speed(trained - sampled),
        }
        return self.mark(figures) | private.figures() if private else figures

    def mark(self, figures: Metrics) -> Metrics:
        """Under privacy, figures of the clients' data that the guarantee does not cover say so."""
        return self.private.mark(figures) if self.private else figures

    def within_budget(self) -> bool:
        """Whether the privacy plan's epsilon has room for another round."""
        if self.private is None:
            return True
        reporting, lost = self._cohort()
        return self.private.affordable([*reporting, *lost], self.round_number)

    def rounds(self, n: int) -> Iterator[Metrics]:
        """Train ``n`` more rounds, one at a time, or until the privacy budget is spent."""
        for _ in range(n):
            plan = self.recipe.privacy
            if plan and plan.budget == "stop" and not self.within_budget():
                return
            yield self.round()

    def fit(self, rounds: int, progress: bool = True) -> History:
        """Train ``rounds`` more rounds, with a bar on a terminal or in a notebook; all their figures."""
        history = History()
        bar = Report(self.round_number + rounds, self.round_number, lines=False)
        with bar if progress else nullcontext():
            for figures in self.rounds(rounds):
                history.append(figures)
                if progress:
                    bar.round(figures)
        return history

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to go on exactly as this one would."""
        return {
            "round": self.round_number,
            "seed": self.seed,
            "model": snapshot(self.model),
            "extras": self.extras,
            "optimizer": self.optimizer_state,
            "memory": self.session.memory(),
            "privacy": self.private.state_dict() if self.private else None,
        }

    def load_state_dict(self, state: dict[str, Any], ledger: Ledger | None = None) -> None:
        """Go on from ``state_dict()``; raises ConfigError when it belongs to another model.

        ``ledger`` is the privacy ledger where the run kept it in a file (``Ledger.resume``).
        """
        missing = [k for k in self.state_dict() if k not in state]
        if missing:
            raise ConfigError(f"the checkpoint has no {missing[0]!r}: another version wrote it")
        own, other = snapshot(self.model), state["model"]
        wrong = [
            k
            for k in {**own, **other}
            if k not in own or k not in other or own[k].shape != other[k].shape
        ]
        if wrong:
            raise ConfigError(f"the checkpoint is of another model: {wrong[0]!r} does not match")
        if (state["privacy"] is None) != (self.private is None):
            raise ConfigError(
                "the checkpoint and this run do not agree on whether training is private"
            )
        if self.private:
            self.private.load_state_dict(state["privacy"], ledger)
        load(self.model, other)
        self.round_number, self.seed = state["round"], state["seed"]
        self.extras, self.optimizer_state = state["extras"], state["optimizer"]
        self.session.restore(state["memory"])

    def close(self) -> None:
        """Let the engine's workers go."""
        self.session.close()

    def __repr__(self) -> str:
        """Model, clients and progress."""
        return (
            f"Server({type(self.model).__name__}, {len(self.ids)} clients, "
            f"{self.recipe.strategy}, round {self.round_number})"
        )

    def _cohort(self) -> tuple[list[int], list[int]]:
        # client-level privacy draws by coins nobody can foresee; other draws come from the seed
        plan = self.recipe.privacy
        drawn = plan.cohort(len(self.ids), self.round_number) if plan else None
        return self.participation.cohort(len(self.ids), self.seed, self.round_number, drawn)

    def _figures(self, task: Task, failed: list[Failure], means: dict[str, Params]) -> Metrics:
        kinds = [f.kind for f in failed]
        reported = len(self.visits.ids)
        return {
            "lr": task.lr,
            "cohort": list(self.visits.ids),
            "failed": {f.id: f.kind for f in failed},
            "clients": reported,
            "dropped": kinds.count("dropped"),
            "nonfinite": kinds.count("nonfinite"),
            **self.visits.figures(means.get("delta")),
            "step_norm": length(self.last_step),
            **traffic(task, means, asked=reported + len(failed), reported=reported),
        }

    def _moved(self, state: Params, delta: Params, buffers: Params) -> Params:
        # added in float64 and rounded once: one client's own weights come back to the last bit
        new = {k: state[k].double().add_(delta[k]).to(state[k].dtype) for k in self.trainable}
        if not bool(finite(expand(new))):
            raise ConfigError(
                f"round {self.round_number + 1}: the server's step is not finite; lower lr or the "
                "server's learning rate (the model of the round before is kept)"
            )
        # float statistics are averaged; integer counters keep the server's value
        return state | new | {k: v.to(state[k].dtype) for k, v in buffers.items()}


def _groups(strategy: Strategy, params: Params, extras: dict[str, Params]) -> dict[str, Params]:
    """What a client sends, in names and shapes: an upload of a visit that changed nothing."""
    own = {g: expand(m) for g, m in strategy.remember(params).items()}
    shared = {g: expand(e) for g, e in extras.items()}
    ctx = Context(expand(params), shared, own, torch.ones(1), 1.0)
    return {g: row(s, 0) for g, s in strategy.upload(expand(params), ctx)[0].items()}
