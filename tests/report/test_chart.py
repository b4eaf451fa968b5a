"""Charts: axes, lines, thinning."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.report.chart import Series, bars, line_chart, smoothed, thinned, ticks


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 8))
def test_ticks_are_round_even_and_enclose_what_they_are_for(low: float, width: float, about: int) -> None:
    high = low + width
    found = ticks(low, high, about)
    assert 2 <= len(found) <= about + 3
    step = found[1] - found[0]
    slack = step / 1e3 + 1e-9 * max(abs(low), abs(high))  # rounding of the numbers themselves
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert all(math.isclose(b - a, step, abs_tol=slack) for a, b in pairwise(found))


def test_ticks_of_one_value_have_room_around_it() -> None:
    assert ticks(0.0, 0.0, 5)[0] < 0 < ticks(0.0, 0.0, 5)[-1]
    assert ticks(3.0, 3.0, 5)[0] < 3 < ticks(3.0, 3.0, 5)[-1]


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert [y for _, y in smoothed([(1, 4.0), (2, 4.0), (3, 4.0)])] == pytest.approx([4.0, 4.0, 4.0])
    values = [y for _, y in smoothed([(x, float(x == 0)) for x in range(100)])]
    assert values[0] == 1.0 and values == sorted(values, reverse=True) and values[-1] < 1e-4


def test_thinning_keeps_the_mean_and_few_points_as_they_are() -> None:
    few = [(1, 2.0), (2, 3.0)]
    assert thinned(few) == few
    many = [(float(x), float(x % 7)) for x in range(7000)]
    found = thinned(many, 100)
    assert len(found) == 100
    assert sum(y for _, y in found) / 100 == pytest.approx(sum(y for _, y in many) / 7000)


def test_a_chart_is_well_formed_and_lies_within_its_box() -> None:
    chart = line_chart(
        "Loss <b>", [Series("a & b", [(1, 1.0), (2, math.nan), (3, 5.0)]), Series("", [(2, 2.0)], "dots", "b")], str
    )
    figure = ElementTree.fromstring(chart)
    svg = figure.find("svg")
    assert svg is not None
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    for circle in svg.iter("circle"):
        assert 0 < float(circle.attrib["cx"]) < width and 0 < float(circle.attrib["cy"]) < height
    assert len([path for path in svg.iter("path") if path.attrib["class"] == "line a"]) == 1
    assert "nan" not in chart and "from step 1 to 3" in svg.attrib["aria-label"]
    assert [span.text for span in figure.iter("span")] == ["a & b"]


def test_an_axis_from_zero_stays_there_where_every_value_is_zero() -> None:
    """Answers of which none was right yet once had an axis from -60 % to 60 %."""
    chart = line_chart("Right", [Series("", [(0, 0.0), (9, 0.0)])], "{:.0%}".format, from_zero=True)
    texts = [text.text for text in ElementTree.fromstring(chart).iter("text")]
    assert texts[:6] == ["0%", "20%", "40%", "60%", "80%", "100%"] and texts[-1] == "step"


def test_few_values_are_hardly_smoothed() -> None:
    """A mean over ten steps lay far above the losses of a run of fifteen."""
    falling = [(float(x), 15.0 - x) for x in range(15)]
    assert smoothed(falling[:10]) == falling[:10]
    assert all(abs(y - value) < 0.6 for (_, y), (_, value) in zip(smoothed(falling), falling, strict=True))


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("Loss", [Series("", [])], str) == line_chart("Loss", [Series("", [(1, math.nan)])], str) == ""


def test_bars_are_as_long_as_their_counts() -> None:
    rows = ElementTree.fromstring(bars("Rows", [("1-32", 5), ("33-64", 10), ("65-66", 0)])).findall(".//div")
    assert [row.attrib["style"] for row in rows] == ["width:50.0%", "width:100.0%", "width:0.0%"]
    assert "width:0.0%" in bars("Rows", [("1-32", 0)])
