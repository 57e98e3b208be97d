"""The report: one HTML page that needs nothing but a browser."""

import datetime
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

import lemur_jax
from lemur_jax.common.errors import UserError
from lemur_jax.report import sections
from lemur_jax.report.charts import COLOURS, Lane, Line, compact, line_chart
from lemur_jax.report.html import escape, html_page, html_table
from lemur_jax.report.runs import Run, all_tasks, read_runs

_TOTAL = "all sources"
_MISSING = "–"  # an option that a config does not have
# Curves of training that have no sources: title, unit, field, logarithmic, from zero.
_CURVES = (
    ("Learning rate", "as applied", "learning_rate", False, True),
    ("Gradient norm", "before clipping, global L2", "grad_norm", True, False),
    ("Throughput", "target tokens per second, all devices", "tokens_per_second", False, True),
    ("Parameter norm", "global L2", "param_norm", False, False),
    ("Update ratio", "norm of an update over that of the parameters", "update_ratio", True, False),
    ("Model FLOPs utilization", "share of the peak", "mfu", False, True),
    ("Device memory", "bytes in use, fullest device of the first host", "hbm_bytes", False, True),
)
# Other fields of training, with those of single sources and hosts. What is left only some kinds of runs record.
_NO_CURVE = (
    *("step", "kind", "loss", "tokens", "seconds", "data_wait_seconds", "tokens_per_second_per_chip"),
    *("grad_norm_limit", "update_norm", "hbm_peak_bytes"),
)
_OF_PARTS = ("loss/", "tokens/", "host_seconds/")
_SUMMARY = (
    *("run", "parameters", "updates", "target tokens", "tokens per update", "last loss"),
    "median tokens/s",
)


def write_report(
    workdirs: Sequence[epath.PathLike],
    output: epath.PathLike,
    *,
    prompts: Sequence[str] = (),
    answers: Mapping[str, Sequence[str]] | None = None,
    overlay: bool = False,
) -> epath.Path:
    """Writes one self-contained HTML page about a run, or about several, and returns its path.

    Args:
      workdirs: of `lemur train`; stages of a recipe in their order, or runs to compare.
      output: the HTML file to write, in a directory that exists.
      prompts: texts that the models were asked to continue or to answer.
      answers: of each stage, to each prompt; from `report.samples.sample`.
      overlay: open the page with the curves of all runs on one axis.

    Raises:
      UserError: a workdir has no metrics or an unreadable config, or the page cannot be written.
    """
    runs = read_runs(workdirs)
    page = _page(runs, sections.samples(prompts, answers or {}), overlay and len(runs) > 1)
    path = epath.Path(output)
    try:
        path.write_text(page)
    except OSError as error:
        raise UserError(f"cannot write the report to {path}: {error.strerror or error}") from error
    return path


def _page(runs: Sequence[Run], samples: str, overlay: bool) -> str:
    names = [run.name for run in runs]
    title = (", " if overlay else " → ").join(names if len(names) < 6 else [*names[:2], "…", names[-1]])
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    skipped = "".join(
        f'<p class="note">{run.skipped_lines} unreadable lines in the metrics of {escape(run.name)} were skipped.</p>'
        for run in runs
        if run.skipped_lines
    )
    workdirs = ", ".join(f"<code>{escape(run.workdir)}</code>" for run in runs)
    body = f"""<h1>{escape(title)}</h1>
<p class="soft">Training report, {now}</p>{skipped}
<h2>{"Runs" if overlay else "Stages" if len(runs) > 1 else "Run"}</h2>
{html_table(_SUMMARY, map(_summary_row, runs))}
<h2>Held-out bits per byte{"" if overlay or len(runs) == 1 else " after each stage"}</h2>
{sections.bits_per_byte(runs)}
<h2>Curves</h2>
{_controls(runs)}
<div class="charts{" wide" if len(runs) > 4 else ""}">
{_charts(runs)}</div>
{sections.mixture(runs)}
{sections.goodput(runs)}
{samples}
{sections.starts(runs)}
<h2>Config</h2>
{_configs(runs)}
<footer>Written by <code>lemur report</code>, lemur_jax {escape(lemur_jax.__version__)}, from {workdirs}.</footer>
"""
    return html_page(f"{title} · lemur report", body, script=True, overlay=overlay)


def _summary_row(run: Run) -> list[str]:
    planned, rows, length = map(run.option, ("train.steps", "train.batch_rows", "data.sequence_length"))
    updates = f"{run.last_step:,}"
    if planned and planned != run.last_step:
        updates += f"<small>of {planned:,}</small>"
    losses, tokens, speeds = (
        [y for _, y in _points(run.train, field) if y is not None]
        for field in ("loss", "tokens", "tokens_per_second")
    )
    parameters = sections.parameter_count(run)
    return [
        escape(run.name),
        compact(parameters) if parameters else "–",
        updates,
        compact(tokens[-1]) if tokens else "–",
        f"{rows * length:,}<small>{rows:,} × {length:,}</small>" if rows and length else "–",
        f"{losses[-1]:.3f}" if losses else "–",
        f"{statistics.median(speeds):,.0f}" if speeds else "–",
    ]


def _controls(runs: Sequence[Run]) -> str:
    views = """<span><button class="view" value="side">side by side</button>
<button class="view" value="overlay">overlaid</button></span>"""
    return f"""<noscript><p class="note">The curves are drawn by JavaScript, which is switched off.</p></noscript>
<div class="controls">{views if len(runs) > 1 else ""}
<label>smoothing <input class="smoothing" type="range" min="0" max="0.99" step="0.01" value="0">
<span class="smoothing-value">0</span></label>
<span class="soft">Drag across a plot to zoom, double-click to reset; click a name to hide its curves.</span></div>"""


def _charts(runs: Sequence[Run]) -> str:
    """All line charts. A name (a source, a task, a run, a group of tasks) has one colour in all of them."""
    sources = [*(source for run in runs for source in run.sources), *all_tasks(runs)]
    groups = [key.removeprefix("change/") for run in runs for key in _groups(run)]
    names = dict.fromkeys([*sources, *(run.name for run in runs if len(runs) > 1), *groups])
    colours = {name: 1 + index % COLOURS for index, name in enumerate(names)}
    lanes = [Lane(name=run.name, end=run.last_step, colour=colours.get(run.name, 0)) for run in runs]

    def held_out(field: str) -> list[Line]:
        return [
            Line(run=index, name=task, colour=colours[task], points=_points(records, field), dots=True)
            for index, run in enumerate(runs)
            for task, records in run.evals.items()
        ]

    # A pair, a sequence or an episode is no token (docs/metrics.md).
    others = any(run.config.get("preference.loss") or "reward" in run.train[-1] for run in runs if run.train)
    loss_unit = "mean of what the objective counts" if others else "nats per target token"
    losses = [line for index, run in enumerate(runs) for line in _losses(index, run, colours)]
    changes = [line for index, run in enumerate(runs) for line in _changes(index, run, colours)]
    charts = [
        line_chart("Training loss", loss_unit, lanes, losses, log=True),
        line_chart("Held-out bits per byte", "bits per byte of text", lanes, held_out("bits_per_byte")),
        line_chart("Held-out loss", "nats per token", lanes, held_out("loss")),
        line_chart("Since the start of the run", "relative change of bits per byte", lanes, changes),
    ]
    for title, unit, field, log, zero in (*_own_curves(runs), *_CURVES):
        lines = [line for index, run in enumerate(runs) for line in _curve(index, run, title, field)]
        charts.append(line_chart(title, unit, lanes, lines, log=log, zero=zero))
    return "".join(charts)


def _losses(index: int, run: Run, colours: dict[str, int]) -> list[Line]:
    """The loss over all sources, and that of each if there are several."""
    sources = [
        Line(run=index, name=source, colour=colours[source], points=_points(run.train, f"loss/{source}"))
        for source in run.sources
    ]
    total = Line(run=index, name=_TOTAL, points=_points(run.train, "loss"))
    return sources if len(sources) == 1 else [total, *sources]


def _groups(run: Run) -> list[str]:
    """The keys of its groups' changes, `change/NAME`."""
    return list(dict.fromkeys(key for record in run.balance for key in record if key.startswith("change/")))


def _changes(index: int, run: Run, colours: dict[str, int]) -> list[Line]:
    """The balance score, and the change of each group since the run began."""
    lines = [Line(run=index, name="balance", points=_points(run.balance, "balance"), dots=True)]
    for key in _groups(run):
        group = key.removeprefix("change/")
        points = [(0, 0.0), *_points(run.balance, key)]
        name = f"{group}, change"
        lines.append(Line(run=index, name=name, colour=colours[group], points=points, dots=True))
    return lines


def _own_curves(runs: Sequence[Run]) -> list[tuple[str, str, str, bool, bool]]:
    """As `_CURVES`: rewards of `lemur rl`, accuracy of preferences, loads of experts."""
    known = {*_NO_CURVE, *(field for _, _, field, _, _ in _CURVES)}
    fields = dict.fromkeys(field for run in runs for record in run.train for field in record)
    own = [field for field in fields if field not in known and not field.startswith(_OF_PARTS)]
    return [(field, "as in metrics.jsonl", field, False, False) for field in own]


def _curve(index: int, run: Run, title: str, field: str) -> list[Line]:
    lines = [Line(run=index, name=title.lower(), points=_points(run.train, field))]
    limit = run.option("optimizer.clip_norm")
    if field == "grad_norm" and limit:
        ends = [(0, limit), (run.last_step, limit)]
        lines.append(Line(run=index, name="clipped above", panel=title.lower(), points=ends, dashed=True))
    return lines


def _points(records: Iterable[dict[str, Any]], field: str) -> list[tuple[float, float | None]]:
    """(step, value) of the records that have the field; a value that was not finite is a gap."""
    return [(record["step"], record[field]) for record in records if field in record]


def _configs(runs: Sequence[Run]) -> str:
    configs = {run.name: run.config for run in runs if run.config}
    parts = [f'<p class="note">{escape(run.name)} has no config.json.</p>' for run in runs if not run.config]
    if len(configs) > 1:
        keys = list(dict.fromkeys(key for config in configs.values() for key in config))
        rows = [
            [_key(key), *(_value(config, key) for config in configs.values())]
            for key in keys
            if len({json.dumps(config.get(key, _MISSING)) for config in configs.values()}) > 1
        ]
        differ = "option differs" if len(rows) == 1 else "options differ"
        parts.append(f'<p class="soft">{len(rows)} {differ}, {len(keys) - len(rows)} are the same.</p>')
        if rows:
            parts.append(html_table(["option", *map(escape, configs)], rows, kind="keys"))
    for name, config in configs.items():
        rows = [[_key(key), _value(config, key)] for key in config]
        options = html_table(["option", "value"], rows, kind="keys", card=False)
        summary = f"<summary>All {len(config)} options of {escape(name)}</summary>"
        parts.append(f'<details class="card">{summary}{options}</details>')
    return "".join(parts)


def _key(key: str) -> str:
    """A config key that may break after its dots and underscores."""
    return escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _value(config: dict[str, Any], key: str) -> str:
    value = config.get(key, _MISSING)
    if isinstance(value, float):
        return f"{value:.12g}"
    return escape(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))
