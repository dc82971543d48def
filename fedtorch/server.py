"""The server: the global model, and one round in the order of the papers' pseudo-code."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedtorch.aggregate import Mean
from fedtorch.client import Client, Recipe
from fedtorch.engines import Engine, Local
from fedtorch.participation import Everyone, Participation
from fedtorch.schedules import Constant, Schedule
from fedtorch.solvers import load, snapshot
from fedtorch.types import ConfigError, Failure, Params, Task

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

    def round(self) -> Metrics:
        """One round: choose a cohort, let it train, average, step. Returns the round's figures."""
        start = time.perf_counter()
        strategy = self.recipe.strategy
        reporting, lost = self.participation.cohort(len(self.ids), self.seed, self.round_number)
        lr = self.recipe.lr * self.schedule(self.round_number)
        state = snapshot(self.model)
        task = Task(state, self.extras, self.round_number, self.seed, lr)

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

        if updates:
            sent, buffers = mean.result()
            cohort = sum(len(ids) for ids, _, _ in updates)
            delta, self.extras = strategy.step(sent, self.extras, cohort / len(self.ids))
            if strategy.server is not None:
                delta, self.optimizer_state = strategy.server.step(delta, self.optimizer_state)
            load(self.model, self._moved(state, delta, buffers))
        self.round_number += 1
        return _figures(self.round_number, lr, updates, failed) | {
            "seconds_train": trained - start,
            "seconds_aggregate": time.perf_counter() - trained,
        }

    def rounds(self, n: int) -> Iterator[Metrics]:
        """Train ``n`` more rounds, one at a time."""
        for _ in range(n):
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; raises ConfigError when it belongs to another model."""
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

    def _moved(self, state: Params, delta: Params, buffers: Params) -> Params:
        # added in float64 and rounded once: one client's own weights come back to the last bit
        new = {k: (state[k].double() + delta[k]).to(state[k].dtype) for k in self.trainable}
        if not all(bool(v.isfinite().all()) for v in new.values()):
            raise ConfigError(
                f"round {self.round_number + 1}: the server's step is not finite; lower lr or the "
                "server's learning rate (the model of the round before is kept)"
            )
        # float statistics are averaged; integer counters keep the server's value
        return state | new | {k: v.to(state[k].dtype) for k, v in buffers.items()}


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
