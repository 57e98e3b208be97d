"""Episodes as one HTML page: success by turn, causes of failure, and every trace."""

import collections
import re
from collections.abc import Mapping, Sequence

from lemur_jax.agents.episodes import Trace, by_kind, failure, paper_scores, success_by_turn
from lemur_jax.evals.published import agents_table
from lemur_jax.report.charts import stacked_bars
from lemur_jax.report.html import escape, html_page, html_table

SHOWN = 10  # traces of each list that are not folded


def agents_page(traces: Sequence[Trace], turns: int, name: str) -> str:
    """The page.

    Args:
      traces: of all episodes.
      turns: allowed in an episode.
      name: of the agent.
    """
    kinds = by_kind(traces)
    paper, *ours = agents_table(paper_scores(traces), escape(name))
    solved = [trace for trace in traces if trace.solved_at]
    failed = [trace for trace in traces if not trace.solved_at]
    head = ["environment", "episodes", *(f"turn {turn}" for turn in range(1, turns + 1))]
    rows = [
        [escape(kind), str(len(group)), *(f"{rate:.1f}" for rate in success_by_turn(group, turns))]
        for kind, group in kinds.items()
    ]
    body = f"""<h1>{escape(name)}: {len(solved)} of {len(traces)} episodes solved</h1>
<h2>Solved within this many turns, %</h2>
{html_table(head, rows)}
<h2>Episodes by the turn that solved them</h2>
{_bars(kinds, turns)}
{f"<h2>Beside the paper's Tables 4 to 7</h2>{html_table(paper, ours)}" if ours else ""}
<h2>Solved episodes</h2>
{_traces(solved)}
<h2>Causes of failure</h2>
{_failures(kinds)}
<h2>Other episodes</h2>
{_traces(sorted(failed, key=lambda trace: failure(trace) or ""))}"""
    return html_page(f"Agents · {name}", body)


def _bars(kinds: Mapping[str, Sequence[Trace]], turns: int) -> str:
    parts = [(f"solved in turn {turn}", f"c{1 + (turn - 1) % 8}") for turn in range(1, turns + 1)]
    counts = {
        kind: [sum((trace.solved_at or turns + 1) == turn for trace in group) for turn in range(1, turns + 2)]
        for kind, group in kinds.items()
    }
    texts = {kind: list(map(str, group)) for kind, group in counts.items()}
    return stacked_bars([*parts, ("not solved", "none")], counts, texts)


def _failures(kinds: Mapping[str, Sequence[Trace]]) -> str:
    counts = {kind: collections.Counter(map(failure, group)) for kind, group in kinds.items()}
    names = sorted({name for group in counts.values() for name in group if name})
    rows = [[escape(kind), *(str(group[name] or "–") for name in names)] for kind, group in counts.items()]
    none = '<p class="soft">None failed.</p>'
    return html_table(["environment", *map(escape, names)], rows) if names else none


def _traces(traces: Sequence[Trace]) -> str:
    """Cards; those after the first `SHOWN` are folded."""
    first, rest = "".join(map(_trace, traces[:SHOWN])), "".join(map(_trace, traces[SHOWN:]))
    return f"{first}<details><summary>{len(traces) - SHOWN} more</summary>{rest}</details>" if rest else first


def _question(task: str) -> str:
    """The last line of a task that is a sentence: the question, after instructions and examples."""
    sentences = [line.strip() for line in task.splitlines() if len(line.split()) > 2]
    text = re.sub("^(Question|Task): ", "", sentences[-1]) if sentences else ""
    return text if len(text) <= 120 else f"{text[:119]}…"


def _trace(trace: Trace) -> str:
    outcome = f"solved in turn {trace.solved_at}" if trace.solved_at else f"failed: {failure(trace)}"
    parts = []
    for number, turn in enumerate(trace.turns, start=1):
        parts += [(f"agent, turn {number}", turn.action)]
        parts += [(f"{turn.step.role} ({turn.step.verdict})", turn.step.observation)]
    texts = "".join(f'<p class="soft">{escape(who)}</p><pre>{escape(what)}</pre>' for who, what in parts)
    turns = "" if trace.solved_at else f'<small class="soft">turns: {len(trace.turns)}</small>'
    title = f'{escape(f"{trace.id}: {outcome}")}{turns}<br><span class="soft">{escape(_question(trace.task))}</span>'
    task = f'<details><summary class="soft">task</summary><pre>{escape(trace.task)}</pre></details>'
    return f'<details class="card"><summary>{title}</summary>{task}{texts}</details>\n'
