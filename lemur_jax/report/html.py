"""HTML that the report, the sweep page, the plan page and the agents page share."""

import functools
import html
import os
import pathlib
import re
from collections.abc import Iterable, Sequence


def html_page(title: str, body: str, *, script: bool = False, overlay: bool = False) -> str:
    """A whole document that needs nothing but a browser.

    `script` includes page.js, which draws the line charts; with `overlay` these begin with all runs on one axis.
    """
    code = f"<script>{_asset('page.js')}</script>\n" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_asset("page.css")}</style>
</head>
<body data-overlay="{overlay:d}">
<main>
{body}
</main>
{code}</body>
</html>
"""


def html_table(
    head: Iterable[str], rows: Iterable[Sequence[str]], *, kind: str = "", card: bool = True
) -> str:
    """A table of HTML cells, the first of each row its heading.

    On a narrow screen each row becomes a list, and each value repeats the name of its column. `kind` is a CSS class.
    """
    head = list(head)
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    names = [re.sub("<[^>]*>", "", cell) for cell in head[1:]]
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td data-head="{name}">{cell}</td>' for name, cell in zip(names, row[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    table = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>'
    return f'<div class="card" tabindex="0">{table}</div>' if card else table


def escape(value: str | os.PathLike) -> str:
    """Text as HTML; "?" for what UTF-8 cannot write, e.g. in a path of another encoding."""
    return html.escape(os.fspath(value).encode(errors="replace").decode())


@functools.cache
def _asset(name: str) -> str:
    return (pathlib.Path(__file__).parent / name).read_text(encoding="utf-8")
