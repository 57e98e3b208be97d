"""What a search found: a table, a plot and a config that `lemur train` takes."""

import html
import json
import os
import pathlib
from collections.abc import Sequence

from lemur_jax.plan.plan import GIB
from lemur_jax.plan.search import Found, Outcome, describe
from lemur_jax.report.plots import compact, linear_ticks


def table(found: Found) -> str:
    """The Pareto front, and how much was looked at. Times are estimates."""
    front = found.front()
    lines = [
        f"  {'step, s':>10}{'tokens/s/chip':>15}{'MFU':>8}{'HBM, GiB':>10}  (estimated; MFU with causal attention)",
        *(
            f"  {each.seconds:10.3f}{each.made.tokens_per_second_per_chip:15,.0f}{each.made.mfu:8.1%}"
            f"{each.hbm / GIB:10.2f}  {describe(each.changes)}"
            for each in front
        ),
    ]
    if not front:
        lines = ["nothing that was tried fits"]
    fitting = sum(outcome.fits for outcome in found.outcomes)
    counts = [
        f"compiled {found.compiled}, from the cache {found.cached}: {fitting} fit",
        *(f"{count} not compiled: {reason}" for reason, count in sorted(found.pruned.items())),
        f"{found.untried} left when it ended after {found.seconds:.0f} s",
    ]
    return "\n".join([*lines, "", *counts])


def plot(found: Found, title: str) -> str:
    """A page with step time against HBM, one dot a candidate, the front joined; "" if nothing fits."""
    fitting = [outcome for outcome in found.outcomes if outcome.fits]
    if not fitting:
        return ""
    points = [_point(outcome) for outcome in fitting]
    front = [_point(outcome) for outcome in found.front()]
    x_axis, y_axis = ([each[axis] for each in points] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(x_axis), _ticks(y_axis)

    def place(point: Sequence[float]) -> tuple[float, float]:
        across = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return 70 + 600 * across, 370 - 340 * up

    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{html.escape(describe(each.changes))}: '
        f"{point[1]:.3f} s, {point[0]:.2f} GiB</title></circle>"
        for each, point in zip(fitting, points, strict=True)
        for x, y in [place(point)]
    )
    joined = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in front)
    across = "".join(
        f'<line x1="{x:.1f}" y1="30" x2="{x:.1f}" y2="370"/>'
        f'<text x="{x:.1f}" y="388" text-anchor="middle">{compact(tick)}</text>'
        for tick in x_ticks
        for x in [place((tick, 0))[0]]
    )
    up = "".join(
        f'<line x1="70" y1="{y:.1f}" x2="670" y2="{y:.1f}"/>'
        f'<text x="62" y="{y + 5:.1f}" text-anchor="end">{compact(tick)}</text>'
        for tick in y_ticks
        for y in [place((0, tick))[1]]
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px sans-serif;margin:2em}}circle{{fill:#4477aa;opacity:.7}}
polyline{{fill:none;stroke:#cc6677;stroke-width:2}}line{{stroke:#ddd}}pre{{overflow-x:auto}}</style>
<h1>{html.escape(title)}</h1><p>Estimated, not measured. A dot is a layout that fits;
the line joins those that no other beats in both.</p>
<svg viewBox="0 0 700 420" width="700" role="img" aria-label="step time by HBM">{across}{up}
<text x="70" y="16">seconds a step</text><text x="670" y="412" text-anchor="end">GiB of HBM a chip</text>
<polyline points="{joined}"/>{dots}</svg><pre>{html.escape(table(found))}</pre></html>
"""


def _point(outcome: Outcome) -> tuple[float, float]:
    """(GiB a chip, seconds a step)"""
    return outcome.hbm / GIB, outcome.seconds


def _ticks(values: Sequence[float]) -> list[float]:
    """Round values around the given ones, two at least."""
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.1 * high
    ticks = linear_ticks(low - margin, high + margin, 6)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else margin
    return [ticks[0] - step, *ticks, ticks[-1] + step]


def fragment(best: Outcome, base: str, overrides: Sequence[str], directory: pathlib.Path) -> str:
    """Text of a config file that is `base` with the best values; to lie in `directory`.

    Args:
      base: as given to `--config`, a path with or without `:arg`.
      overrides: `--config.a.b=value` that the search was given.
    """
    path, colon, argument = base.partition(":")
    beside = os.path.relpath(path, directory)
    values = "\n".join(f"    config.{name} = {value!r}" for name, value in best.changes.items())
    made = best.made
    versions = f"jax {made.versions['jax']} and libtpu {made.versions['libtpu']}"
    slices = f"{made.slices} x " if made.slices > 1 else ""
    return f'''"""{path} as `lemur plan --search` would run it on {slices}{made.topology}.

Estimated, not measured: {best.seconds:.3f} s a step, {made.tokens_per_second_per_chip:,.0f} tokens/s/chip,
{made.hbm_bytes_per_chip / GIB:.2f} GiB of HBM a chip, with {versions}.
"""

import os

from lemur_jax.config import load

BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), {beside!r})
OVERRIDES: list[str] = {list(overrides)!r}


def get_config(arg: str = ""):
    config = load(BASE + {colon + argument!r}, OVERRIDES)
{values}
    return config
'''


def write(found: Found, directory: pathlib.Path, base: str, overrides: Sequence[str], title: str) -> None:
    """Writes `search.json`, and where something fits `pareto.html` and `best.py`."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = {
        "compiled": found.compiled,
        "cached": found.cached,
        "pruned": found.pruned,
        "untried": found.untried,
        "seconds": found.seconds,
        "outcomes": [
            {
                "changes": each.changes,
                "error": each.error,
                "plan": json.loads(each.plan.to_json()) if each.plan else None,
            }
            for each in found.outcomes
        ],
    }
    (directory / "search.json").write_text(json.dumps(facts, indent=1) + "\n")
    if found.best:
        (directory / "pareto.html").write_text(plot(found, title))
        (directory / "best.py").write_text(fragment(found.best, base, overrides, directory))
