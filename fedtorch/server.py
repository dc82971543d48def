"""The server: the global model, and one round in the order of the papers' pseudo-code."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedtorch.aggregate import Mean
from fedtorch.client import Client, Recipe
from fedtorch.engines import Engine, Local
from fedtorch.participation import Everyone, Participation
from fedtorch.privacy.ledger import Ledger
from fedtorch.privacy.run import BudgetSpent, PrivateRun
from fedtorch.schedules import Constant, Schedule
from fedtorch.solvers import load, snapshot
from fedtorch.strategies import Strategy
from fedtorch.tree import expand, finite, row
from fedtorch.types import ConfigError, Context, Failure, Params, Task

Metrics = dict[str, Any]
"""One round's figures: numbers, plus ``cohort`` and ``failed`` (lists of client ids)."""


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

        self.session.submit([self.ids[i] for i in reporting], task)
        failed = [Failure(self.ids[i], "dropped", "it dropped out") for i in lost]
        mean, updates = Mean(), []
        for outcome in self.session.collect():
            if isinstance(outcome, Failure):
                failed.append(outcome)
            else:
                mean.add(outcome)
                updates.append((outcome.ids, outcome.metrics, outcome.weight))
        trained = time.perf_counter()

        # noise comes first: all that the strategy and the server optimizer do is post-processing
        released = private.release(mean.sums()) if private else None
        if updates or released:
            sent, buffers = (released, {}) if released else mean.result()
            cohort = sum(len(ids) for ids, _, _ in updates)
            share = self.recipe.privacy and self.recipe.privacy.share()
            delta, self.extras = strategy.step(sent, self.extras, share or cohort / len(self.ids))
            if strategy.server is not None:
                delta, self.optimizer_state = strategy.server.step(delta, self.optimizer_state)
            load(self.model, self._moved(state, delta, buffers))
        self.round_number += 1
        figures = _figures(self.round_number, lr, updates, failed) | {
            "seconds_train": trained - start,
            "seconds_aggregate": time.perf_counter() - trained,
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


def _figures(round_number: int, lr: float, updates: list[Any], failed: list[Failure]) -> Metrics:
    """Put the clients' figures together; means are weighted as the weights are."""
    ids = [i for chunk, _, _ in updates for i in chunk]
    figures: Metrics = {
        "round": round_number,
        "lr": lr,
        "cohort": ids,
        "failed": {f.id: f.kind for f in failed},
        "clients": len(ids),
    }
    if updates:
        weight = torch.cat([w for _, _, w in updates]).double()
        values = {k: torch.cat([m[k] for _, m, _ in updates]).double() for k in updates[0][1]}
        figures["train_loss"] = float((values["train_loss"] * weight).sum() / weight.sum())
        figures["update_norm"] = float((values["update_norm"] * weight).sum() / weight.sum())
        figures["examples"] = int(values["examples"].sum())
    return figures
