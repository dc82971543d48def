"""What a run folder says of clients and classes, and two runs side by side."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedtorch.rounds.history import Scores, by_client
from fedtorch.run.results import Saved, differing
from fedtorch.training.metrics import known, worse
from fedtorch.types import ConfigError

Pair = list[Any]
"""Of run A and of run B; None where one has no such thing."""


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix."""

    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    """Rows are the true class, columns the predicted."""

    def right(self) -> dict[str, float]:
        """Class -> share of its examples that are taken for it; classes without examples are left out."""
        found = zip(self.names, self.counts, strict=True)
        return {n: row[k] / sum(row) for k, (n, row) in enumerate(found) if sum(row)}

    def mistakes(self, most: int) -> list[tuple[str, str, int]]:
        """The most common: true class, what it is taken for, how often."""
        wrong = [
            (name, self.names[k], n)
            for i, (name, row) in enumerate(zip(self.names, self.counts, strict=True))
            for k, n in enumerate(row)
            if n and k != i
        ]
        return sorted(wrong, key=lambda w: -w[2])[:most]


def matrix(run: Saved) -> Matrix | None:
    """The confusion matrix that a run kept, if it did."""
    return of_counts(run.shown.get("confusion"), run.shown.get("classes", ()))


def of_counts(counts: Any, names: Sequence[Any]) -> Matrix | None:
    """From numbers as a file holds them; None where they are no matrix of counts."""
    rows = counts if isinstance(counts, list) else []
    n = len(rows)
    whole = all(isinstance(r, list) and len(r) == n for r in rows)
    if not rows or not whole or not all(type(v) is int and v >= 0 for r in rows for v in r):
        return None
    named = [str(v) for v in names] if isinstance(names, (list, tuple)) else []
    fits = len(named) == n and len({*named}) == n
    return Matrix(named if fits else [str(k) for k in range(n)], rows)


def last_scores(run: Saved) -> Scores:
    """Each client's scores when they were judged last; nothing where they never were."""
    found = by_client(run.history)
    kept = run.summary.get("model_of_round")
    return found.get(kept if isinstance(kept, int) else -1) or next(reversed(found.values()), {})


def of_sites(run: Saved) -> list[dict[str, Any]]:
    """A row for each site of a federation: rounds it reported in, and what travelled."""
    names = run.options.get("sites")
    rows = []
    for name in map(str, names if isinstance(names, list) else ()):
        reported, sent, received, seconds = (
            [
                v
                for mark in ("", "nonprivate_")
                for _, v in run.history.column(f"{mark}site_{name}_{f}")
            ]
            for f in ("reported", "bytes_sent", "bytes_received", "seconds")
        )
        seconds = [s for s in seconds if s]  # of the rounds it reported in
        if reported:
            row = {
                "site": name,
                "rounds reported": f"{sum(reported):.0f} of {len(reported)}",
                "MB to it": round(sum(sent) / 1e6, 3),
                "MB from it": round(sum(received) / 1e6, 3),
                "seconds a round": round(sum(seconds) / len(seconds), 3) if seconds else None,
            }
            rows.append(row)
    return rows


def ends(metric: str) -> str | None:
    """Which figures of a metric are bad, ``low`` or ``high``; None where nobody knows."""
    if metric == "loss":
        return "high"
    with suppress(ConfigError):  # a package that is not here knows it
        found = known(metric)
        return None if found is None else worse(found)
    return None


@dataclass(frozen=True)
class Sides:
    """Runs A and B."""

    options: dict[str, Pair]
    """Those that differ."""
    results: dict[str, Pair]
    clients: dict[str, dict[str, Pair]]
    """Metric -> client, where both have it, the largest difference first."""
    classes: dict[str, Pair]
    """Class -> share of its test examples that are taken for it."""

    def told(self) -> dict[str, Pair]:
        """Options for people: of what one run has not at all, as a privacy plan, only that it has not."""
        left_out = [k for k, pair in self.options.items() if {None, "null"} & {*map(_plain, pair)}]
        return {
            k: pair
            for k, pair in self.options.items()
            if not any(k.startswith(f"{o}.") for o in left_out)
            and any(v not in (None, "", []) for v in pair)
        }


def sides(a: Saved, b: Saved) -> Sides:
    """What differs, and what came of it."""
    options, results = [a.options, b.options], [a.result(), b.result()]
    scores, right = [last_scores(a), last_scores(b)], [_right(a), _right(b)]
    metrics = dict.fromkeys(k for s in scores[0].values() for k in s)
    clients = {
        m: _both(*({i: s[m] for i, s in own.items() if m in s} for own in scores)) for m in metrics
    }
    return Sides(
        {k: [o.get(k) for o in options] for k in differing(options)},
        {k: [r.get(k) for r in results] for k in dict.fromkeys(k for r in results for k in r)},
        {m: dict(sorted(pairs.items(), key=_apart)) for m, pairs in clients.items() if pairs},
        _both(*right) if [*right[0]] == [*right[1]] else {},
    )


def _plain(value: Any) -> str | None:
    return None if value is None else str(value)


def _right(run: Saved) -> dict[str, float]:
    found = matrix(run)
    return {} if found is None else found.right()


def _both(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Pair]:
    return {k: [v, b[k]] for k, v in a.items() if k in b}


def _apart(item: tuple[str, Pair]) -> float:
    a, b = item[1]
    return -abs(float(b - a))
