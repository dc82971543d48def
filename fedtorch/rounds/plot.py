"""Figures of a run drawn over its rounds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

Line = Sequence[tuple[float, float]]


class Drawn(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def panels(lines: Mapping[str, Mapping[str, Line]], bands: Mapping[str, tuple[Line, Line]]) -> Any:
    """A panel for each name with its lines over rounds; ``bands``: lower and upper ends of some lines."""
    count = max(len(lines), 1)
    figure = Drawn(figsize=(4.2 * count, 3.2), dpi=80, layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, count, squeeze=False)[0], lines.items(), strict=False
    ):
        for name, line in curves.items():
            rounds, values = zip(*line, strict=True)
            (drawn,) = axes.plot(rounds, values, marker="." if len(line) < 30 else "", label=name)
            if name in bands:
                (low, high), color = bands[name], drawn.get_color()
                ends = [v for _, v in low], [v for _, v in high]
                axes.fill_between(rounds, *ends, color=color, alpha=0.15, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("round")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    return figure
