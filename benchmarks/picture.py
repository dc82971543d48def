"""Curves as a small SVG file: no library, a few kilobytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444", "#00838f", "#ad1457")
WIDE, HIGH, LEFT, TOP, RIGHT, BELOW = 640, 360, 56, 16, 170, 44

Curve = Sequence[tuple[float, float]]


def draw(path: Path, curves: Mapping[str, Curve], x: str, y: str, log: bool = False) -> None:
    """Write the curves, one colour each; ``log``: powers of ten along x."""
    at = (lambda v: math.log10(v)) if log else (lambda v: v)
    points = [p for c in curves.values() for p in c]
    xs, ys = [at(p[0]) for p in points], [p[1] for p in points]
    low, high, least, most = min(xs), max(xs), min(ys), max(ys)

    def place(p: tuple[float, float]) -> str:
        across = (at(p[0]) - low) / (high - low) * (WIDE - LEFT - RIGHT) + LEFT
        down = (most - p[1]) / (most - least) * (HIGH - TOP - BELOW) + TOP
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDE}" height="{HIGH}" fill="white"/>',
    ]
    for k in range(5):
        value = least + (most - least) * k / 4
        height = place((points[0][0], value)).split(",")[1]
        parts.append(
            f'<path d="M{LEFT} {height}H{WIDE - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{height}" text-anchor="end" dy="4">{value:.2g}</text>'
        )
        along = low + (high - low) * k / 4
        where = LEFT + (WIDE - LEFT - RIGHT) * k / 4
        told = 10**along if log else along
        word = f"{told:,.0f}" if told >= 1000 else f"{told:.3g}"
        parts.append(
            f'<text x="{where:.0f}" y="{HIGH - BELOW + 16}" text-anchor="middle">{word}</text>'
        )
    for (name, curve), colour, k in zip(curves.items(), COLOURS, range(99), strict=False):
        line = " ".join(map(place, curve))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{WIDE - RIGHT + 10}" y="{TOP + 14 + 18 * k}" fill="{colour}">{name}</text>'
        )
    middle = (LEFT + WIDE - RIGHT) / 2
    parts += [
        f'<text x="{middle:.0f}" y="{HIGH - 8}" text-anchor="middle">{x}</text>',
        f'<text x="14" y="{HIGH / 2:.0f}" transform="rotate(-90 14 {HIGH / 2:.0f})" '
        f'text-anchor="middle">{y}</text>',
        "</svg>",
    ]
    path.write_text("\n".join(parts) + "\n")
