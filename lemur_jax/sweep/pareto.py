"""The Pareto plots of a sweep, and the page that shows them with the table."""

import itertools

from lemur_jax.report.charts import Mark, scatter_plot
from lemur_jax.report.html import escape, html_page, html_table
from lemur_jax.sweep.results import Results, markdown_table, summary, table_rows

_TRAINED, _BASE, _MERGED = 1, 2, 4  # colours of the palette
_PHONE = (360, 400)  # pixels


def pareto_plot(results: Results, x: str, y: str, *, numbered: bool = False) -> str:
    """An SVG plot of the held-out bits per byte of group `y` against those of group `x`.

    A dot is the mean over the seeds of a variant with its standard deviation, a pale dot one seed, the cross the base.

    Args:
      results: of a sweep.
      x, y: groups of held-out tasks.
      numbered: for a narrow screen: labels are numbers, those of the rows of the table.
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
    caption = f"{results.tokens:,} tokens a run, mean ± standard deviation over seeds; towards the lower left is better"
    return scatter_plot(
        f"Held-out bits per byte, {y} against {x}",
        (f"{x}, held-out bits per byte", f"{y}, held-out bits per byte"),
        marks,
        caption="" if numbered else caption,
        **({"size": _PHONE} if numbered else {}),
    )


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
<h2>One group against another</h2>{plots}"""
    return html_page("Sweep · lemur_jax", body)


def result_files(results: Results, command: str) -> dict[str, str]:
    """File name -> contents of the table, the page and a plot for every two groups.

    Args:
      results: of a sweep.
      command: that made them; shown beside the table.
    """
    files = {"table.md": f"{markdown_table(results)}\n    {command}\n", "index.html": _page(results, command)}
    for number, (y, x) in enumerate(itertools.combinations(results.groups, 2)):
        files[f"pareto-{y}-{x}.svg" if number else "pareto.svg"] = pareto_plot(results, x, y)
    return files
