"""Pictures of a run as PNG files, drawn without a window system: maps by Pillow, curves by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from torch import Tensor

from fedtorch.tracking.maps import (
    BLUES,
    INK,
    VIRIDIS,
    Axis,
    Label,
    Scale,
    album,
    drawn,
    marks,
    rgb,
    shaded,
    some,
)

MOST_SHOWN = 100
"""Clients, and rounds, that a map shows."""


NAMED = 60
"""Clients whose names stand beside a map."""

HOLDS = "Who holds what"


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def partition_map(ids: Sequence[str], parts: Sequence[Tensor], labels: Tensor | None) -> bytes:
    """Label-by-client heat map, or client sizes where there are no labels; at most 100 clients."""
    count = min(len(ids), MOST_SHOWN)
    names = {float(k): ids[k] for k in range(count)} if count <= NAMED else some([*ids[:count]])
    size = max(280, 18 * count), 200
    below = Axis("client" + _first(len(ids)), names, max(map(len, names.values())) > 3)
    if labels is None:
        return _sizes([len(parts[k]) for k in range(count)], size, below)
    classes = int(labels.max()) + 1
    table = np.stack([np.bincount(labels[parts[k]], minlength=classes) for k in range(count)], 1)
    scale = Scale("examples", float(table.min()), float(table.max()), BLUES)
    beside = Axis("label", some([str(k) for k in reversed(range(classes))], 20))
    return drawn(shaded(table[::-1], scale), size, below, beside, title=HOLDS, scale=scale)


def _sizes(sizes: Sequence[int], size: tuple[int, int], below: Axis) -> bytes:
    """A bar for each client."""
    top, high, wide = max([*sizes, 1]) * 1.05, 200, 10
    levels = (np.arange(high)[::-1, None] + 0.5) / high * top
    inside = (levels < np.repeat(sizes, wide)) & (np.arange(len(sizes) * wide) % wide % 9 > 0)
    cells = np.where(inside[..., None], rgb("4c8bbf"), rgb("ffffff"))
    below = below._replace(ticks={wide * k + wide / 2 - 0.5: n for k, n in below.ticks.items()})
    beside = Axis("examples", {high * (1 - v / top) - 0.5: f"{v:g}" for v in marks(0, top)})
    return drawn(cells, size, below, beside, title=HOLDS)


def participation_map(ids: Sequence[str], rounds: Mapping[int, Mapping[str, int]]) -> bytes:
    """Client by round: 1 reported, 2 dropped out or unusable, 3 left out by a robust rule.

    The first clients, the last rounds.
    """
    steps = sorted(rounds)[-MOST_SHOWN:]
    table = np.array([[rounds[r].get(i, 0) for r in steps] for i in ids[:MOST_SHOWN]])
    words = {"not chosen": "#f2f2f2", "reported": "#4c8bbf", "dropped or unusable": "#d1495b"}
    if (table == 3).any():
        words["left out by the rule"] = "#edae49"
    return drawn(rgb(" ".join(words.values()))[table], *_by_round(ids, steps), legend=words)


def client_map(
    ids: Sequence[str], rounds: Mapping[int, Mapping[str, float | None]], name: str
) -> bytes:
    """Client by round, shaded by a figure of the client's own data; grey where there is none."""
    steps = sorted(rounds)[-MOST_SHOWN:]
    values = [[rounds[r].get(i) for r in steps] for i in ids[:MOST_SHOWN]]
    table = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    there = table[np.isfinite(table)] if np.isfinite(table).any() else np.zeros(1)
    scale = Scale(name, float(there.min()), float(there.max()), VIRIDIS)
    title = f"{name} on each client's validation data"
    return drawn(shaded(table, scale), *_by_round(ids, steps), title=title, scale=scale)


def _by_round(ids: Sequence[str], steps: Sequence[int]) -> tuple[tuple[int, int], Axis, Axis]:
    """Size and axes of a map of clients and rounds."""
    shown = ids[:MOST_SHOWN]
    named = len(shown) <= NAMED
    size = max(280, 7 * len(steps)), max(60, (16 if named else 6) * len(shown))
    names = some([*shown], NAMED) if named else some([str(k) for k in range(len(shown))])
    below = Axis("round", some([str(r) for r in steps]))
    return size, below, Axis("client" + _first(len(ids)), names)


def confusion_matrix(predicted: Tensor, true: Tensor, classes: int) -> bytes:
    """Rows are the true class, columns the predicted; each row shaded by its own share."""
    table = np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    scale = Scale("share of the true class", 0.0, 1.0, BLUES)
    numbers = [
        Label(row, column, str(table[row, column]), "white" if share[row, column] > 0.5 else INK)
        for row, column in zip(*np.nonzero(table), strict=True)
    ]
    side, ticks = max(190, 30 * min(classes, 40)), some([str(k) for k in range(classes)], 20)
    return drawn(
        shaded(share, scale), (side, side), Axis("predicted", ticks), Axis("true", ticks),
        title=f"Test set: {int(np.trace(table))} of {len(true)} right", scale=scale,
        labels=numbers if classes <= 20 else (),
    )  # fmt: skip


def image_grid(images: Tensor, titles: Sequence[str], heading: str, columns: int = 8) -> bytes:
    """Images [N, 1 or 3, rows, columns] side by side, each with a line above it."""
    low, high = float(images.min()), float(images.max())
    shown = ((images - low) / max(high - low, 1e-9)).movedim(1, -1).expand(-1, -1, -1, 3).numpy()
    shown = np.round((1 - shown if images.shape[1] == 1 else shown) * 255).astype(np.uint8)
    return album(shown, titles, heading, columns)


def image_rows(
    rows: Sequence[tuple[str, Tensor, Sequence[str]]], heading: str, most: int = 10
) -> bytes:
    """Rows of pictures [N, 1 or 3, rows, columns] in 0..1, one below another, each with its name.

    Names stand at the left, a word below each picture. ``most`` pictures are shown of each row.
    """
    from matplotlib.figure import Figure

    first = rows[0][1]
    count, high, wide = min(len(first), most), first.shape[2], first.shape[3]
    tall = 0.95 * min(high / wide, 2.0) + 0.25
    figure = Figure(figsize=(2.9 + 0.95 * count, 0.55 + tall * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 2.9 + 0.95 * count)
    axes.set_ylim(0.55 + tall * len(rows), 0)
    axes.axis("off")
    axes.text(0.1, 0.3, heading, fontsize=10, va="center")
    for at, (name, pictures, words) in enumerate(rows):
        top = 0.55 + tall * at
        axes.text(0.1, top + (tall - 0.25) / 2, fill(name, 34), fontsize=8, va="center")
        for k, (picture, word) in enumerate(zip(pictures[:count], words, strict=False)):
            left, shown = 2.8 + 0.95 * k, picture.float().clamp(0, 1).movedim(0, -1).numpy()
            shown = np.repeat(1 - shown, 3, 2) if shown.shape[2] == 1 else shown
            edges = (left, left + 0.9, top + tall - 0.3, top)
            axes.imshow(shown, extent=edges, interpolation="nearest", aspect="auto")
            axes.text(left + 0.45, top + tall - 0.18, word, fontsize=7, ha="center", va="center")
    axes.set_xlim(0, 2.9 + 0.95 * count)
    axes.set_ylim(0.55 + tall * len(rows), 0)
    return _png(figure)


def roc_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], heading: str, least: float
) -> bytes:
    """True over false positive rates on logarithmic axes from ``least`` on, beside guessing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, (false, true) in curves.items():
        axes.step(np.maximum(false, least), np.maximum(true, least), where="post", label=name)
    axes.plot([least, 1], [least, 1], linestyle=":", color="grey", label="guessing")
    axes.axvline(0.01, color="grey", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(least, 1)
    axes.set_ylim(least, 1)
    axes.set_xlabel("false positive rate (others taken for members)")
    axes.set_ylabel("true positive rate (members found)")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right", fontsize="small")
    axes.set_title(heading, fontsize=10)
    return _png(figure)


def epsilon_figure(
    rounds: Sequence[int], curves: Mapping[float, Sequence[float]], title: str
) -> Any:
    """Epsilon over rounds, one line for each noise multiplier; infinite ones are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for noise, epsilons in curves.items():
        axes.plot(rounds, epsilons, marker=".", label=f"{noise:g}")
    axes.set_yscale("log")
    axes.set_xlabel("rounds")
    axes.set_ylabel("epsilon")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(title="noise multiplier")
    axes.set_title(title)
    return figure


def trade_off_figure(points: Sequence[tuple[float, float]], title: str) -> Any:
    """Chance to find a unit over the chance of a false alarm, at most, beside guessing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    alarms, found = [a for a, _ in points], [f for _, f in points]
    axes.fill_between(alarms, found, alpha=0.2)
    axes.plot(alarms, found, label="any test, at most")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey", label="guessing")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(title)
    return figure


def curves(runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> bytes:
    """A panel for each metric with a curve for each run: metric -> run -> (round, value)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(runs), 3.6), layout="constrained")
    for axes, (metric, lines) in zip(
        figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True
    ):
        for name, points in lines.items():
            axes.plot(
                *zip(*points, strict=True), label=name, marker="." if len(points) < 30 else ""
            )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("round")
        axes.set_ylabel(metric.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return _png(figure)


def _first(n: int) -> str:
    return f" (first {MOST_SHOWN} of {n})" if n > MOST_SHOWN else ""
