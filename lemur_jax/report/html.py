"""Pieces of the page."""

import html
import os
import re
from collections.abc import Iterable, Sequence


def table(head: Iterable[str], rows: Iterable[Sequence[str]], *, kind: str = "", card: bool = True) -> str:
    """A table of HTML cells; on a phone its rows are lists, of which each value says the head of its column."""
    head = list(head)
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    names = [re.sub("<[^>]*>", "", cell) for cell in head[1:]]
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td data-head="{name}">{cell}</td>' for name, cell in zip(names, row[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    made = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>'
    return f'<div class="card" tabindex="0">{made}</div>' if card else made


def text(value: str) -> str:
    return html.escape(os.fspath(value))
