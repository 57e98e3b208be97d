"""Charts: coordinates read back from the SVG, ticks by property, bins against NumPy."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemur_jax.report.plots import BINS, SIDE, Panel, Series, chart, compact, linear_ticks, log_ticks


def panel(*series: Series, title: str = "base", end: float = 100) -> Panel:
    return Panel(title=title, end=end, series=series)


def paths(figure: str, kind: str) -> list[list[tuple[float, float]]]:
    """Points of each path of a kind ("line", "range", "dots")."""
    found = re.findall(rf'<path class="{kind} [^"]*" d="([^"]*)"', figure)
    return [
        [tuple(map(float, point.split())) for point in re.findall(r"[\d.]+ [\d.]+", path)] for path in found
    ]


def axis_of(figure: str) -> list[tuple[float, float]]:
    """(value, place from 0 to 1) of the labels of the vertical axis."""
    labels = re.search(r'<div class="y">(.*?)</div>', figure).group(1)
    scale = {"k": 1e3, "M": 1e6}
    return [
        (float(text.rstrip("kM")) * scale.get(text[-1], 1), float(place) / 100)
        for place, text in re.findall(r'bottom:([\d.]+)%">([^<]*)<', labels)
    ]


def series_data(figure: str) -> list[dict]:
    """What the tooltip of the first panel reads."""
    return json.loads(re.search(r'application/json">(.*?)</script>', figure).group(1))[0]["series"]


def test_a_line_lies_where_the_axis_says():
    points = [(0, 1.0), (25, 3.0), (100, 2.0)]
    figure = chart("loss", "nats", [panel(Series(name="a", colour=1, points=points))])
    (v0, p0), *_, (v1, p1) = axis_of(figure)
    for (x, y), (px, py) in zip(points, paths(figure, "line")[0], strict=True):
        assert px == pytest.approx(SIDE * x / 100)
        assert 1 - py / SIDE == pytest.approx(p0 + (y - v0) / (v1 - v0) * (p1 - p0), abs=2e-3)


def test_a_logarithmic_axis_for_what_spreads():
    points = [(0, 8.0), (50, 0.5), (100, 2.0)]
    figure = chart("loss", "nats", [panel(Series(name="a", colour=1, points=points))], log=True)
    assert "nats, logarithmic" in figure
    (v0, p0), *_, (v1, p1) = axis_of(figure)
    for (_, y), (_, py) in zip(points, paths(figure, "line")[0], strict=True):
        expected = p0 + math.log(y / v0) / math.log(v1 / v0) * (p1 - p0)
        assert 1 - py / SIDE == pytest.approx(expected, abs=2e-3)
    narrow = [(0, 2.0), (100, 2.5)]
    assert "logarithmic" not in chart("a", "b", [panel(Series(name="a", colour=1, points=narrow))], log=True)
    zero = [(0, 0.0), (100, 2.5)]
    assert "logarithmic" not in chart("a", "b", [panel(Series(name="a", colour=1, points=zero))], log=True)


def test_panels_share_the_axis_and_keep_their_own_updates():
    first = panel(Series(name="a", colour=1, points=[(0, 1.0), (10, 2.0)]), end=10)
    second = panel(Series(name="a", colour=1, points=[(0, 2.0), (1000, 5.0)]), title="lemur", end=1000)
    left, right = paths(chart("loss", "nats", [first, second]), "line")
    assert left[1][1] == right[0][1]
    assert left[1][0] == right[1][0] == SIDE


def test_gaps_stay_gaps_and_lone_points_are_seen():
    points = [(0, 1.0), (10, None), (20, 2.0), (30, 3.0), (40, None)]
    figure = chart("loss", "nats", [panel(Series(name="a", colour=1, points=points))])
    assert len(paths(figure, "line")[0]) == 3
    assert paths(figure, "dots")[0] == [(0, paths(figure, "dots")[0][0][1])]
    assert series_data(figure)[0]["y"] == [1.0, None, 2.0, 3.0, None]


def test_many_points_become_means_with_their_range():
    rng = np.random.default_rng(0)
    values = rng.normal(10, 1, size=BINS * 50)
    values[777] = 30.0  # a spike must stay visible
    points = list(enumerate(values.tolist()))
    figure = chart("loss", "nats", [panel(Series(name="a", colour=1, points=points), end=len(values))])
    data = series_data(figure)[0]
    blocks = values.reshape(BINS, 50)
    np.testing.assert_allclose(data["y"], blocks.mean(axis=1), rtol=1e-4)
    (v0, p0), *_, (v1, p1) = axis_of(figure)
    shade = np.array(paths(figure, "range")[0])
    assert len(shade) == 2 * BINS
    drawn = v0 + (1 - shade[:, 1] / SIDE - p0) / (p1 - p0) * (v1 - v0)
    np.testing.assert_allclose(drawn[:BINS], blocks.max(axis=1), atol=0.05)
    np.testing.assert_allclose(drawn[BINS:][::-1], blocks.min(axis=1), atol=0.05)
    assert "shades their range" in figure


@pytest.mark.parametrize("points", [[], [(1, None)]])
def test_nothing_to_draw_is_no_figure(points):
    assert chart("loss", "nats", [panel(Series(name="a", colour=1, points=points))]) == ""


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-8])
@pytest.mark.parametrize("options", [{}, {"log": True}, {"from_zero": True}])
def test_a_constant_is_drawn(value, options):
    figure = chart(
        "loss", "nats", [panel(Series(name="a", colour=1, points=[(0, value), (100, value)]), end=0)]
    )
    assert "nan" not in figure
    assert axis_of(figure)
    chart("loss", "nats", [panel(Series(name="a", colour=1, points=[(0, value)]))], **options)


def test_from_zero_begins_at_zero():
    figure = chart("a", "b", [panel(Series(name="a", colour=1, points=[(0, 4.0), (9, 5.0)]))], from_zero=True)
    assert axis_of(figure)[0] == (0.0, 0.0)


def test_legend_names_each_curve_once_and_only_if_there_are_several():
    one = Series(name="<docs>", colour=1, points=[(0, 1.0), (1, 2.0)])
    limit = Series(name="limit", colour=0, points=[(0, 1.0), (1, 1.0)], dashed=True)
    empty = Series(name="nothing", colour=3, points=[])
    assert "legend" not in chart("a", "b", [panel(one), panel(one, empty)])
    figure = chart("a", "b", [panel(limit, one), panel(limit, one)])
    assert re.findall(r"<li class=\"([^\"]*)\">([^<]*)", figure) == [
        ("c1", "&lt;docs&gt;"),
        ("c0 dashed", "limit"),
    ]


spans = st.tuples(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9)).filter(lambda s: s[1] > 1e-6 * abs(s[0]))


@given(spans, st.integers(2, 8))
def test_linear_ticks_are_round_few_and_inside(span, count):
    low, high = span[0], span[0] + span[1]
    ticks = linear_ticks(low, high, count)
    assert 1 <= len(ticks) <= count + 1
    dust = 1e-6 * (high - low)
    assert all(low - dust <= tick <= high + dust for tick in ticks)
    if len(ticks) > 1:
        steps = np.diff(ticks)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
        assert round(steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.0001)), 3) in (1, 2, 2.5, 5)


@given(st.floats(-9, 9), st.floats(math.log10(3), 12))
def test_log_ticks_are_few_and_inside(exponent, decades):
    low, high = 10**exponent, 10 ** (exponent + decades)
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert ticks == sorted(ticks)


NUMBERS = {0: "0", 4e-5: "4e-5", -0.0025: "-2.5e-3", 0.02: "0.02", 1.5: "1.5", 999: "999"}
NUMBERS |= {1500: "1.5k", 25_000: "25k", 3.2e6: "3.2M", 6.9e10: "69B", 2e12: "2T"}


@pytest.mark.parametrize("value", NUMBERS)
def test_compact(value):
    assert compact(value) == NUMBERS[value]
