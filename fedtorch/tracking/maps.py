"""A map with its axes as a PNG file, by Pillow: reading matplotlib would take half a second of each run."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZE = 12
"""Height of a letter's line, in pixels."""

BLUES = "f7fbff deebf7 c6dbef 9ecae1 6baed6 4292c6 2171b5 08519c 08306b"
"""From nothing to all."""

VIRIDIS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
"""From low to high, where neither is nothing."""

INK, EDGE = "#222222", "#555555"


class Axis(NamedTuple):
    """What stands beside or below a map."""

    label: str
    ticks: Mapping[float, str]
    """Place among the cells, 0 for the middle of the first -> what stands there."""
    turned: bool = False
    """Whether what stands there is read from below: long names below a map."""


class Scale(NamedTuple):
    """What colors mean, in a bar of its own."""

    label: str
    low: float
    high: float
    colors: str


class Label(NamedTuple):
    """A word on the map, at a row and a column."""

    row: float
    column: float
    text: str
    color: str = INK


def rgb(colors: str) -> np.ndarray:
    """Hexadecimal colors -> [colors, 3], uint8."""
    return np.array([list(bytes.fromhex(c)) for c in colors.replace("#", "").split()], np.uint8)


def shaded(values: np.ndarray, scale: Scale) -> np.ndarray:
    """A color for each value [rows, columns]; light grey for NaN."""
    known = rgb(scale.colors)
    span = scale.high - scale.low or 1.0
    share = np.clip((values - scale.low) / span, 0, 1) * (len(known) - 1)
    below = np.arange(len(known))
    found = np.stack([np.interp(np.nan_to_num(share), below, c) for c in known.T], -1)
    found[np.isnan(values)] = 0xDD
    return np.round(found).astype(np.uint8)


def marks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from ``low`` to ``high``, of which there are ``most`` at most."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low] if math.isfinite(low) else []
    unit = 10.0 ** math.floor(math.log10(span / most))
    step = next(unit * k for k in (1, 2, 5, 10, 20) if span / (unit * k) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def some(names: Sequence[str], most: int = 10) -> dict[float, str]:
    """Names in equal steps, so many at most, each at its place."""
    every = max(1, -(-len(names) // most))
    return {float(k): names[k] for k in range(0, len(names), every)}


def drawn(
    cells: np.ndarray,
    size: tuple[int, int],
    x: Axis,
    y: Axis,
    *,
    title: str = "",
    scale: Scale | None = None,
    legend: Mapping[str, str] | None = None,
    labels: Sequence[Label] = (),
) -> bytes:
    """Colored cells [rows, columns, 3], ``size`` pixels wide and high in all, with what is told of them.

    ``legend``: what a color stands for -> the color, above the map.
    """
    from PIL import Image, ImageDraw

    (width, height), line = size, SIZE + 4
    height = max(height, _length(y.label), _length(scale.label) if scale else 0)
    left = line + 18 + max(map(_length, y.ticks.values()), default=0)
    below = line + 12 + (max(map(_length, x.ticks.values()), default=0) if x.turned else line)
    bar = {v: f"{v:.4g}" for v in marks(scale.low, scale.high)} if scale else {}
    right = 52 + line + max(map(_length, bar.values()), default=0) if scale else 16
    words = sum(_length(w) + 32 for w in legend or ())
    above = line + 10 if title or legend else 10
    over = (_length(title) - width) // 2 + 12  # of a title longer than the map is wide
    left, right = max(left, over), max(right, over)
    right = max(right, words + 16 - left - width)
    sheet = Image.new("RGB", (left + width + right, above + height + below), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(_enlarged(cells, (width, height)), (left, above))
    draw.rectangle((left - 1, above - 1, left + width, above + height), outline=EDGE)

    # what stands beside it
    rows, columns = cells.shape[:2]
    for place, text in x.ticks.items():
        at = left + (place + 0.5) / columns * width
        draw.line((at, above + height, at, above + height + 3), fill=EDGE)
        if x.turned:
            _upwards(sheet, (at, above + height + 5), text, "top")
        else:
            draw.text((at, above + height + 5), text, INK, _font(), "ma")
    for place, text in y.ticks.items():
        at = above + (place + 0.5) / rows * height
        draw.line((left - 4, at, left - 1, at), fill=EDGE)
        draw.text((left - 7, at), text, INK, _font(), "rm")
    draw.text((left + width / 2, sheet.height - 5), x.label, INK, _font(), "md")
    _upwards(sheet, (4 + line / 2, above + height / 2), y.label, "middle")
    for row, column, text, color in labels:
        at_cell = left + (column + 0.5) / columns * width, above + (row + 0.5) / rows * height
        draw.text(at_cell, text, color, _font(SIZE - 2), "mm")

    # what the colors are
    draw.text((left + width / 2, 5), title, INK, _font(SIZE + 1), "ma")
    at = sheet.width - words
    for word, color in (legend or {}).items():
        draw.rectangle((at, 7, at + 14, 16), fill=color, outline=EDGE)
        draw.text((at + 20, 5), word, INK, _font(), "la")
        at += _length(word) + 32
    if scale:
        ramp = shaded(np.linspace(scale.high, scale.low, 128)[:, None], scale)
        strip = Image.fromarray(ramp).resize((14, height))
        start = left + width + 16
        sheet.paste(strip, (start, above))
        draw.rectangle((start - 1, above - 1, start + 14, above + height), outline=EDGE)
        for v, text in bar.items():
            at = above + height * (1 - (v - scale.low) / (scale.high - scale.low or 1.0))
            draw.line((start + 15, at, start + 18, at), fill=EDGE)
            draw.text((start + 21, at), text, INK, _font(), "lm")
        side = start + 31 + max(map(_length, bar.values()), default=0)
        _upwards(sheet, (side, above + height / 2), scale.label, "middle")
    return _encoded(sheet)


def album(
    pictures: np.ndarray, titles: Sequence[str], heading: str, columns: int, wide: int = 72
) -> bytes:
    """Pictures [N, rows, columns, 3], uint8, side by side and so many pixels wide, each below its title."""
    from PIL import Image, ImageDraw

    tall, step = max(1, round(wide * pictures.shape[1] / pictures.shape[2])), wide + 18
    high = -(-len(pictures) // columns) * (tall + 26) + 40
    sheet = Image.new("RGB", (columns * step + 16, high), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((sheet.width / 2, 8), heading, INK, _font(), "ma")
    for k, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = 16 + k % columns * step, 34 + k // columns * (tall + 26)
        draw.text((left, top), title, INK, _font(SIZE - 2), "la")
        sheet.paste(_enlarged(picture, (wide, tall)), (left, top + 16))
    return _encoded(sheet)


def _enlarged(cells: np.ndarray, size: tuple[int, int]) -> Any:
    """Every cell a rectangle of its color."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(cells)).resize(size, Image.Resampling.NEAREST)


def _encoded(sheet: Any) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    sheet.save(file, "PNG", compress_level=4)
    return file.getvalue()


def _upwards(sheet: Any, at: tuple[float, float], text: str, anchor: str) -> None:
    """Text that is read from below, its ``top`` or ``middle`` at this place."""
    from PIL import Image, ImageDraw

    length = _length(text) + 2
    word = Image.new("RGB", (length, SIZE + 4), "white")
    ImageDraw.Draw(word).text((length / 2, SIZE / 2 + 2), text, INK, _font(), "mm")
    turned = word.rotate(90, expand=True)
    top = at[1] if anchor == "top" else at[1] - length / 2
    sheet.paste(turned, (round(at[0] - turned.width / 2), max(0, round(top))))


def _length(text: str) -> int:
    """Pixels that a line of text takes."""
    return math.ceil(float(_font().getlength(text)))


@cache
def _font(size: int = SIZE) -> Any:
    """matplotlib's, which has the letters of most of Europe, without matplotlib; else Pillow's own."""
    from PIL import ImageFont

    found = find_spec("matplotlib")
    file = Path(found.origin or "").parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found else None
    if file is not None and file.is_file():
        return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
