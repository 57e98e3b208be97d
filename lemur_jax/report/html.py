"""Pieces of the page."""

import html
import os
from collections.abc import Iterable, Sequence


def table(head: Iterable[str], rows: Iterable[Sequence[str]], *, kind: str = "", card: bool = True) -> str:
    """A table of HTML cells that scrolls sideways where it does not fit."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    made = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>'
    return f'<div class="card" tabindex="0">{made}</div>' if card else made


def text(value: str) -> str:
    return html.escape(os.fspath(value))
