"""Pictures of a run as PNG files, drawn without a window system."""

import io
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from torch import Tensor

MOST_SHOWN = 100
"""Clients, and rounds, that a map shows."""


NAMED = 60
"""Clients whose names stand beside a map."""


def _figure(width: float, height: float, left: float = 0, below: float = 0) -> tuple[Any, Any]:
    """A picture and its axes, with so many inches more at the left and below, for names."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    # margins in inches, not matplotlib's automatic layout, which takes longer than the drawing
    width, height = width + left, height + below
    figure = Figure(figsize=(width, height))
    box = (
        (0.75 + left) / width,
        (0.65 + below) / height,
        1 - (0.95 + left) / width,
        1 - (1.05 + below) / height,
    )
    return figure, figure.add_axes(box)


def _room(names: Sequence[str]) -> float:
    """Inches that the longest of these names takes, at the size of ticks."""
    return 0.09 * max((len(name) for name in names), default=0)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def partition_map(ids: Sequence[str], parts: Sequence[Tensor], labels: Tensor | None) -> bytes:
    """Label-by-client heat map, or client sizes where there are no labels; at most 100 clients."""
    shown = list(range(min(len(ids), MOST_SHOWN)))
    names = [ids[k] for k in shown] if len(shown) <= NAMED else []
    turned = _room(names) > 0.45
    figure, axes = _figure(max(5.0, 0.22 * len(shown) + 2), 4, below=turned * _room(names))
    if labels is None:
        axes.bar(shown, [len(parts[k]) for k in shown])
        axes.set_ylabel("examples")
    else:
        classes = int(labels.max()) + 1
        table = np.stack([np.bincount(labels[parts[k]], minlength=classes) for k in shown], 1)
        image = axes.imshow(table, aspect="auto", cmap="Blues", origin="lower")
        figure.colorbar(image, label="examples")
        axes.set_ylabel("label")
        if classes <= 20:
            axes.set_yticks(range(classes))
    if names:
        axes.set_xticks(shown, names, rotation=90 if turned else 0)
    axes.set_xlabel("client" + _first(len(ids)))
    axes.set_title("Who holds what")
    return _png(figure)


def participation_map(ids: Sequence[str], rounds: Mapping[int, Mapping[str, int]]) -> bytes:
    """Client by round: 1 reported, 2 dropped out or unusable, 3 left out by a robust rule.

    The first clients, the last rounds.
    """
    steps = sorted(rounds)[-MOST_SHOWN:]
    shown = ids[:MOST_SHOWN]
    table = np.array([[rounds[r].get(i, 0) for r in steps] for i in shown])
    named = len(shown) <= NAMED
    tall = (0.18 if named else 0.07) * len(shown) + 1.5
    wide = max(5.0, 0.06 * len(steps) + 3)
    figure, axes = _figure(wide, max(2.5, tall), left=_room(shown) if named else 0)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    words = {"not chosen": "#f2f2f2", "reported": "#4c8bbf", "dropped or unusable": "#d1495b"}
    if (table == 3).any():
        words["left out by the rule"] = "#edae49"
    colors = list(words.values())
    edges = (steps[0] - 0.5, steps[-1] + 0.5, len(shown) - 0.5, -0.5)
    axes.imshow(
        table, cmap=ListedColormap(colors), vmin=0, vmax=len(colors) - 1, aspect="auto", extent=edges,
        interpolation="nearest",
    )  # fmt: skip
    figure.legend(
        handles=[Patch(color=c, label=w) for w, c in words.items()],
        loc="upper right", ncols=len(words), fontsize="small", frameon=False,
    )  # fmt: skip
    if named:
        axes.set_yticks(range(len(shown)), shown)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("client" + _first(len(ids)))
    return _png(figure)


def client_map(
    ids: Sequence[str], rounds: Mapping[int, Mapping[str, float | None]], name: str
) -> bytes:
    """Client by round, shaded by a figure of the client's own data; grey where there is none."""
    steps, shown = sorted(rounds)[-MOST_SHOWN:], ids[:MOST_SHOWN]
    values = [[rounds[r].get(i) for r in steps] for i in shown]
    table = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    named = len(shown) <= NAMED
    tall = (0.18 if named else 0.07) * len(shown) + 1.5
    wide = max(5.0, 0.08 * len(steps) + 3)
    figure, axes = _figure(wide, max(2.5, tall), left=_room(shown) if named else 0)
    axes.set_facecolor("#dddddd")
    image = axes.imshow(
        np.ma.masked_invalid(table), aspect="auto", cmap="viridis", interpolation="nearest",
        extent=(-0.5, len(steps) - 0.5, len(shown) - 0.5, -0.5),
    )  # fmt: skip
    figure.colorbar(image, label=name)
    every = max(1, -(-len(steps) // 10))
    axes.set_xticks(range(0, len(steps), every), [str(r) for r in steps[::every]])
    if named:
        axes.set_yticks(range(len(shown)), shown)
    axes.set_xlabel("round")
    axes.set_ylabel("client" + _first(len(ids)))
    axes.set_title(f"{name} on each client's validation data")
    return _png(figure)


def confusion_matrix(predicted: Tensor, true: Tensor, classes: int) -> bytes:
    """Rows are the true class, columns the predicted; each row shaded by its own share."""
    table = np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure, axes = _figure(
        max(4.0, 0.42 * min(classes, 40) + 1.5), max(3.5, 0.36 * min(classes, 40) + 1)
    )
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    if classes <= 20:
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
        for row, column in zip(*np.nonzero(table), strict=True):
            dark = share[row, column] > 0.5
            axes.text(
                column, row, table[row, column], ha="center", va="center",
                color="white" if dark else "black", fontsize=8,
            )  # fmt: skip
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"Test set: {int(np.trace(table))} of {len(true)} right")
    return _png(figure)


def image_grid(images: Tensor, titles: Sequence[str], heading: str, columns: int = 8) -> bytes:
    """Images [N, 1 or 3, rows, columns] side by side, each with a line above it."""
    count, channels, height, width = images.shape
    rows, gap, scale = -(-count // columns), 0.3, max(1, 56 // height)
    tall, wide = round(height * scale * (1 + gap)), round(width * scale * (1 + gap / 2))
    sheet = np.ones((rows * tall, columns * wide, 3), np.float32)
    low, high = float(images.min()), float(images.max())
    shown = ((images - low) / max(high - low, 1e-9)).movedim(1, -1).expand(-1, -1, -1, 3).numpy()
    shown = (1 - shown if channels == 1 else shown).repeat(scale, 1).repeat(scale, 2)
    figure, axes = _figure(1.1 * columns + 0.4, 1.1 * rows * tall / wide + 0.8)
    axes.set_position((0.02, 0.02, 0.96, 1 - 0.5 / figure.get_figheight()))
    for k, (image, title) in enumerate(zip(shown, titles, strict=True)):
        top, left = k // columns * tall + tall - len(image), k % columns * wide
        sheet[top : top + len(image), left : left + image.shape[1]] = image
        axes.text(left, top - 2, title, fontsize=8, va="bottom")
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.axis("off")
    figure.suptitle(heading, fontsize=10)
    return _png(figure)


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
