"""Episodes as one HTML page: success by turn, how the others failed, and every trace whole."""

import collections
import html
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.report.assets import CSS

_STYLE = """pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 14px 10px}
.turns{margin-top:12px;padding:12px 14px}
.turns ul{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:0 0 10px;padding:0}
.turns li i{display:inline-block;width:12px;height:12px;margin-right:6px;border-radius:3px}
.turns p{display:flex;align-items:center;gap:10px;margin:6px 0}.turns b{width:6.5em}
.turns p span{display:flex;flex:1;gap:2px}.turns p i{padding:2px 8px;border-radius:3px;font-style:normal}
summary small{float:right}"""


def page(episodes: Mapping[str, Any], name: str) -> str:
    """The page.

    Args:
      episodes: `max_turns` and `traces`, as `episodes.to_json` writes them.
      name: of the agent.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for trace in episodes["traces"]:
        kinds[trace["id"].partition("/")[0]].append(trace)
    turns = range(1, episodes["max_turns"] + 1)
    rates = {kind: [_solved_within(of, turn) for turn in turns] for kind, of in kinds.items()}
    head = ["environment", "episodes", *(f"turn {turn}" for turn in turns)]
    rows = [[kind, str(len(kinds[kind])), *(f"{rate:.1f}" for rate in of)] for kind, of in rates.items()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Agents · {html.escape(name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}{_STYLE}</style></head>
<body><main><h1>Agent episodes of {html.escape(name)}</h1>
<h2>Solved within so many turns, %</h2>
{_table(head, rows)}
{_bars(kinds, len(turns))}
<h2>How the others failed</h2>
{_failures(kinds)}
<h2>Every episode</h2>
{"".join(map(_trace, episodes["traces"]))}
</main></body></html>
"""


def _solved_within(traces: Sequence[Mapping[str, Any]], turn: int) -> float:
    return 100 * sum((trace["solved_at"] or turn + 1) <= turn for trace in traces) / len(traces)


def _bars(kinds: Mapping[str, Sequence[Mapping[str, Any]]], turns: int) -> str:
    """A bar for each environment: episodes by the turn that solved them, those never solved at its end."""
    shades = [f"hsl(214 72% {38 + 30 * turn / turns:.0f}%)" for turn in range(turns)]
    groups = [(f"solved in turn {turn}", f"{shade};color:#fff") for turn, shade in enumerate(shades, start=1)]
    groups.append(("not solved", "var(--rule)"))
    legend = "".join(f'<li><i style="background:{style}"></i>{name}</li>' for name, style in groups)
    rows = ""
    for kind, traces in kinds.items():
        counts = collections.Counter((trace["solved_at"] or turns + 1) - 1 for trace in traces)
        parts = "".join(
            f'<i style="flex:{counts[index]};background:{style}" title="{name}">{counts[index]}</i>'
            for index, (name, style) in enumerate(groups)
            if counts[index]
        )
        rows += f"<p><b>{html.escape(kind)}</b><span>{parts}</span></p>\n"
    return f'<div class="card turns"><ul>{legend}</ul>{rows}</div>'


def _failures(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    counts = {kind: collections.Counter(trace["failure"] for trace in of) for kind, of in kinds.items()}
    names = sorted({name for of in counts.values() for name in of if name})
    rows = [[kind, *(str(of[name] or "–") for name in names)] for kind, of in counts.items()]
    return _table(["environment", *names], rows) if names else '<p class="soft">None did.</p>'


def _trace(trace: Mapping[str, Any]) -> str:
    outcome = f"solved in turn {trace['solved_at']}" if trace["solved_at"] else f"failed: {trace['failure']}"
    parts = [("task", trace["task"])]
    for number, turn in enumerate(trace["turns"], start=1):
        parts += [(f"agent, turn {number}", turn["action"])]
        parts += [(f"{turn['step']['role']} ({turn['step']['verdict']})", turn["step"]["observation"])]
    said = "".join(
        f'<p class="soft">{html.escape(who)}</p><pre>{html.escape(what)}</pre>' for who, what in parts
    )
    title = html.escape(f"{trace['id']}: {outcome}")
    count = len(trace["turns"])
    turns = f'<small class="soft">{count} turn{"s" if count != 1 else ""}</small>'
    return f'<details class="card"><summary>{title}{turns}</summary>{said}</details>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    return f'<div class="card"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'
