"""The report: one HTML page that needs nothing but a browser."""

import datetime
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

import lemur_jax
from lemur_jax.common.errors import UserError
from lemur_jax.models.config import LlamaConfig
from lemur_jax.report.assets import CSS, JS
from lemur_jax.report.html import table, text
from lemur_jax.report.plots import Panel, Series, chart, compact
from lemur_jax.report.runs import Run, all_tasks, load_runs
from lemur_jax.report.sections import goodput, mixture, samples
from lemur_jax.report.tables import Cell, bits_per_byte_cells, bits_per_byte_table, byte_notes, percent
from lemur_jax.telemetry.flops import parameter_counts

__all__ = ["bits_per_byte_table", "report"]

COLOURS = 8  # of the palette, besides the text's own

_TOTAL = "all sources"
_MISSING = "–"  # an option that a config does not have
# Curves of training beside the loss: title, unit, field, logarithmic, from zero.
_CURVES = (
    ("Learning rate", "as applied", "learning_rate", False, True),
    ("Gradient norm", "before clipping, global L2", "grad_norm", True, False),
    ("Throughput", "target tokens per second, all devices", "tokens_per_second", False, True),
    ("Parameter norm", "global L2", "param_norm", False, False),
    ("Update ratio", "norm of an update over that of the parameters", "update_ratio", True, False),
    ("Model FLOPs utilization", "share of the peak", "mfu", False, True),
    ("Device memory", "bytes in use, fullest device of the first host", "hbm_bytes", False, True),
)


def report(
    workdirs: Sequence[epath.PathLike],
    output: epath.PathLike,
    prompts: Sequence[str] = (),
    answers: Sequence[Sequence[str]] = (),
) -> epath.Path:
    """Writes one self-contained HTML page about a run, or about several as stages side by side.

    Args:
      workdirs: of `lemur train`, in the order in which the stages followed each other.
      output: the HTML file to write; its directory is made if need be.
      prompts: what the runs were asked to continue.
      answers: of each run, to each prompt; `report.samples.sample` makes them.

    Returns:
      `output`.

    Raises:
      UserError: a workdir has no metrics or an unreadable config, or the page cannot be written.
    """
    runs = load_runs(workdirs)
    page = _page(runs, samples(runs, prompts, answers))
    path = epath.Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {path}: {error.strerror or error}") from error
    return path


def _page(runs: Sequence[Run], sampled: str) -> str:
    names = [run.name for run in runs]
    title = " → ".join(names if len(names) < 6 else [*names[:2], "…", names[-1]])
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{text(title)} · lemur report</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
<p class="soft">Training report, {now}</p>
<h2>{"Stages" if len(runs) > 1 else "Run"}</h2>
{_summary(runs)}
<h2>Held-out bits per byte{" after each stage" if len(runs) > 1 else ""}</h2>
{_bits(runs)}
<h2>Curves</h2>
<div class="charts{" wide" if len(runs) > 4 else ""}">
{_charts(runs)}</div>
{mixture(runs)}
{goodput(runs)}
{sampled}
<h2>Config</h2>
{_configs(runs)}
<footer>Written by <code>lemur report</code>, lemur_jax {text(lemur_jax.__version__)}, from
{", ".join(f"<code>{text(run.workdir)}</code>" for run in runs)}.</footer>
</main>
<script>{JS}</script>
</body>
</html>
"""


def _summary(runs: Sequence[Run]) -> str:
    head = (
        "stage",
        "parameters",
        "updates",
        "target tokens",
        "tokens per update",
        "last loss",
        "median tokens/s",
    )
    return table(head, [[text(run.name), *_summary_row(run)] for run in runs])


def _summary_row(run: Run) -> list[str]:
    config = run.flat_config
    planned = config.get("train.steps")
    updates = f"{run.last_step:,}"
    if planned and planned != run.last_step:
        updates += f"<small>of {planned:,}</small>"
    rows, length = config.get("train.batch_rows"), config.get("data.sequence_length")
    speeds = [y for _, y in _points(run.train, "tokens_per_second") if y is not None]
    losses = [y for _, y in _points(run.train, "loss") if y is not None]
    tokens = [y for _, y in _points(run.train, "tokens") if y is not None]
    return [
        _parameters(run),
        updates,
        compact(tokens[-1]) if tokens else "–",
        f"{rows * length:,}<small>{rows:,} × {length:,}</small>" if rows and length else "–",
        f"{losses[-1]:.3f}" if losses else "–",
        f"{statistics.median(speeds):,.0f}" if speeds else "–",
    ]


def _parameters(run: Run) -> str:
    try:
        return compact(parameter_counts(LlamaConfig.from_dict(run.config["model"])).total)
    except (KeyError, TypeError, UserError):  # no config, or one of another version
        return "–"


def _bits(runs: Sequence[Run]) -> str:
    cells = bits_per_byte_cells(runs)
    if not cells:
        return '<p class="soft">No held-out evaluation has run yet.</p>'
    names = [run.name for run in runs]
    rows = [
        [text(name), *(_bits_cell(column[index], names[:index]) for column in cells.values())]
        for index, name in enumerate(names)
    ]
    heads = ["stage", *map(text, cells)]
    if any(run.last_balance is not None for run in runs):
        heads.append("balance")
        for row, run in zip(rows, runs, strict=True):
            score = run.last_balance
            row.append("–" if score is None else f"<b>{percent(score)}</b><small>since its start</small>")
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in byte_notes(runs))
    what = " of each stage and its change against earlier ones" if len(runs) > 1 else ""
    lead = f'<p class="soft">Last evaluation{what}; lower is better.</p>'
    return lead + table(heads, rows, kind="bits") + notes


def _bits_cell(cell: Cell, earlier: list[str]) -> str:
    """Bits per byte, and the change against the first and the last of the earlier stages."""
    if cell.value is None:
        return "–"
    # Of one earlier stage both names are the same, and it is shown once; of none there is no name.
    changes = dict(zip(earlier[:1] + earlier[-1:], (cell.first, cell.previous), strict=False))
    notes = [
        f"<small>{_change(change)} vs {text(name)}</small>"
        for name, change in changes.items()
        if change is not None
    ]
    return f"<b>{cell.value:.4f}</b>{''.join(notes)}"


def _change(change: float) -> str:
    text = percent(change)
    if float(text.rstrip("%")) == 0:
        return "± 0.0%"
    kind, arrow = ("bad", "▲") if change > 0 else ("good", "▼")
    return f'<span class="{kind}">{arrow} {text}</span>'


def _charts(runs: Sequence[Run]) -> str:
    colours = _colours([*(source for run in runs for source in run.sources), *all_tasks(runs)])
    group_colours = _colours(key for run in runs for key in _groups(run))

    def panels(series: Callable[[Run], Iterable[Series]]) -> list[Panel]:
        return [Panel(title=run.name, end=run.last_step, series=list(series(run))) for run in runs]

    def held_out(field: str) -> list[Panel]:
        return panels(
            lambda run: [
                Series(name=task, colour=colours[task], points=_points(records, field), dots=True)
                for task, records in run.evals.items()
            ]
        )

    charts = [
        chart("Training loss", "nats per target token", panels(lambda run: _losses(run, colours)), log=True),
        chart("Held-out bits per byte", "bits per byte of text", held_out("bits_per_byte")),
        chart("Held-out loss", "nats per token", held_out("loss")),
        chart(
            "Since the start of the stage",
            "relative change of bits per byte",
            panels(lambda run: _changes(run, group_colours)),
        ),
    ]
    for title, unit, field, log, from_zero in _CURVES:
        curve = functools.partial(_curve, title=title, field=field)
        charts.append(chart(title, unit, panels(curve), log=log, from_zero=from_zero))
    return "".join(charts)


def _colours(names: Iterable[str]) -> dict[str, int]:
    """A colour for each name, the same in all stages."""
    return {name: 1 + index % COLOURS for index, name in enumerate(dict.fromkeys(names))}


def _losses(run: Run, colours: dict[str, int]) -> list[Series]:
    """The loss of each source; over all of them first, if they are not one."""
    sources = [
        Series(name=source, colour=colours[source], points=_points(run.train, f"loss/{source}"))
        for source in run.sources
    ]
    total = Series(name=_TOTAL, colour=0, points=_points(run.train, "loss"))
    return sources if len(sources) == 1 else [total, *sources]


def _groups(run: Run) -> list[str]:
    """The keys of its groups' changes, `change/NAME`."""
    return list(dict.fromkeys(key for record in run.balance for key in record if key.startswith("change/")))


def _changes(run: Run, colours: dict[str, int]) -> list[Series]:
    """The balance score, and the change of each group since the stage began."""
    series = [Series(name="balance", colour=0, points=_points(run.balance, "balance"), dots=True)]
    for key in _groups(run):
        points = [(0, 0.0), *_points(run.balance, key)]
        name = f"{key.removeprefix('change/')}, change"
        series.append(Series(name=name, colour=colours[key], points=points, dots=True))
    return series


def _curve(run: Run, title: str, field: str) -> list[Series]:
    series = [Series(name=title.lower(), colour=1, points=_points(run.train, field))]
    limit = run.flat_config.get("optimizer.clip_norm")
    if field == "grad_norm" and limit:
        ends = [(0, limit), (run.last_step, limit)]
        series.append(Series(name="clipped above", colour=0, points=ends, dashed=True))
    return series


def _points(records: Iterable[dict[str, Any]], field: str) -> list[tuple[float, float | None]]:
    """(step, value) of the records that have the field; what was not finite is a gap."""
    return [(record["step"], record[field]) for record in records if field in record]


def _configs(runs: Sequence[Run]) -> str:
    flats = {run.name: run.flat_config for run in runs}
    missing = [name for name, flat in flats.items() if not flat]
    parts = [f'<p class="note">{text(name)} has no config.json.</p>' for name in missing]
    known = {name: flat for name, flat in flats.items() if flat}
    if len(known) > 1:
        keys = list(dict.fromkeys(key for flat in known.values() for key in flat))
        rows = [
            [_key(key), *(_value(flat, key) for flat in known.values())]
            for key in keys
            if len({json.dumps(flat.get(key, _MISSING)) for flat in known.values()}) > 1
        ]
        same = len(keys) - len(rows)
        differ = "option differs" if len(rows) == 1 else "options differ"
        parts.append(f'<p class="soft">{len(rows)} {differ} between the stages, {same} are the same.</p>')
        if rows:
            parts.append(table(["option", *map(text, known)], rows, kind="keys"))
    for name, flat in known.items():
        rows = [[_key(key), _value(flat, key)] for key in flat]
        options = table(["option", "value"], rows, kind="keys", card=False)
        summary = f"<summary>All {len(flat)} options of {text(name)}</summary>"
        parts.append(f'<details class="card">{summary}{options}</details>')
    return "".join(parts)


def _key(key: str) -> str:
    """A config key that may break after its dots and underscores."""
    return text(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _value(flat: dict[str, Any], key: str) -> str:
    value = flat.get(key, _MISSING)
    if isinstance(value, float):
        return f"{value:.12g}"
    return text(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))
