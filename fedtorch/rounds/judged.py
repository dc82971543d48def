"""How good the model is, round by round: on test data, and on clients' own validation data."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedtorch.client import Client
from fedtorch.options import COUNT, fit, typed, within
from fedtorch.recipe import Recipe
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.observers import Observer, over
from fedtorch.training.evaluate import Judge, evaluate, evaluate_clients
from fedtorch.training.losses import Loss, accuracy, usual_metrics
from fedtorch.training.metrics import by_name
from fedtorch.types import ConfigError

Scores = Mapping[str, Mapping[str, float]]
"""Client -> name of a metric -> figure; NaN where a client's data have none."""

AskedMetrics = Mapping[str, Loss | str] | Sequence[str]
"""Metrics by name, or functions by what to call them."""


def judging(
    recipe: Recipe, metrics: AskedMetrics | None, step: Judge | None = None, usual: bool = False
) -> AskedMetrics:
    """The metrics asked for, or the loss that clients train by; ``usual``: and what is usual beside it.

    A ``step`` tells by itself. Raises ConfigError where the loss is not known, as with a recipe that has a
    step.
    """
    if step is not None:
        return metrics or ()
    if metrics is None:
        return {"loss": recipe.judge} | (usual_metrics(recipe.judge) if usual else {})
    known = usual and recipe.step is None and recipe.local is None
    return ({"loss": recipe.loss} if known else {}) | by_name(metrics)


class Judged(Observer):
    """Scores of a fit: ``test_...``, and ``validation_...`` where clients have validation data."""

    def __init__(
        self, server: Any, test: Any, metrics: AskedMetrics | None, every: int, step: Judge | None
    ) -> None:
        """``every``: rounds between two evaluations; the last is judged in any case."""
        self.server, self.test = server, test
        self.metrics = by_name(judging(server.recipe, metrics, step, usual=True))
        self.step = step
        if test is None and not any(getattr(c, "validation", None) for c in server.clients):
            raise ConfigError(
                "there is nothing to judge by metrics: give fit a test set, fit(rounds, test=(x, y)), or "
                "clients validation data"
            )
        self.every: int = fit("every", every, int)
        within("every", self.every, COUNT)
        self.clients: Sequence[Client] = () if server.recipe.hides else server.clients
        self.last = 0

    def begin(self, server: Any, rounds: int, figures: Metrics) -> None:
        """Know the last round."""
        self.last = rounds

    def look(self) -> Metrics:
        """Scores of the model as it is; those of clients marked where no guarantee covers them."""
        server, found = self.server, dict[str, float]()
        if self.test is not None:
            found = evaluate(server.model, self.test, self.metrics, step=self.step)
            if not found:
                raise ConfigError("test has no examples: leave it out, or give some")
            if server.threat and (rows := server.threat.triggered(self.test)) is not None:
                found |= evaluate(server.model, rows, {"attack_success": accuracy})
        each = of_clients(server, self.clients, self.metrics, self.step)
        own: Metrics = server.mark(by_client(each))
        return {f"test_{k}": v for k, v in found.items()} | own

    def round(self, figures: Metrics) -> Metrics:
        """Scores of a round in which they are due."""
        number = figures["round"]
        due = number % self.every == 0 or over(self.server, self.last)
        if not due:
            return {}
        start = time.perf_counter()
        found = self.look()
        took: Metrics = self.server.mark({"seconds_evaluate": time.perf_counter() - start})
        return found | took


def asked_of_clients(recipe: Recipe, clients: Sequence[Any]) -> None:
    """Raises ConfigError where no single client's figures can be had."""
    if recipe.hides:
        raise ConfigError(
            f"evaluate_clients shows figures of single clients, and aggregator "
            f"{typed(recipe.aggregator)} hides them: take aggregator mean"
        )
    if recipe.privacy.strict:
        raise ConfigError(
            "evaluate_clients tells what the privacy guarantee does not cover, which privacy.strict keeps "
            "back: leave strict out, or evaluate(data) on data that are not the clients'"
        )
    if not any(getattr(c, "validation", None) is not None for c in clients):
        raise ConfigError(
            "no client has validation data: give some, Client(id, data, validation=...) or "
            "divide(data, validation=0.2)"
        )


def of_clients(
    server: Any, clients: Sequence[Client], metrics: AskedMetrics, step: Judge | None
) -> dict[str, dict[str, float]]:
    """Each client's scores on its own validation data, with the weights that it keeps."""
    here = [c for c in clients if getattr(c, "validation", None) is not None]
    own = server.own() if server.recipe.strategy.keeps and here else None
    return evaluate_clients(server.model, here, metrics, own, step)


def by_client(scores: Scores) -> dict[str, Any]:
    """Mean, lowest and highest of the clients that have the figure, and ``validation_by_client``."""
    if not scores:
        return {}
    found: dict[str, Any] = {}
    for name in metrics_of(scores):
        own = values(scores, name) or [math.nan]
        found[f"validation_{name}"] = sum(own) / len(own)
        found[f"validation_{name}_min"] = min(own)
        found[f"validation_{name}_max"] = max(own)
    # JSON has no NaN
    each = {
        i: {k: v if math.isfinite(v) else None for k, v in s.items()} for i, s in scores.items()
    }
    return found | {"validation_by_client": each}


def metrics_of(scores: Scores) -> list[str]:
    """Metrics that any client has."""
    return list(dict.fromkeys(k for s in scores.values() for k in s))


def values(scores: Scores, name: str) -> list[float]:
    """A metric's figures of the clients that have one."""
    return [s[name] for s in scores.values() if not math.isnan(s.get(name, math.nan))]
