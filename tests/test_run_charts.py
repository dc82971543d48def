"""Curves and shaded tables of the report page."""

import pytest

from fedtorch.run.charts import Curve, chart, shaded, some_of, ticks
from fedtorch.run.markup import tag, text


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3e-9, 4e-9), (1e6, 1e6 + 3), (0.97, 0.99), (-1e140, 1e140)]
)
def test_ticks_lie_inside_and_are_a_handful(low, high):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 6 and all(
        low - abs(low) * 1e-6 <= t <= high * (1 + 1e-6) for t in found
    )


def test_what_cannot_be_drawn_is_left_out():
    nan, inf = float("nan"), float("inf")
    assert chart("x", [Curve("a", [])]) == chart("x", [Curve("a", [(1, nan), (2, inf)])]) == ""
    drawn = chart("x", [Curve("a", [(1, nan), (2, 5.0)])])
    assert drawn.count("<circle") == 1 and "nan" not in drawn
    assert "nan" not in chart("x", [Curve("a", [(1, 1e308), (2, -1e308), (3, 1.0)])])


def test_points_lie_where_their_values_are():
    drawn = chart("x", [Curve("a", [(0, 0.0), (10, 1.0)], [(0, -1.0)], [(0, 3.0)])])
    assert 'points="46,140.5 350,97"' in drawn
    assert 'points="46,184 46,10"' in drawn, "the band has the ends that both of its lines have"


def test_a_long_curve_keeps_its_last_point_and_a_file_its_size():
    drawn = chart("x", [Curve("a", [(r, r % 7) for r in range(5001)])])
    assert len(drawn) < 20_000 and "<circle" not in drawn and "x: a 2" in drawn
    assert some_of(range(1, 101), 60)[-1] == 100 and len(some_of(range(1, 101), 60)) == 50
    assert some_of([], 60) == [] and some_of([4], 60) == [4]


def test_many_columns_are_shades_and_few_have_their_values():
    few = shaded("client", ["1", "2"], [("a", [(0.95, "9"), ("na", "none")], ["7"])])
    assert '<td class="h9" title="a, 1: 9">9</td>' in few and ">7</td>" in few
    heads = [str(k) for k in range(25)]
    many = shaded("client", heads, [("a", [(k / 25, str(k)) for k in range(25)], [])])
    assert many.count("colspan") == 8 and ">24</td>" not in many


def test_text_is_escaped_once():
    assert text("<b>&") == "&lt;b&gt;&amp;" and text(text("<")) == "&lt;"
    assert tag("p", tag("b", "<"), title='"') == '<p title="&quot;"><b>&lt;</b></p>'
