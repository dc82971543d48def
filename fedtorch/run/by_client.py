"""Scores of clients on their own validation data: each client's, their mean, and the worst."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedtorch.rounds.judged import Scores, metrics_of, values
from fedtorch.rounds.judged import by_client as figures
from fedtorch.training.losses import Loss
from fedtorch.training.metrics import worse

__all__ = ["ends", "figures", "markdown", "rows", "title", "word"]


HEADS = ("mean", "deviation", "worst")
"""What stands above the clients in a table."""


def rows(scores: Scores, metrics: Mapping[str, Loss], most: int) -> list[dict[str, Any]]:
    """A table: mean, standard deviation and worst (or both ends) over clients, and ``most`` of these."""
    mean, spread, worst = ({"client": f"({head})"} for head in HEADS)
    for name in metrics_of(scores):
        own = values(scores, name) or [math.nan]
        low, high = min(own), max(own)
        mean[name] = word(statistics.fmean(own))
        spread[name] = word(statistics.pstdev(own) if all(map(math.isfinite, own)) else math.nan)
        ends = {"low": word(low), "high": word(high), None: f"{word(low)} to {word(high)}"}
        worst[name] = ends[worse(metrics[name]) if name in metrics else None]
    each = [
        {"client": i[:40], **{k: word(v) for k, v in s.items()}}
        for i, s in list(scores.items())[:most]
    ]
    more = [{"client": f"... {len(scores) - most} more"}] if len(scores) > most else []
    return [mean, spread, worst, *each, *more]


def ends(scores: Scores, metrics: Mapping[str, Loss], most: int = 3) -> str:
    """The best and the worst clients by name, in a sentence, by the first metric that is no loss."""
    names = metrics_of(scores)
    name = next((n for n in names if n != "loss"), names[0])
    order = sorted((s[name], i) for i, s in scores.items() if not math.isnan(s.get(name, math.nan)))
    bad = worse(metrics[name]) if name in metrics else None
    first, last = ("lowest", "highest") if bad is None else ("worst", "best")
    if bad == "high":
        order.reverse()
    few = min(most, len(order) // 2) or len(order)
    low, high = order[:few], order[-few:][::-1]
    groups = [(last, high), (first, low)] if len(order) > 1 else [("only", low)]
    told = [f"{w} {', '.join(f'{i[:40]} ({v:.3f})' for v, i in g)}" for w, g in groups if g]
    return f"{name.replace('_', ' ')} on their own validation data: {'; '.join(told) or 'none'}"


def title(private: bool) -> str:
    """What stands above the table."""
    return f"{'(not private) ' if private else ''}clients on their own validation data"


def word(value: float) -> str:
    """A figure in four digits; - where there is none."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The same table for a text panel."""
    names = list(table[0])
    lines = [names, ["---"] * len(names), *([r.get(n, "") for n in names] for r in table)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
