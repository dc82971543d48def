"""Scores of clients on their own validation data: each client's, their mean, and the worst."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedtorch.training.losses import Loss
from fedtorch.training.metrics import worse

Scores = Mapping[str, Mapping[str, float]]
"""Client -> name of a metric -> figure; NaN where a client's data have none."""


def figures(scores: Scores) -> dict[str, Any]:
    """Mean, lowest and highest of the clients that have the figure, and ``validation_by_client``."""
    if not scores:
        return {}
    found: dict[str, Any] = {}
    for name in _names(scores):
        values = _values(scores, name) or [math.nan]
        found[f"validation_{name}"] = sum(values) / len(values)
        found[f"validation_{name}_min"] = min(values)
        found[f"validation_{name}_max"] = max(values)
    # JSON has no NaN
    each = {
        i: {k: v if math.isfinite(v) else None for k, v in s.items()} for i, s in scores.items()
    }
    return found | {"validation_by_client": each}


def rows(scores: Scores, metrics: Mapping[str, Loss], most: int) -> list[dict[str, Any]]:
    """A table: the mean, the worst (both ends where it is not known which), and ``most`` clients."""
    mean, worst = {"client": "(mean)"}, {"client": "(worst)"}
    for name in _names(scores):
        values = _values(scores, name) or [math.nan]
        low, high = min(values), max(values)
        mean[name] = word(sum(values) / len(values))
        ends = {"low": word(low), "high": word(high), None: f"{word(low)} to {word(high)}"}
        worst[name] = ends[worse(metrics[name]) if name in metrics else None]
    each = [
        {"client": i[:40], **{k: word(v) for k, v in s.items()}}
        for i, s in list(scores.items())[:most]
    ]
    more = [{"client": f"... {len(scores) - most} more"}] if len(scores) > most else []
    return [mean, worst, *each, *more]


def ends(scores: Scores, metrics: Mapping[str, Loss], most: int = 3) -> str:
    """The best and the worst clients by name, in a sentence, by the first metric that is no loss."""
    names = _names(scores)
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


def _names(scores: Scores) -> list[str]:
    return list(dict.fromkeys(k for s in scores.values() for k in s))


def _values(scores: Scores, name: str) -> list[float]:
    return [s[name] for s in scores.values() if not math.isnan(s.get(name, math.nan))]
