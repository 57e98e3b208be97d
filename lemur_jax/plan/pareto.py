"""Output of a search: a table, a plot and a config for `lemur train`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from lemur_jax.plan.candidates import Trial, format_changes
from lemur_jax.plan.plan import GIB, slice_name
from lemur_jax.plan.search import SearchResult
from lemur_jax.report.charts import Mark, scatter_plot
from lemur_jax.report.html import escape, html_page, html_table

_COLUMNS = ("step, s", "tokens/s/chip", "MFU", "HBM, GiB", "layout")


def _row(trial: Trial) -> tuple[str, ...]:
    """The cells of `_COLUMNS`."""
    return (
        f"{trial.plan.step_seconds:.4g}",
        f"{trial.plan.tokens_per_second_per_chip:,.0f}",
        f"{trial.plan.mfu:.1%}",
        f"{trial.plan.hbm_bytes_per_chip / GIB:.2f}",
        format_changes(trial.changes),
    )


def format_search(found: SearchResult) -> str:
    """The Pareto front and the number of candidates. Times are estimates."""
    front = [_row(trial) for trial in found.front()]
    lines = ["nothing that was tried fits"]
    if front:
        rows = [(*_COLUMNS[:-1], "(estimated; MFU with causal attention)"), *front]
        lines = ["  {:>10}{:>15}{:>8}{:>10}  {}".format(*row) for row in rows]
    fit = sum(each.fits for each in found.trials)
    lines += ["", f"compiled {found.compiled}, from the cache {found.cached}: {fit} fit"]
    lines += [f"{count} not compiled: {reason}" for reason, count in sorted(found.pruned.items())]
    return "\n".join([*lines, f"{found.untried} left when it ended after {found.seconds:.0f} s"])


def plot(found: SearchResult, title: str) -> str:
    """A page with step time against HBM: a dot for each layout that fits, the Pareto front joined and in a table."""
    front = found.front()
    marks = [
        Mark(
            x=trial.plan.hbm_bytes_per_chip / GIB,
            y=trial.plan.step_seconds,
            label=str(front.index(trial) + 1) if trial in front else "",
            note="{4}: {0} s, {3} GiB".format(*_row(trial)),
            front=trial in front,
        )
        for trial in found.trials
        if trial.fits
    ]
    axes = ("GiB of HBM per chip", "seconds per step")
    plots = "".join(
        f'<div class="card scatter {kind}">{scatter_plot(title, axes, marks, size=size)}</div>'
        for kind, size in (("wide", (760, 460)), ("narrow", (360, 400)))
    )
    rows = [[str(number), *map(escape, _row(trial))] for number, trial in enumerate(front, start=1)]
    body = f"""<h1>{escape(title)}</h1>
<p class="soft">Estimated, not measured. A dot is a layout that fits; the line joins those that no other beats in both
time and memory.</p>
<h2>Step time against memory</h2>{plots}
<h2>The front</h2>{html_table(["", *_COLUMNS], rows)}"""
    return html_page(title, body)


def config_text(best: Trial, base: str, overrides: Sequence[str], directory: pathlib.Path) -> str:
    """Text of a config file for `directory`: `base` with the best values.

    Args:
      base: as given to `--config`, a path with or without `:arg`.
      overrides: `--config.a.b=value` options of the search.
    """
    path, colon, argument = base.partition(":")
    base_path = os.path.relpath(path, os.path.realpath(directory))
    values = "\n".join(f"    config.{name} = {value!r}" for name, value in best.changes.items())
    plan = best.plan
    versions = f"jax {plan.versions['jax']} and libtpu {plan.versions['libtpu']}"
    return f'''"""{path} as `lemur plan --search` would run it on {slice_name(plan.topology, plan.slices)}.

Estimated, not measured: {plan.step_seconds:.4g} s per step, {plan.tokens_per_second_per_chip:,.0f} tokens/s/chip,
{plan.hbm_bytes_per_chip / GIB:.2f} GiB of HBM per chip, with {versions}.
"""

import os

from lemur_jax.config import load_config_dict

BASE = os.path.join(os.path.dirname(os.path.realpath(__file__)), {base_path!r})
OVERRIDES: list[str] = {list(overrides)!r}


def get_config(arg: str = ""):
    config = load_config_dict(BASE + {colon + argument!r}, OVERRIDES)
{values}
    return config
'''


def write(
    found: SearchResult, directory: pathlib.Path, base: str, overrides: Sequence[str], title: str
) -> None:
    """Writes `search.json`, and if something fits `pareto.html` and `best.py`; those of an earlier search go."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("pareto.html", "best.py"):
        (directory / name).unlink(missing_ok=True)
    trials = [
        {"changes": each.changes, "error": each.error, "plan": each.plan and dataclasses.asdict(each.plan)}
        for each in found.trials
    ]
    facts = vars(found) | {"trials": trials}
    (directory / "search.json").write_text(json.dumps(facts, indent=1) + "\n")
    if found.best:
        (directory / "pareto.html").write_text(plot(found, title), encoding="utf-8")
        text = config_text(found.best, base, overrides, directory)
        # A path may have bytes that are no UTF-8, and is kept as they are (PEP 383).
        (directory / "best.py").write_text(text, encoding="utf-8", errors="backslashreplace")
