"""The one plotter of the project: line charts, stacked bars and scatter plots.

A line chart is data that page.js draws in the browser, where it can be zoomed, smoothed, overlaid and filtered.
Bars are HTML. A scatter plot is one static SVG file, self-contained, in light and dark mode.
No library draws them: a page with three curves weighs 4.9 MB with Plotly, 0.9 MB with Altair, and 0.06 MB here.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

from lemur_jax.report import labels
from lemur_jax.report.html import escape

# A line with more points than this is stored as this many means, with the range of the points behind each.
MAX_POINTS = 1000
COLOURS = 8  # of the palette in page.css; colour 0 is that of the text
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a line chart."""

    run: int  # index of the run that it belongs to
    name: str  # for the legend: the data source, the task or the quantity
    points: Sequence[tuple[float, float | None]]  # (update, value) by rising update; None is a gap
    colour: int = 0  # of the palette, when the runs are shown side by side
    panel: str = ""  # its panel when the runs are overlaid; "": the name
    dots: bool = False  # mark each point, and never smooth
    dashed: bool = False  # a limit to compare with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """A run in a line chart."""

    name: str
    end: float  # its last update
    colour: int  # where the runs are overlaid


def line_chart(
    title: str,
    unit: str,
    lanes: Sequence[Lane],
    lines: Sequence[Line],
    *,
    log: bool = False,
    zero: bool = False,
) -> str:
    """A figure for a page with page.js; "" if no line has a value.

    Args:
      unit: of the vertical axis.
      log: a logarithmic axis if all values are positive and spread over more than a factor of 3.
      zero: the axis begins at 0.
    """
    nonempty = [line for line in lines if any(y is not None for _, y in line.points)]
    if not nonempty:
        return ""
    data = {
        "title": title,
        "unit": unit,
        "log": log,
        "zero": zero,
        "runs": [dataclasses.asdict(lane) for lane in lanes],
        "lines": [_line_data(line) for line in nonempty],
    }
    # A "<" in a name must not end the script element.
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<figure class="chart">
<figcaption><h3>{escape(title)}</h3><p class="unit">{escape(unit)}</p>
<button class="reset" hidden>reset zoom</button></figcaption>
<ul class="legend"></ul><div class="panels"></div><p class="x-label">updates</p>
<script type="application/json">{content}</script>
</figure>
"""


def _line_data(line: Line) -> dict:
    data = {"run": line.run, "name": line.name, "panel": line.panel or line.name, "colour": line.colour}
    data |= {"dots": line.dots, "dashed": line.dashed}
    points = line.points
    if len(points) <= MAX_POINTS:
        return data | {"x": [x for x, _ in points], "y": [_short(y) for _, y in points]}
    columns: dict[str, list] = {"x": [], "y": [], "low": [], "high": []}
    for index in range(MAX_POINTS):
        bucket = points[index * len(points) // MAX_POINTS : (index + 1) * len(points) // MAX_POINTS]
        values = [y for _, y in bucket if y is not None]
        columns["x"].append(round(sum(x for x, _ in bucket) / len(bucket), 1))
        columns["y"].append(_short(sum(values) / len(values)) if values else None)
        columns["low"].append(_short(min(values, default=None)))
        columns["high"].append(_short(max(values, default=None)))
    return data | columns


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def stacked_bars(
    parts: Sequence[tuple[str, str]], rows: Mapping[str, Sequence[float]], texts: Mapping[str, Sequence[str]]
) -> str:
    """A bar for each row, divided among the parts, and a legend.

    `parts` are (name, CSS class such as "c1" or "none"); `rows` and `texts` have the size of each part, and its text.
    """
    legend = "".join(f'<li><span class="{kind}">{escape(name)}</span></li>' for name, kind in parts)
    bars = ""
    for row, sizes in rows.items():
        pieces = "".join(
            f'<i class="{kind}" style="flex-grow:{size:.4f}" title="{escape(f"{name}: {text}")}">'
            f"{escape(text)}</i>"
            for (name, kind), size, text in zip(parts, sizes, texts[row], strict=True)
            if size
        )
        bars += f'<div class="row"><b>{escape(row)}</b><div>{pieces}</div></div>\n'
    return f'<div class="card padded bars"><ul class="legend">{legend}</ul>{bars}</div>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a scatter plot."""

    x: float
    y: float
    label: str = ""
    note: str = ""  # shown as a tooltip
    colour: int = 1  # of the palette
    x_error: float = 0.0  # half the length of its error bar
    y_error: float = 0.0
    samples: Sequence[Point] = ()  # the point is their mean
    cross: bool = False  # drawn as a cross
    front: bool = False  # on the Pareto front: a bold label, and a dashed line to the others


MARGINS = (78, 44, 24, 56)  # left, top, right, bottom
POINT, SAMPLE, CROSS, BAR = 4.5, 3.0, 7.0, 1.0  # half the width of what is drawn
# (light, dark) of the colours of page.css that scatter plots use.
_INKS = {1: ("#1f6fd6", "#6aa8ff"), 2: ("#d2560b", "#ff9a5c"), 4: ("#8a3fc7", "#c79bff")}
_LIGHT, _DARK = (
    "".join(f".c{number}{{fill:{inks[mode]};stroke:{inks[mode]}}}" for number, inks in _INKS.items())
    for mode in (0, 1)
)
_STYLE = (
    f".back{{fill:#fff}}.axis{{fill:#5a6473}}.grid{{stroke:#e6e9ef}}.text{{fill:#1a1f29}}{_LIGHT}"
    "@media (prefers-color-scheme:dark)"
    f"{{.back{{fill:#1a202a}}.axis{{fill:#9ba7b8}}.grid{{stroke:#28303d}}.text{{fill:#e8ecf2}}{_DARK}}}"
    ".front{stroke:#8a93a1;fill:none}.leader{stroke:#8a93a1;stroke-width:.8}text{font:13px system-ui,sans-serif}"
    ".sample{fill-opacity:.35;stroke:none}.bar{stroke-width:1.5}.front-name{font-weight:600}"
)


def scatter_plot(
    title: str,
    axes: tuple[str, str],
    marks: Sequence[Mark],
    *,
    curves: Sequence[tuple[int, Sequence[Point]]] = (),
    caption: str = "",
    size: tuple[int, int] = (760, 520),
) -> str:
    """A scatter plot as the text of an SVG file; labels cover no mark, no error bar and no other label.

    Args:
      title: for readers who do not see the plot.
      axes: names of the horizontal and of the vertical axis, with their units.
      marks: at least one.
      curves: (colour of the palette, points) of lines through the plot.
      caption: a line above the plot.
      size: in pixels.
    """
    (width, height), (left, top, right, bottom) = size, MARGINS
    points = [point for mark in marks for point in (*mark.samples, (mark.x, mark.y))]
    points += [point for _, curve in curves for point in curve]
    x_scale = _Scale.around([x for x, _ in points], left, width - right)
    y_scale = _Scale.around([y for _, y in points], height - bottom, top)
    named = [mark for mark in marks if mark.label]
    front = sorted((mark for mark in marks if mark.front), key=lambda mark: mark.x)
    path = [(x_scale(mark.x), y_scale(mark.y)) for mark in front]
    placements = labels.place_labels(
        [labels.text_size(mark.label, mark.front) for mark in named],
        [(x_scale(mark.x), y_scale(mark.y)) for mark in named],
        [box for mark in marks for box in _boxes(mark, x_scale, y_scale)],
        (left, top / 2 + 10, width - right / 2, height - bottom),
    )
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    drawn = [
        *(_curve(colour, curve, x_scale, y_scale) for colour, curve in curves),
        f'<polyline class="front" points="{joined}" stroke-dasharray="5 4"/>',
        *(_mark(mark, x_scale, y_scale) for mark in marks),
        *(_label(mark, label) for mark, label in zip(named, placements, strict=True)),
    ]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<rect class="back" width="{width}" height="{height}"/>
<text class="axis" x="{left if width > 500 else 12}" y="24">{escape(caption)}</text>
{_axes(axes, x_scale, y_scale, size)}
{"".join(drawn)}
</svg>
"""


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Values from `low` to `high` lie from `start` to `end` pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> "_Scale":
        margin = 0.08 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 0.05
        return cls(min(values) - margin, max(values) + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axes(names: tuple[str, str], x_scale: _Scale, y_scale: _Scale, size: tuple[int, int]) -> str:
    (width, height), (left, top, right, bottom) = size, MARGINS
    parts = []
    for tick in linear_ticks(x_scale.low, x_scale.high, 6 if width > 500 else 4):
        x = x_scale(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{height - bottom}"/>')
        parts.append(
            f'<text class="axis" x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{compact(tick)}</text>'
        )
    for tick in linear_ticks(y_scale.low, y_scale.high, 6):
        y = y_scale(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(
            f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{compact(tick)}</text>'
        )
    x, y = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(
        f'<text class="text" x="{x}" y="{height - 14}" text-anchor="middle">{escape(names[0])}</text>'
        f'<text class="text" x="20" y="{y}" text-anchor="middle" transform="rotate(-90 20 {y})">'
        f"{escape(names[1])}</text>"
    )
    return "\n".join(parts)


def _mark(mark: Mark, x_scale: _Scale, y_scale: _Scale) -> str:
    x, y, kind = x_scale(mark.x), y_scale(mark.y), f"c{mark.colour}"
    if mark.cross:
        return (
            f'<path class="{kind} cross" stroke-width="2.5" d="M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"/>'
        )
    samples = "".join(
        f'<circle class="{kind} sample" cx="{x_scale(a):.1f}" cy="{y_scale(b):.1f}" r="{SAMPLE:g}"/>'
        for a, b in mark.samples
    )
    wide, tall = _bar_lengths(mark, x_scale, y_scale)
    bars = f"M{x - wide:.1f} {y:.1f}h{2 * wide:.1f}M{x:.1f} {y - tall:.1f}v{2 * tall:.1f}"
    note = f"<title>{escape(mark.note)}</title>" if mark.note else ""
    return (
        f'{samples}<path class="{kind} bar" d="{bars}"/>'
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{POINT}">{note}</circle>\n'
    )


def _curve(colour: int, points: Sequence[Point], x_scale: _Scale, y_scale: _Scale) -> str:
    path = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in points)
    return f'<path class="c{colour} curve" style="fill:none;stroke-width:1.5" d="M{path}"/>'


def _bar_lengths(mark: Mark, x_scale: _Scale, y_scale: _Scale) -> Point:
    """How far the error bars reach to each side, in pixels."""
    x, y = x_scale(mark.x), y_scale(mark.y)
    return abs(x_scale(mark.x + mark.x_error) - x), abs(y_scale(mark.y + mark.y_error) - y)


def _boxes(mark: Mark, x_scale: _Scale, y_scale: _Scale) -> list[labels.Box]:
    """What is drawn of a mark, which no label may cover."""
    x, y = x_scale(mark.x), y_scale(mark.y)
    wide, tall = _bar_lengths(mark, x_scale, y_scale)
    return [
        _square(x, y, CROSS if mark.cross else POINT),
        (x - wide, y - BAR, x + wide, y + BAR),
        (x - BAR, y - tall, x + BAR, y + tall),
        *(_square(x_scale(a), y_scale(b), SAMPLE) for a, b in mark.samples),
    ]


def _square(x: float, y: float, half: float) -> labels.Box:
    return x - half, y - half, x + half, y + half


def _label(mark: Mark, label: labels.Label) -> str:
    leader = ""
    if label.leader:
        (x, y), (end_x, end_y) = label.leader
        leader = f'<path class="leader" d="M{x:.1f} {y:.1f}L{end_x:.1f} {end_y:.1f}"/>'
    left, _, right, bottom = label.box
    x = {"start": left, "middle": (left + right) / 2, "end": right}[label.anchor]
    attributes = f'x="{x:.1f}" y="{bottom - labels.DESCENT:.1f}" text-anchor="{label.anchor}"'
    kind = "text front-name" if mark.front else "text"
    return f'{leader}<text class="{kind}" {attributes}>{escape(mark.label)}</text>\n'


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between `low` and `high`, at most one more than `count`, 1, 2, 2.5 or 5 × 10^n apart."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    # round() removes what binary fractions add: 0.30000000000000004.
    digits = max(0, 3 - math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, digits) for index in range(first, last + 1)]


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
