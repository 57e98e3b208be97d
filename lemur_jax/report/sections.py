"""Sections of the report: evaluations, mixture, wall time, samples, starts."""

import datetime
from collections.abc import Mapping, Sequence

from lemur_jax.common.errors import UserError
from lemur_jax.common.progress import duration
from lemur_jax.models.config import DecoderConfig
from lemur_jax.report.charts import compact, stacked_bars
from lemur_jax.report.html import escape, html_table
from lemur_jax.report.runs import Run
from lemur_jax.report.tables import Cell, bits_per_byte_cells, byte_notes, percent, with_start
from lemur_jax.telemetry.goodput import PARTS

_PART_NAMES = {"data_wait": "data wait", "eval": "evaluation", "lost": "lost steps"}


def bits_per_byte(runs: Sequence[Run]) -> str:
    """Held-out bits per byte of each run, with the changes against the first and the previous one."""
    runs = with_start(runs)
    cells = bits_per_byte_cells(runs)
    if not cells:
        return '<p class="soft">No held-out evaluation has run yet.</p>'
    names = [run.name for run in runs]
    rows = [
        [escape(name), *(_bits_cell(column[index], names[:index]) for column in cells.values())]
        for index, name in enumerate(names)
    ]
    head = ["run", *map(escape, cells)]
    if any(run.last_balance is not None for run in runs):
        head.append("balance")
        for row, run in zip(rows, runs, strict=True):
            score = run.last_balance
            row.append("–" if score is None else f"<b>{percent(score)}</b><small>since its start</small>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in byte_notes(runs))
    what = " of each run and its change against earlier ones" if len(runs) > 1 else ""
    lead = f'<p class="soft">Last evaluation{what}; lower is better.</p>'
    return lead + html_table(head, rows, kind="bits") + notes


def _bits_cell(cell: Cell, earlier: list[str]) -> str:
    """Bits per byte, and the change against the first and the last of the earlier runs."""
    if cell.value is None:
        return "–"
    # If there is one earlier run, both names are the same and it is shown once.
    changes = dict(zip(earlier[:1] + earlier[-1:], (cell.first, cell.previous), strict=False))
    notes = [
        f"<small>{_change(change)} vs {escape(name)}</small>"
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


def goodput(runs: Sequence[Run]) -> str:
    """The wall time of each run by what it was spent on, as a bar and as a table; "" if no run recorded it."""
    timed = [run for run in runs if run.time.get("wall_seconds")]
    all_parts = dict.fromkeys(["steps", *PARTS, "other"])
    parts = [part for part in all_parts if any(_seconds(run, part) for run in timed)]
    if not parts:
        return ""
    names = [_PART_NAMES.get(part, part) for part in parts]
    kinds = ["none" if part == "other" else f"c{index % 8 + 1}" for index, part in enumerate(parts)]
    shares = {run.name: [_seconds(run, part) / run.time["wall_seconds"] for part in parts] for run in timed}
    texts = {name: [f"{share:.0%}" if share > 0.04 else "" for share in row] for name, row in shares.items()}
    rows = []
    for run in timed:
        cells = [
            f"{share:.1%}<small>{duration(_seconds(run, part))}</small>"
            for part, share in zip(parts, shares[run.name], strict=True)
        ]
        rows.append([escape(run.name), duration(run.time["wall_seconds"]), *cells])
    lead = "Wall time from the first start to the last checkpoint, restarts included; goodput is the share of steps."
    bars = stacked_bars(list(zip(names, kinds, strict=True)), shares, texts)
    table = html_table(["run", "wall time", *names], rows)
    return f'<h2>Goodput</h2><p class="soft">{lead}</p>{bars}{table}'


def _seconds(run: Run, part: str) -> float:
    return run.time.get(f"{part}_seconds") or 0.0


def mixture(runs: Sequence[Run]) -> str:
    """The share of each source in the target tokens, as trained and as configured; "" if no run recorded it."""
    rows = []
    for run in runs:
        last = run.train[-1] if run.train else {}
        trained = {key.removeprefix("tokens/"): last[key] or 0 for key in last if key.startswith("tokens/")}
        shares = {source: run.option(f"data.sources.{source}.share") or 0 for source in trained}
        if sum(trained.values()) <= 0:
            continue
        staged = any(key.startswith("data.stages.") for key in run.config)
        for source, tokens in trained.items():
            share = f"{shares[source] / sum(shares.values()):.2%}" if shares[source] > 0 else "–"
            trained_share = f"{tokens / sum(trained.values()):.2%}"
            configured = "by stage" if staged else share
            rows.append([escape(run.name), escape(source), compact(tokens), trained_share, configured])
    if not rows:
        return ""
    lead = "Target tokens trained on; a share is configured by all tokens of the rows."
    head = ["run", "source", "target tokens", "as trained", "as configured"]
    return f'<h2>Mixture</h2><p class="soft">{lead}</p>' + html_table(head, rows)


def parameter_count(run: Run) -> int | None:
    """Parameters of the run's model; None if its config is missing or of another version."""
    from lemur_jax.models.decoder import num_params

    model = {key[6:]: value for key, value in run.config.items() if key.startswith("model.")}
    try:
        return num_params(DecoderConfig.from_dict(model))
    except (KeyError, TypeError, UserError):
        return None


def samples(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> str:
    """How the model after each stage, by its name, answers each prompt; "" without prompts."""
    if not prompts:
        return ""
    blocks = ""
    for index, prompt in enumerate(prompts):
        texts = "".join(
            f'<div><h3>{escape(name)}</h3><pre><span class="soft">{escape(prompt)}</span>'
            f"{escape(replies[index])}</pre></div>"
            for name, replies in answers.items()
        )
        blocks += f'<div class="card sample">{texts}</div>'
    lead = "From the newest checkpoint; temperature 0.7, top-p 0.95, repetition penalty 1.2, fixed seeds."
    return f'<h2>Samples</h2><p class="soft">{lead}</p>{blocks}'


def starts(runs: Sequence[Run]) -> str:
    """Commit, hosts, devices and versions of each run: of its first start, and of later ones that differ."""
    rows = []
    for run in runs:
        previous: tuple = ()
        for record in run.starts:
            facts = tuple(record.get(key) or "–" for key in ("commit", "host", "devices"))
            facts += (", ".join(record.get("versions", ())) or "–",)
            if facts == previous:
                continue
            previous = facts
            row = [escape(run.name), _date(record.get("unix_seconds")), f"{record['step']:,}"]
            rows.append([*row, *map(escape, facts)])
    if not rows:
        return ""
    lead = "The first start of each run, and every later one with another commit, host, device or version."
    head = ["run", "started", "from update", "git commit", "host", "devices", "versions"]
    return f'<h2>Starts</h2><p class="soft">{lead}</p>' + html_table(head, rows, kind="starts")


def _date(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
