"""Curves as SVG and shaded tables: pictures that a page holds, any screen scales and paper takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedtorch.run.markup import Markup, concatenated, tag, text

Line = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BELOW = 46, 350, 10, 184
"""Edges of what is drawn: the axes' numbers stand outside."""
MOST_POINTS = 600
DOTTED = 100
"""Rounds up to which every point says its value under the mouse."""
LARGEST_NUMBER = 1e150
"""Beyond it the difference of two numbers may be none."""


@dataclass(frozen=True)
class Curve:
    """A figure over rounds."""

    name: str
    points: Line
    low: Line = ()
    high: Line = ()
    """Ends of the band around it."""
    band: str = ""
    """What the band is, in words."""
    of: str = ""
    """The run it is of, where that is another one: dashed."""


def chart(title: str, curves: Sequence[Curve]) -> Markup:
    """A panel with its curves and a line that says which is which."""
    kept = [c for c in map(_drawable, curves) if c.points]
    if not kept:
        return Markup()
    spots = [p for c in kept for line in (c.points, c.low, c.high) for p in line]
    (left, right), (low, high) = (_range(values) for values in zip(*spots, strict=True))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BELOW - up * (BELOW - TOP), 1)

    parts = [_axes(left, right, low, high, at)]
    shades = {name: k % 4 for k, name in enumerate(dict.fromkeys(c.name for c in kept))}
    for c in kept:
        shade = shades[c.name]
        if c.low:
            edge = [at(*p) for p in (*c.low, *reversed(c.high))]
            parts.append(tag("polygon", points=_points(edge), class_=f"band s{shade}"))
        line = [at(*p) for p in c.points]
        kind = f"line s{shade}{' other' if c.of else ''}"
        parts.append(tag("polyline", points=_points(line), class_=kind))
        if len(line) <= DOTTED:
            parts += [
                tag("circle", tag("title", f"{_called(c)}, round {x:g}: {y:.4g}"), cx=a, cy=b, r=2,
                    class_=f"dot s{shade}")
                for (a, b), (x, y) in zip(line, c.points, strict=True)
            ]  # fmt: skip
    last = "; ".join(f"{_called(c)} {c.points[-1][1]:.4g}" for c in kept)
    box = f"0 0 {WIDTH} {HEIGHT}"
    picture = tag("svg", *parts, viewBox=box, role="img", aria_label=f"{title}: {last}")
    return tag("figure", tag("figcaption", title), picture, _legend(kept, shades), class_="chart")


def _legend(curves: Sequence[Curve], shades: Mapping[str, int]) -> Markup:
    keys = [
        tag(
            "span",
            tag("i", class_=f"key s{shades[c.name]}{' other' if c.of else ''}"),
            _called(c) + (f" (band: {c.band})" if c.low and c.band else ""),
        )
        for c in curves
    ]
    return tag("p", *keys, class_="legend")


def _called(curve: Curve) -> str:
    return f"{curve.name}, {curve.of}" if curve.of else curve.name


def _drawable(curve: Curve) -> Curve:
    """What can be drawn of it: finite numbers, and no more than fit a screen."""
    low = dict(_few(curve.low))
    high = dict(_few(curve.high))
    both = sorted({*low} & {*high})
    ends = [[(x, end[x]) for x in both] for end in (low, high)]
    return replace(curve, points=_few(curve.points), low=ends[0], high=ends[1])


def _few(line: Line) -> Line:
    kept = [(float(x), float(y)) for x, y in line if abs(y) < LARGEST_NUMBER]
    every = -(-len(kept) // MOST_POINTS) or 1
    return kept[:-1:every] + kept[-1:]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > abs(high) * 1e-9:
        return low, high
    return low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)


def _axes(
    left: float,
    right: float,
    low: float,
    high: float,
    at: Callable[[float, float], tuple[float, float]],
) -> Markup:
    rows = [(at(left, y)[1], f"{y:.4g}") for y in ticks(low, high, 5)]
    columns = [(at(x, low)[0], f"{x:.4g}") for x in ticks(left, right, 5, whole=True)]
    return concatenated(
        [
            *(tag("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid") for y, _ in rows),
            *(tag("text", w, x=LEFT - 5, y=y + 4, text_anchor="end") for y, w in rows),
            *(tag("text", w, x=x, y=BELOW + 15, text_anchor="middle") for x, w in columns),
            tag("text", "round", x=RIGHT, y=HEIGHT - 4, text_anchor="end"),
        ]
    )


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers within a range, about so many.

    >>> ticks(0, 1, 4)
    [0.0, 0.5, 1.0]
    >>> ticks(0, 7, 5, whole=True)
    [0, 2, 4, 6]
    """
    size = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= (high - low) / about * 0.999)
    step = max(1, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _points(line: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in line)


Cell = tuple[float | str, str]
"""How dark, from 0 to 1, or the class that says how it looks (``na``: there is nothing); what it says."""

NUMBERS = 12
"""Columns up to which each cell of a map has its value in it."""


def shaded(
    corner: str,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell], Sequence[str]]],
    after: Sequence[str] = (),
    quiet: bool = False,
) -> Markup:
    """A table of shaded cells: rows of a name, cells, and plain words in columns ``after`` them.

    What a cell says stands in it where there are few columns and it is not ``quiet``, else under the mouse.
    """
    small = len(heads) > NUMBERS
    every = max(3, -(-len(heads) // 10)) if small else 1
    head = [tag("th", corner, scope="col")]
    head += [tag("th", h, scope="col", class_="n") for h in after]
    spans = [heads[k : k + every] for k in range(0, len(heads), every)]
    head += [
        tag("th", s[0], scope="col", class_="n" if not small else None,
            colspan=len(s) if len(s) > 1 else None)
        for s in spans
    ]  # fmt: skip
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", w, class_="n") for w in words),
            *(
                tag(
                    "td",
                    "" if small or quiet else said,
                    class_=_shade(dark),
                    title=f"{name}, {h}: {said}",
                )
                for (dark, said), h in zip(cells, heads, strict=True)
            ),
        )
        for name, cells, words in rows
    ]
    kind = f"map{' small' if small else ' quiet' if quiet else ''}"
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_=kind),
        class_="wide",
    )


def _shade(dark: float | str) -> str:
    return dark if isinstance(dark, str) else f"h{min(9, max(0, int(dark * 10)))}"


def scale(low: str, high: str) -> Markup:
    """A line that says what light and dark stand for."""
    steps = [tag("i", class_=f"h{k}") for k in range(10)]
    return tag("p", text(low), " ", tag("span", *steps, class_="scale"), " ", high, class_="legend")


def some_of(rounds: Sequence[int], most: int) -> list[int]:
    """Some of many rounds, evenly, the last among them."""
    every = max(1, -(-len(rounds) // most))
    return sorted({*rounds[::-every][:most]})
