"""The Pareto plot as one SVG file, and the page that holds it together with the table."""

import html
import itertools
from collections.abc import Callable, Sequence

from lemur_jax.report.assets import CSS
from lemur_jax.report.plots import linear_ticks
from lemur_jax.sweep import labels
from lemur_jax.sweep.results import Results, Variant, markdown, note, rows

WIDTH, HEIGHT = 760, 520
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 44, 56
POINT, SEED, CROSS, BAR = 4.5, 3.0, 7.0, 1.0  # half the width of what is drawn
_STYLE = """
.back{fill:#fff}.soft{fill:#5a6473}.grid{stroke:#e6e9ef}.text{fill:#1a1f29}.front{stroke:#8a93a1}
.leader{stroke:#8a93a1;stroke-width:.8}
.trained{fill:#1f6fd6;stroke:#1f6fd6}.merged{fill:#8a3fc7;stroke:#8a3fc7}.base{stroke:#d2560b;fill:none}
@media (prefers-color-scheme:dark){.back{fill:#1a202a}.soft{fill:#9ba7b8}.grid{stroke:#28303d}
.text{fill:#e8ecf2}.trained{fill:#6aa8ff;stroke:#6aa8ff}.merged{fill:#c79bff;stroke:#c79bff}.base{stroke:#ff9a5c}}
text{font:13px system-ui,sans-serif}.seed{fill-opacity:.35;stroke:none}.bar{stroke-width:1.5}
.front-name{font-weight:600}
"""


def svg(results: Results, x: str, y: str) -> str:
    """Held-out bits per byte of two groups against each other: means with a standard deviation, each seed, the base.

    Args:
      results: of a sweep.
      x, y: the groups.
    """
    points = [(one.bits[x][i], one.bits[y][i]) for one in results.variants for i in range(len(one.seeds))]
    points.append((results.base[x], results.base[y]))
    across = _scale([point[0] for point in points], LEFT, WIDTH - RIGHT)
    down = _scale([point[1] for point in points], HEIGHT - BOTTOM, TOP)
    front = sorted(results.front([x, y]), key=lambda one: one.mean(x))
    path = [(across(one.mean(x)), down(one.mean(y))) for one in front]
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in path)
    base = across(results.base[x]), down(results.base[y])
    names = {one.name: one in front for one in results.variants} | {"base": False}
    marks = [*((across(one.mean(x)), down(one.mean(y))) for one in results.variants), base]
    taken = [box for one in results.variants for box in _boxes(one, x, y, across, down)]
    placed = labels.place(
        [labels.text_size(name, bold) for name, bold in names.items()],
        marks,
        [*taken, _square(base, CROSS)],
        list(itertools.pairwise(path)),
        (LEFT, TOP / 2 + 10, WIDTH - RIGHT / 2, HEIGHT - BOTTOM),
    )
    shapes = [
        f'<polyline class="front" points="{line}" fill="none" stroke-dasharray="5 4"/>' if line else "",
        *(_variant(one, x, y, across, down) for one in results.variants),
        _base(*base),
        *map(_name, names, names.values(), placed),
    ]
    title = f"{results.tokens:,} tokens a run, mean ± standard deviation over seeds; towards the lower left is better"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>Held-out bits per byte, {html.escape(y)} against {html.escape(x)}</title>
<style>{_STYLE}</style><rect class="back" width="{WIDTH}" height="{HEIGHT}"/>
<text class="soft" x="{LEFT}" y="24">{html.escape(title)}</text>
{_axes(points, across, down, x, y)}
{"".join(shapes)}
</svg>
"""


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05
    low, high = low - margin, high + margin
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(points: Sequence[tuple[float, float]], across, down, x: str, y: str) -> str:
    parts = []
    for tick in linear_ticks(min(p[0] for p in points), max(p[0] for p in points), 6):
        at = across(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="soft" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in linear_ticks(min(p[1] for p in points), max(p[1] for p in points), 6):
        at = down(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="text" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
        f"{html.escape(x)}, held-out bits per byte</text>"
        f'<text class="text" x="20" y="{middle}" text-anchor="middle" transform="rotate(-90 20 {middle})">'
        f"{html.escape(y)}, held-out bits per byte</text>"
    )
    return "\n".join(parts)


def _variant(one: Variant, x: str, y: str, across, down) -> str:
    kind = "merged" if one.merged else "trained"
    (at, height), (wide, tall) = _bars(one, x, y, across, down)
    seeds = "".join(
        f'<circle class="{kind} seed" cx="{across(a):.1f}" cy="{down(b):.1f}" r="{SEED:g}"/>'
        for a, b in zip(one.bits[x], one.bits[y], strict=True)
    )
    bars = f"M{at - wide:.1f} {height:.1f}h{2 * wide:.1f}M{at:.1f} {height - tall:.1f}v{2 * tall:.1f}"
    return (
        f'{seeds}<path class="{kind} bar" d="{bars}"/>'
        f'<circle class="{kind}" cx="{at:.1f}" cy="{height:.1f}" r="{POINT}"/>\n'
    )


def _base(x: float, y: float) -> str:
    return f'<path class="base" stroke-width="2.5" d="M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"/>'


def _bars(one: Variant, x: str, y: str, across, down) -> tuple[labels.Point, labels.Point]:
    """The mean, and how far its error bars reach to each side."""
    at, height = across(one.mean(x)), down(one.mean(y))
    wide = abs(across(one.mean(x) + one.spread(x)) - at)
    tall = abs(down(one.mean(y) + one.spread(y)) - height)
    return (at, height), (wide, tall)


def _boxes(one: Variant, x: str, y: str, across, down) -> list[labels.Box]:
    """What is drawn of a variant, and no name may cover."""
    mean, (wide, tall) = _bars(one, x, y, across, down)
    at, height = mean
    return [
        _square(mean, POINT),
        (at - wide, height - BAR, at + wide, height + BAR),
        (at - BAR, height - tall, at + BAR, height + tall),
        *(_square((across(a), down(b)), SEED) for a, b in zip(one.bits[x], one.bits[y], strict=True)),
    ]


def _square(middle: labels.Point, half: float) -> labels.Box:
    x, y = middle
    return x - half, y - half, x + half, y + half


def _name(name: str, bold: bool, label: labels.Label) -> str:
    leader = ""
    if label.leader:
        (x, y), (end_x, end_y) = label.leader
        leader = f'<path class="leader" d="M{x:.1f} {y:.1f}L{end_x:.1f} {end_y:.1f}"/>'
    kind = "text front-name" if bold else "text"
    left, _, right, bottom = label.box
    at = {"start": left, "middle": (left + right) / 2, "end": right}[label.anchor]
    place = f'x="{at:.1f}" y="{bottom - labels.DESCENT:.1f}" text-anchor="{label.anchor}"'
    return f'{leader}<text class="{kind}" {place}>{html.escape(name)}</text>\n'


def svgs(results: Results) -> dict[str, str]:
    """File name -> plot, for every two groups."""
    found: dict[str, str] = {}
    for y, x in itertools.combinations(results.groups, 2):
        found["pareto.svg" if not found else f"pareto-{y}-{x}.svg"] = svg(results, x, y)
    return found


def page(results: Results, command: str) -> str:
    """Table and plots as one self-contained HTML page."""
    head, *body = rows(results)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr><th>{html.escape(line[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line[1:])}</tr>\n"
        for line in body
    )
    plots = "".join(f'<div class="card">{plot}</div>' for plot in svgs(results).values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sweep · lemur_jax</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>
<body><main><h1>Sweep</h1>
<p class="soft">Written by <code>{html.escape(command)}</code></p>
<h2>Held-out bits per byte</h2>
<div class="card"><table><thead><tr>{top}</tr></thead><tbody>
{lines}</tbody></table></div><p class="soft">{html.escape(note(results))}</p>
<h2>One group against another</h2>{plots}
</main></body></html>
"""


def files(results: Results, command: str) -> dict[str, str]:
    """File name -> contents of everything that a sweep leaves behind for people."""
    text = f"{markdown(results)}\n    {command}\n"
    return {"table.md": text, "index.html": page(results, command), **svgs(results)}
