"""HTML in which nothing is markup by accident: all text is escaped but what ``tag`` has made."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Markup(str):
    """HTML that is whole already."""


UNSEEN = {
    code: "\ufffd"
    for codes in (
        (*range(9), 11, 12, *range(14, 32), *range(127, 160)),  # control characters
        (*range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # words shown in another order
        range(0xD800, 0xE000),  # halves of characters, which no file can hold
    )
    for code in codes
}
"""What a name must not have for a page to show it as it is."""


def text(value: Any) -> Markup:
    """Any value as text of a page; markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value).translate(UNSEEN)))


def tag(name: str, *inside: Any, **attributes: Any) -> Markup:
    """An element. ``class_`` and ``stroke_width`` are the attributes class and stroke-width."""
    given = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{text(str(v))}"'
        for k, v in attributes.items()
        if v is not None
    )
    return Markup(f"<{name}{given}>{concatenated(inside)}</{name}>")


def concatenated(parts: Iterable[Any]) -> Markup:
    """One behind the other."""
    return Markup("".join(map(text, parts)))


def table(heads: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str | None = None) -> Markup:
    """The first cell of each row is its name; numbers stand at the right. Nothing of no rows."""
    lines = [
        tag("tr", tag("th", row[0], scope="row"), *(_cell(value) for value in row[1:]))
        for row in rows
    ]
    head = tag("tr", *(tag("th", h, scope="col") for h in heads)) if heads else ""
    if not lines:
        return Markup()
    whole = tag("table", tag("thead", head) if heads else "", tag("tbody", *lines), class_=class_)
    return tag("div", whole, class_="wide")


def _cell(value: Any) -> Markup:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return tag("td", word(value), class_="n" if number or value is None else None)


def word(value: Any) -> Any:
    """A value as a table shows it: a number in four digits, - for none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else value
