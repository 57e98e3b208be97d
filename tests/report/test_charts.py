"""Data of line charts against NumPy, ticks by property, stacked bars."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemur_jax.report.charts import MAX_POINTS, Lane, Line, compact, line_chart, linear_ticks, stacked_bars

LANES = [Lane(name="base", end=100, colour=1)]


def data_of(figure: str) -> dict:
    """What page.js reads."""
    return json.loads(re.search(r'application/json">(.*?)</script>', figure, re.DOTALL).group(1))


def test_points_gaps_and_names_reach_the_script():
    points = [(0, 1.0), (10, None), (20, 2.123456)]
    line = Line(run=0, name="</script><docs>", points=points, colour=3, dots=True)
    figure = line_chart("loss", "nats", LANES, [line], log=True)
    assert figure.count("</script>") == 1
    data = data_of(figure)
    assert (data["log"], data["zero"]) == (True, False)
    assert data["runs"] == [{"name": "base", "end": 100, "colour": 1}]
    assert data["lines"] == [
        {
            **{"run": 0, "name": "</script><docs>", "panel": "</script><docs>", "colour": 3},
            **{"dots": True, "dashed": False, "x": [0, 10, 20], "y": [1.0, None, 2.1235]},
        }
    ]


def test_many_points_become_means_with_their_range():
    values = np.random.default_rng(0).normal(10, 1, size=MAX_POINTS * 5)
    values[777] = 30.0  # a spike must stay visible
    figure = line_chart(
        "loss", "nats", LANES, [Line(run=0, name="a", points=list(enumerate(values.tolist())))]
    )
    (line,) = data_of(figure)["lines"]
    blocks = values.reshape(MAX_POINTS, 5)
    for key, expected in (("y", blocks.mean(1)), ("low", blocks.min(1)), ("high", blocks.max(1))):
        np.testing.assert_allclose(line[key], expected, rtol=1e-4)
    np.testing.assert_allclose(line["x"], np.arange(len(values)).reshape(MAX_POINTS, 5).mean(1))


@pytest.mark.parametrize("points", [[], [(1, None)]])
def test_nothing_to_draw_is_no_figure(points):
    assert line_chart("loss", "nats", LANES, [Line(run=0, name="a", points=points)]) == ""


def test_stacked_bars_leave_out_what_is_empty():
    text = stacked_bars([("in <1>", "c1"), ("never", "none")], {"sql": [3, 0]}, {"sql": ["3", "0"]})
    assert re.findall(r'<i class="(.*?)" style="flex-grow:([\d.]+)"', text) == [("c1", "3.0000")]
    assert text.count("in &lt;1&gt;") == 2


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


NUMBERS = {0: "0", 4e-5: "4e-5", -0.0025: "-2.5e-3", 0.02: "0.02", 1.5: "1.5", 999: "999"}
NUMBERS |= {1500: "1.5k", 25_000: "25k", 3.2e6: "3.2M", 6.9e10: "69B", 2e12: "2T"}


@pytest.mark.parametrize("value", NUMBERS)
def test_compact(value):
    assert compact(value) == NUMBERS[value]
