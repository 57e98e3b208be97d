"""Episodes as one HTML page: success by turn, causes of failure, and every trace."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.report.charts import stacked_bars
from lemur_jax.report.html import escape, html_page, html_table

Trace = Mapping[str, Any]  # as `episodes.to_json` writes it


def agents_page(episodes: Mapping[str, Any], name: str) -> str:
    """The page.

    Args:
      episodes: `max_turns` and `traces`, as `episodes.to_json` writes them.
      name: of the agent.
    """
    kinds: dict[str, list[Trace]] = collections.defaultdict(list)
    for trace in episodes["traces"]:
        kinds[trace["id"].partition("/")[0]].append(trace)
    turns = episodes["max_turns"]
    head = ["environment", "episodes", *(f"turn {turn}" for turn in range(1, turns + 1))]
    rows = [
        [escape(kind), str(len(of)), *(f"{_solved_within(of, turn):.1f}" for turn in range(1, turns + 1))]
        for kind, of in kinds.items()
    ]
    body = f"""<h1>Agent episodes of {escape(name)}</h1>
<h2>Solved within this many turns, %</h2>
{html_table(head, rows)}
<h2>Episodes by the turn that solved them</h2>
{_bars(kinds, turns)}
<h2>Causes of failure</h2>
{_failures(kinds)}
<h2>Every episode</h2>
{"".join(map(_trace, episodes["traces"]))}"""
    return html_page(f"Agents · {name}", body)


def _solved_within(traces: Sequence[Trace], turn: int) -> float:
    return 100 * sum((trace["solved_at"] or turn + 1) <= turn for trace in traces) / len(traces)


def _bars(kinds: Mapping[str, Sequence[Trace]], turns: int) -> str:
    parts = [(f"solved in turn {turn}", f"c{1 + (turn - 1) % 8}") for turn in range(1, turns + 1)]
    counts = {
        kind: [sum((trace["solved_at"] or turns + 1) == turn for trace in of) for turn in range(1, turns + 2)]
        for kind, of in kinds.items()
    }
    texts = {kind: list(map(str, of)) for kind, of in counts.items()}
    return stacked_bars([*parts, ("not solved", "none")], counts, texts)


def _failures(kinds: Mapping[str, Sequence[Trace]]) -> str:
    counts = {kind: collections.Counter(trace["failure"] for trace in of) for kind, of in kinds.items()}
    names = sorted({name for of in counts.values() for name in of if name})
    rows = [[escape(kind), *(str(of[name] or "–") for name in names)] for kind, of in counts.items()]
    return (
        html_table(["environment", *map(escape, names)], rows)
        if names
        else '<p class="soft">None failed.</p>'
    )


def _trace(trace: Trace) -> str:
    outcome = f"solved in turn {trace['solved_at']}" if trace["solved_at"] else f"failed: {trace['failure']}"
    parts = [("task", trace["task"])]
    for number, turn in enumerate(trace["turns"], start=1):
        parts += [(f"agent, turn {number}", turn["action"])]
        parts += [(f"{turn['step']['role']} ({turn['step']['verdict']})", turn["step"]["observation"])]
    texts = "".join(f'<p class="soft">{escape(who)}</p><pre>{escape(what)}</pre>' for who, what in parts)
    count = len(trace["turns"])
    turns = f'<small class="soft">{count} turn{"s" if count != 1 else ""}</small>'
    title = escape(f"{trace['id']}: {outcome}")
    return f'<details class="card"><summary>{title}{turns}</summary>{texts}</details>\n'
