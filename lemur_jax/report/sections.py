"""Sections of the page beside curves and configs: where the time went, the mixture, samples."""

import re
from collections.abc import Sequence

from lemur_jax.report.html import table, text
from lemur_jax.report.plots import compact
from lemur_jax.report.runs import Run
from lemur_jax.telemetry.goodput import PARTS
from lemur_jax.telemetry.progress import duration

_NAMES = {"steps": "steps", "data_wait": "data wait", "eval": "evaluation", "lost": "lost steps"}


def goodput(runs: Sequence[Run]) -> str:
    """The wall time of each run by what it went to, as a bar and in a table; "" where no run says."""
    rows = []
    parts = [part for part in ("steps", *PARTS, "other") if any(_seconds(run, part) for run in runs)]
    parts = list(dict.fromkeys(parts))  # steps first, and once
    for run in runs:
        if not run.time or not run.time.get("wall_seconds"):
            continue
        wall = run.time["wall_seconds"]
        shares = {part: _seconds(run, part) / wall for part in parts}
        bar = "".join(
            f'<i class="c{colour}" style="flex-grow:{share:.4f}"></i>'
            for colour, share in enumerate(shares.values())
            if share
        )
        cells = [
            f'<i class="key c{colour}"></i>{share:.1%}<small>{duration(_seconds(run, part))}</small>'
            for colour, (part, share) in enumerate(shares.items())
        ]
        rows.append([f'{text(run.name)}<span class="bar">{bar}</span>', duration(wall), *cells])
    if not rows:
        return ""
    names = [
        f'<span class="key c{colour}">{_NAMES.get(part, part)}</span>' for colour, part in enumerate(parts)
    ]
    lead = "Wall time from the first start to the last checkpoint, restarts included; goodput is the share of steps."
    return f'<h2>Goodput</h2><p class="soft">{lead}</p>' + table(["stage", "wall time", *names], rows)


def _seconds(run: Run, part: str) -> float:
    return run.time.get(f"{part}_seconds") or 0.0


def mixture(runs: Sequence[Run]) -> str:
    """The share of each source in the target tokens, as trained and as configured; "" where no run says."""
    rows = []
    for run in runs:
        last = run.train[-1] if run.train else {}
        trained = {source: last.get(f"tokens/{source}", 0) for source in run.sources}
        wanted = {name: source.get("share", 0) for name, source in _configured(run).items()}
        if not sum(trained.values()):
            continue
        for source, tokens in trained.items():
            share = f"{wanted[source] / sum(wanted.values()):.2%}" if wanted.get(source) else "–"
            seen = f"{tokens / sum(trained.values()):.2%}"
            rows.append([text(run.name), text(source), compact(tokens), seen, share])
    if not rows:
        return ""
    lead = "Target tokens trained on; a share is configured by all tokens of the rows."
    head = ["stage", "source", "target tokens", "as trained", "as configured"]
    return f'<h2>Mixture</h2><p class="soft">{lead}</p>' + table(head, rows)


def _configured(run: Run) -> dict[str, dict]:
    return run.config.get("data", {}).get("sources", {})


def samples(runs: Sequence[Run], prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> str:
    """What the newest checkpoint of each run continues each prompt with; "" without prompts.

    Args:
      answers: of each run, to each prompt.
    """
    if not prompts:
        return ""
    blocks = []
    for number, prompt in enumerate(prompts):
        said = "".join(
            f'<h3>{text(run.name)}</h3><pre><span class="soft">{text(prompt)}</span>{_shown(of_run[number])}</pre>'
            for run, of_run in zip(runs, answers, strict=True)
        )
        blocks.append(f'<div class="card sample">{said}</div>')
    lead = "From the newest checkpoint; temperature 0.7, top-p 0.95, repetition penalty 1.2, fixed seeds."
    return f'<h2>Samples</h2><p class="soft">{lead}</p>' + "".join(blocks)


def _shown(answer: str) -> str:
    """The answer, with a note instead of many empty lines: a model that has learned little makes nothing else."""
    return re.sub(
        "\n{4,}", lambda found: f'\n<span class="soft">[{len(found[0])} line breaks]</span>\n', text(answer)
    )
