"""Writes docs/configuration.md from the dataclasses of the config and the comments of their fields.

    python docs/make_reference.py            # writes the page
    python docs/make_reference.py --check    # exit 1 where the page is out of date

A field's comment stands on its line, or directly above it.
"""

import argparse
import ast
import dataclasses
import inspect
import io
import pathlib
import sys
import textwrap
import tokenize
from typing import Any

from lemur_jax.config import RunConfig
from lemur_jax.data.config import SourceConfig, StageConfig

# Sections of a section whose names are the user's own.
NAMED = {"data": {"sources": SourceConfig, "stages": StageConfig}}
PAGE = pathlib.Path(__file__).with_name("configuration.md")
HEAD = """# Configuration reference

This page is generated: `python docs/make_reference.py`. Every key is set in a config file, `config.train.steps = 1000`,
or on the command line, `--config.train.steps=1000`. A key that does not exist is an error that names the nearest one.

"""


def comments_of(section: type) -> dict[str, str]:
    """Field name -> its comment, on its own line or lines, or on the comment lines directly above."""
    source = textwrap.dedent(inspect.getsource(section))
    comments = {
        token.start[0]: (token.string.lstrip("# ").rstrip(), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        lines = [comments[line][0] for line in range(node.lineno, node.end_lineno + 1) if line in comments]
        above = node.lineno - 1
        while above in comments and comments[above][1]:
            lines.insert(0, comments[above][0])
            above -= 1
        found[node.target.id] = " ".join(lines)
    return found


def default_of(field: dataclasses.Field) -> Any:
    """The default value, or MISSING for a required field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def table(section: type, prefix: str) -> list[str]:
    """The rows of one section in Markdown."""
    comments = comments_of(section)
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(section):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default = default_of(field)
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        meaning = comments[field.name].replace("|", "\\|")
        rows.append(f"| `{prefix}{field.name}` | `{kind}` | {shown} | {meaning} |")
    return rows


def page() -> str:
    """The whole page."""
    comments = comments_of(RunConfig)
    lines = [HEAD]
    own = [field for field in dataclasses.fields(RunConfig) if not dataclasses.is_dataclass(field.type)]
    for field in own:
        lines += [f"`config.{field.name}` (`{default_of(field)!r}`): {comments[field.name]}.", ""]
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            summary = inspect.cleandoc(field.type.__doc__).partition("\n\n")[0]
            lines += [f"## config.{field.name}", "", summary, "", *table(field.type, "")]
            for name, section in NAMED.get(field.name, {}).items():
                lines += table(section, f"{name}.NAME.")[2:]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            print(f"{PAGE} is out of date: run python docs/make_reference.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
