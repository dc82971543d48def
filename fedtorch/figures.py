"""Pictures for TensorBoard, drawn without a window system."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def partition_figure(ids: Sequence[str], parts: Sequence[Tensor], labels: Tensor | None) -> Any:
    """Label-by-client heat map, or client sizes where there are no labels; at most 100 clients."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    shown = list(range(min(len(ids), 100)))
    figure = Figure(figsize=(max(5.0, 0.22 * len(shown) + 2), 4), layout="constrained")
    axes = figure.add_subplot()
    if labels is None:
        axes.bar(shown, [len(parts[k]) for k in shown])
        axes.set_ylabel("examples")
    else:
        classes = int(labels.max()) + 1
        table = [[int((labels[parts[k]] == c).sum()) for k in shown] for c in range(classes)]
        image = axes.imshow(table, aspect="auto", cmap="Blues", origin="lower")
        figure.colorbar(image, label="examples")
        axes.set_ylabel("label")
        if classes <= 20:
            axes.set_yticks(range(classes))
    if len(shown) <= 30:
        axes.set_xticks(shown, [ids[k][:16] for k in shown], rotation=90 if len(shown) > 10 else 0)
    axes.set_xlabel("client" + (f" (first 100 of {len(ids)})" if len(ids) > 100 else ""))
    axes.set_title("Who got what")
    return figure


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
