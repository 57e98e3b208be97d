"""Output of a search: a table, a plot and a config for `lemur train`."""

import json
import os
import pathlib
from collections.abc import Sequence

from lemur_jax.plan.plan import GIB
from lemur_jax.plan.search import SearchResult, Trial, format_changes
from lemur_jax.report.charts import Mark, scatter_plot
from lemur_jax.report.html import escape, html_page, html_table


def format_search(found: SearchResult) -> str:
    """The Pareto front and the number of candidates. Times are estimates."""
    front = found.front()
    lines = [
        f"  {'step, s':>10}{'tokens/s/chip':>15}{'MFU':>8}{'HBM, GiB':>10}  (estimated; MFU with causal attention)",
        *(
            f"  {each.seconds:10.3f}{each.made.tokens_per_second_per_chip:15,.0f}{each.made.mfu:8.1%}"
            f"{each.hbm / GIB:10.2f}  {format_changes(each.changes)}"
            for each in front
        ),
    ]
    if not front:
        lines = ["nothing that was tried fits"]
    fitting = sum(trial.fits for trial in found.trials)
    counts = [
        f"compiled {found.compiled}, from the cache {found.cached}: {fitting} fit",
        *(f"{count} not compiled: {reason}" for reason, count in sorted(found.pruned.items())),
        f"{found.untried} left when it ended after {found.seconds:.0f} s",
    ]
    return "\n".join([*lines, "", *counts])


def plot(found: SearchResult, title: str) -> str:
    """A page with step time against HBM: a dot for each layout that fits, the Pareto front joined; "" if none fits.

    The numbers are those of the table's rows.
    """
    front = found.front()
    marks = [
        Mark(
            x=trial.hbm / GIB,
            y=trial.seconds,
            label=str(front.index(trial) + 1) if trial in front else "",
            note=f"{format_changes(trial.changes)}: {trial.seconds:.3f} s, {trial.hbm / GIB:.2f} GiB",
            front=trial in front,
        )
        for trial in found.trials
        if trial.fits
    ]
    if not marks:
        return ""
    axes = ("GiB of HBM a chip", "seconds a step")
    plots = "".join(
        f'<div class="card scatter {kind}">{scatter_plot(title, axes, marks, size=size)}</div>'
        for kind, size in (("wide", (760, 460)), ("narrow", (360, 400)))
    )
    head = ["", "step, s", "tokens/s/chip", "MFU", "HBM, GiB", "layout"]
    rows = [
        [
            str(number),
            f"{trial.seconds:.3f}",
            f"{trial.made.tokens_per_second_per_chip:,.0f}",
            f"{trial.made.mfu:.1%}",
            f"{trial.hbm / GIB:.2f}",
            escape(format_changes(trial.changes)),
        ]
        for number, trial in enumerate(front, start=1)
    ]
    body = f"""<h1>{escape(title)}</h1>
<p class="soft">Estimated, not measured. A dot is a layout that fits; the line joins those that no other beats in both
time and memory.</p>
<h2>Step time against memory</h2>{plots}
<h2>The front</h2>{html_table(head, rows)}"""
    return html_page(title, body)


def config_text(best: Trial, base: str, overrides: Sequence[str], directory: pathlib.Path) -> str:
    """Text of a config file for `directory`: `base` with the best values.

    Args:
      base: as given to `--config`, a path with or without `:arg`.
      overrides: `--config.a.b=value` options of the search.
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

from lemur_jax.config import load_config_dict

BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), {beside!r})
OVERRIDES: list[str] = {list(overrides)!r}


def get_config(arg: str = ""):
    config = load_config_dict(BASE + {colon + argument!r}, OVERRIDES)
{values}
    return config
'''


def write(
    found: SearchResult, directory: pathlib.Path, base: str, overrides: Sequence[str], title: str
) -> None:
    """Writes `search.json`, and if something fits `pareto.html` and `best.py`."""
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
            for each in found.trials
        ],
    }
    (directory / "search.json").write_text(json.dumps(facts, indent=1) + "\n")
    if found.best:
        (directory / "pareto.html").write_text(plot(found, title))
        (directory / "best.py").write_text(config_text(found.best, base, overrides, directory))
