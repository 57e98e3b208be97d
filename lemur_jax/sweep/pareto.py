"""The Pareto plots of a sweep, the plot of its law, and the page that shows them with the tables."""

import itertools

from lemur_jax.report.charts import Mark, scatter_plot
from lemur_jax.report.html import escape, html_page, html_table
from lemur_jax.sweep.law import Laws, best_rows, law_note, law_rows
from lemur_jax.sweep.results import Results, markdown_table, summary, table_rows

_TRAINED, _BASE, _MERGED = 1, 2, 4  # colours of the palette
_PHONE = (360, 400)  # pixels


def pareto_plot(results: Results, x: str, y: str, *, numbered: bool = False) -> str:
    """An SVG plot of the held-out bits per byte of group `y` against those of group `x`.

    A dot is the mean over the seeds of a variant with its standard deviation, a pale dot one seed, the cross the base.
    `numbered`, for a narrow screen: labels are the numbers of the rows of the table.
    """
    front = results.front([x, y])
    marks = [
        Mark(
            x=variant.mean(x),
            y=variant.mean(y),
            label=str(number) if numbered else variant.name,
            note=variant.name,
            colour=_MERGED if variant.merged else _TRAINED,
            x_error=variant.spread(x),
            y_error=variant.spread(y),
            samples=list(zip(variant.bits[x], variant.bits[y], strict=True)),
            front=variant in front,
        )
        for number, variant in enumerate(results.variants, start=1)
    ]
    marks.append(Mark(x=results.base[x], y=results.base[y], label="base", colour=_BASE, cross=True))
    caption = "mean ± standard deviation over seeds; towards the lower left is better"
    if results.tokens:
        caption = f"{results.tokens:,} tokens a run, {caption}"
    return scatter_plot(
        f"Held-out bits per byte, {y} against {x}",
        (f"{x}, held-out bits per byte", f"{y}, held-out bits per byte"),
        marks,
        caption="" if numbered else caption,
        **({"size": _PHONE} if numbered else {}),
    )


def law_plot(laws: Laws) -> str:
    """An SVG plot of the change of every group against the share of the first part: measured, and by the law."""
    colours = dict(zip(laws.laws, itertools.cycle((_TRAINED, _BASE, _MERGED))))
    shares = [number / 200 for number in range(201)]
    curves = [
        (
            colours[group],
            [(share, 100 * (law.bits((share, 1 - share), laws.tokens) / law.base - 1)) for share in shares],
        )
        for group, law in laws.laws.items()
    ]
    last = sorted(
        (point for point in laws.points if point.tokens == laws.tokens), key=lambda point: point.shares
    )
    marks = [
        Mark(
            x=point.shares[0],
            y=100 * (bits / laws.laws[group].base - 1),
            label=group if point is last[len(last) // 2] else "",
            note=f"{group}, {point.ratio}",
            colour=colours[group],
        )
        for point in last
        for group, bits in point.bits.items()
    ]
    return scatter_plot(
        "Held-out bits per byte against the share of the first part",
        ("share of the first part of the ratio", "change of bits/byte, %"),
        marks,
        curves=curves,
        caption=f"after {laws.tokens:,} tokens: measured (dots) and by the law (lines)",
    )


def _law_section(laws: Laws) -> str:
    tables = ""
    for rows in (law_rows(laws), best_rows(laws)):
        head, *body = [[escape(cell) for cell in row] for row in rows]
        tables += html_table(head, body)
    return f"""<h2>Law</h2>{tables}<p class="soft">{escape(law_note(laws))}</p>
<div class="card scatter">{law_plot(laws)}</div>"""


def _page(results: Results, command: str) -> str:
    head, *rows = [[escape(cell) for cell in row] for row in table_rows(results)]
    names = "".join(f"<li>{escape(variant.name)}</li>" for variant in results.variants)
    plots = "".join(
        f'<div class="card scatter wide">{pareto_plot(results, x, y)}</div>'
        f'<div class="card scatter narrow">{pareto_plot(results, x, y, numbered=True)}<ol>{names}</ol></div>'
        for y, x in itertools.combinations(results.groups, 2)
    )
    body = f"""<h1>Sweep</h1>
<p class="soft">Written by <code>{escape(command)}</code></p>
<h2>Held-out bits per byte</h2>
{html_table(head, rows)}<p class="soft">{escape(summary(results))}</p>
{plots and f"<h2>One group against another</h2>{plots}"}{_law_section(results.laws) if results.laws else ""}"""
    return html_page("Sweep · lemur_jax", body)


def result_files(results: Results, command: str) -> dict[str, str]:
    """File name -> contents of the table, the page and a plot for every two groups; `command` is shown beside the
    table.
    """
    command = command.encode(errors="backslashreplace").decode()  # a path may have bytes that are no UTF-8
    files = {"table.md": f"{markdown_table(results)}\n    {command}\n", "index.html": _page(results, command)}
    for number, (y, x) in enumerate(itertools.combinations(results.groups, 2)):
        name = f"pareto-{y}-{x}.svg".replace("/", "-") if number else "pareto.svg"
        files[name] = pareto_plot(results, x, y)
    if results.laws:
        files["law.svg"] = law_plot(results.laws)
    return files
