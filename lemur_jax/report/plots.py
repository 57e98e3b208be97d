"""Charts as HTML and inline SVG: panels side by side with one vertical axis.

Curves are drawn into a unit square that the browser stretches to whatever width there is; labels and
legends are HTML text beside it, so that letters keep their size on a phone.
"""

import dataclasses
import html
import json
import math
from collections.abc import Sequence

# More points than a panel has room for are drawn as this many means, with the range behind them.
BINS = 120
# Side of the square that curves are drawn into: fine enough to round coordinates to integers.
SIDE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    Attributes:
      name: for the legend; the same name has the same colour everywhere on a page.
      colour: a number of the palette; 0 is the text's own colour.
      points: (x, y) by rising x; y None is a gap.
      dots: mark each point.
      dashed: a line to compare with.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float | None]]
    dots: bool = False
    dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """The curves of one stage; the horizontal axis runs from 0 to `end`."""

    title: str
    end: float
    series: Sequence[Series]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The vertical axis.

    Attributes:
      low, high: its ends.
      log: whether it is logarithmic.
      ticks: values with a label.
    """

    low: float
    high: float
    log: bool
    ticks: list[float]

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the bottom, 1 at the top."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A series as drawn: x, y, and the range of the y that each drawn one stands for."""

    series: Series
    x: list[float]
    y: list[float | None]
    low: list[float | None]
    high: list[float | None]


def chart(
    title: str, unit: str, panels: Sequence[Panel], *, log: bool = False, from_zero: bool = False
) -> str:
    """One figure; an empty string if there is nothing to draw.

    Args:
      title: what is shown.
      unit: of the vertical axis.
      panels: one for each stage, side by side.
      log: a logarithmic axis if the values are positive and spread over more than a factor of 3.
      from_zero: the axis begins at 0.
    """
    curves = [[_curve(series) for series in panel.series] for panel in panels]
    values = [v for row in curves for curve in row for v in [*curve.low, *curve.high] if v is not None]
    if not values:
        return ""
    axis = _axis(min(values), max(values), log, from_zero)
    scale = f"{unit}, logarithmic" if axis.log else unit
    stages = ", ".join(panel.title for panel in panels)
    ticks = 6 if len(panels) == 1 else 3
    body = "".join(_panel(panel, row, axis, ticks) for panel, row in zip(panels, curves, strict=True))
    labels = "".join(
        f'<span style="bottom:{100 * axis.place(tick):.2f}%">{compact(tick)}</span>' for tick in axis.ticks
    )
    width = "updates in each stage" if len(panels) > 1 else "updates"
    return f"""<figure class="chart">
<figcaption><h3>{html.escape(title)}</h3><p>{html.escape(scale)}</p></figcaption>
{_legend(curves)}
<div class="plot" role="img" aria-label="{html.escape(f"{title} in {scale} by update, for {stages}")}">
<div class="y">{labels}</div><div class="panels">{body}</div><output class="tip" hidden></output>
</div>
<p class="x-label">{width}{_bin_note(curves)}</p>
<script type="application/json">{_data(curves, panels)}</script>
</figure>
"""


def _panel(panel: Panel, curves: Sequence[Curve], axis: Axis, count: int) -> str:
    right = panel.end or 1
    ticks = [tick for tick in linear_ticks(0, right, count) if tick == int(tick) and tick <= right]
    grid = [f"M0 {_down(axis.place(tick))}H{SIDE}" for tick in axis.ticks]
    grid += [f"M{_round(SIDE * tick / right)} 0V{SIDE}" for tick in ticks]
    shapes = "".join(_shapes(curve, right, axis) for curve in curves)
    labels = "".join(
        f'<span class="{_label_class(index, tick / right)}" style="left:{100 * tick / right:.2f}%">'
        f"{compact(tick)}</span>"
        for index, tick in enumerate(ticks)
    )
    return f"""<div class="panel"><div class="stage">{html.escape(panel.title)}</div>
<div class="area"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">
<path class="grid" d="{"".join(grid)}"/>{shapes}</svg></div><div class="x">{labels}</div></div>
"""


def _shapes(curve: Curve, right: float, axis: Axis) -> str:
    """The range, the line and the dots of a curve."""
    xs = [_round(SIDE * x / right) for x in curve.x]
    colour = f"c{curve.series.colour}"
    parts = []
    for run in _runs(curve.y):
        if any(curve.low[i] != curve.high[i] for i in run):
            upper = [f"{xs[i]} {_down(axis.place(_known(curve.high[i])))}" for i in run]
            lower = [f"{xs[i]} {_down(axis.place(_known(curve.low[i])))}" for i in reversed(run)]
            parts.append(f'<path class="range {colour}" d="M{"L".join(upper + lower)}Z"/>')
    lines = [[f"{xs[i]} {_down(axis.place(_known(curve.y[i])))}" for i in run] for run in _runs(curve.y)]
    dash = " dashed" if curve.series.dashed else ""
    if any(len(line) > 1 for line in lines):
        path = "".join(f"M{'L'.join(line)}" for line in lines)
        parts.append(f'<path class="line {colour}{dash}" d="{path}"/>')
    # A line of no length with round ends is a disc, and stays one when the square is stretched.
    lone = [line[0] for line in lines if len(line) == 1]
    dots = [point for line in lines for point in line] if curve.series.dots else lone
    if dots:
        parts.append(f'<path class="dots {colour}" d="{"".join(f"M{point}h0" for point in dots)}"/>')
    return "".join(parts)


def _curve(series: Series) -> Curve:
    """Bins a series that has more points than there is room for."""
    points = series.points
    if len(points) <= 2 * BINS:
        y = [value for _, value in points]
        return Curve(series=series, x=[x for x, _ in points], y=y, low=y, high=y)
    curve = Curve(series=series, x=[], y=[], low=[], high=[])
    for index in range(BINS):
        part = points[index * len(points) // BINS : (index + 1) * len(points) // BINS]
        known = [y for _, y in part if y is not None]
        curve.x.append(sum(x for x, _ in part) / len(part))
        curve.y.append(sum(known) / len(known) if known else None)
        curve.low.append(min(known, default=None))
        curve.high.append(max(known, default=None))
    return curve


def _axis(low: float, high: float, log: bool, from_zero: bool) -> Axis:
    if log and low > 0 and high / low > 3:
        margin = (high / low) ** 0.04
        low, high = low / margin, high * margin
        return Axis(low=low, high=high, log=True, ticks=log_ticks(low, high))
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    margin = 0.05 * (high - low)
    low, high = (low if low == 0 else low - margin), high + margin
    return Axis(low=low, high=high, log=False, ticks=linear_ticks(low, high, 5))


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between `low` and `high`, at most one more than `count`, 1, 2, 2.5 or 5 × 10^n apart."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    # round() takes the dust of binary fractions off: 0.30000000000000004.
    digits = max(0, 3 - math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, digits) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values for a logarithmic axis: powers of ten, or more between them, or linear ones if all are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [float(f"{tick:.3g}") for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return linear_ticks(low, high, 6)


def compact(value: float) -> str:
    """A number for an axis: 4e-5, 0.02, 1.5, 1.5k, 3.2M."""
    size = abs(value)
    if size and size < 1e-2:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{name}"
    return f"{value:.4g}"


def _legend(curves: Sequence[Sequence[Curve]]) -> str:
    series = {curve.series.name: curve.series for row in curves for curve in row if any(_runs(curve.y))}
    if len(series) < 2:
        return ""
    ordered = sorted(series.values(), key=lambda one: (one.dashed, one.colour))
    items = "".join(
        f'<li class="c{one.colour}{" dashed" if one.dashed else ""}">{html.escape(one.name)}</li>'
        for one in ordered
    )
    return f'<ul class="legend">{items}</ul>'


def _bin_note(curves: Sequence[Sequence[Curve]]) -> str:
    binned = any(len(curve.x) < len(curve.series.points) for row in curves for curve in row)
    return "; lines are means of several, shades their range" if binned else ""


def _data(curves: Sequence[Sequence[Curve]], panels: Sequence[Panel]) -> str:
    """What the tooltip needs, as JSON that cannot end its script element."""
    data = [
        {
            "end": panel.end or 1,
            "series": [
                {
                    "name": curve.series.name,
                    "colour": curve.series.colour,
                    "x": [round(x, 1) for x in curve.x],
                    "y": [None if y is None else float(f"{y:.5g}") for y in curve.y],
                }
                for curve in row
            ],
        }
        for panel, row in zip(panels, curves, strict=True)
    ]
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _runs(values: Sequence[float | None]) -> list[list[int]]:
    """Indices of the stretches without a gap."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if value is not None:
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _down(place: float) -> str:
    """SVG counts from the top."""
    return _round(SIDE * (1 - place))


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _label_class(index: int, place: float) -> str:
    """Labels at the ends stay inside their panel; every second one gives way where it is narrow."""
    end = "first" if place < 0.08 else "last" if place > 0.92 else "mid"
    return f"{end} spare" if index % 2 else end
