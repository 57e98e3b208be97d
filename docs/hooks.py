"""mkdocs hook: links to source files work in the repository; the built site shows their text alone."""

import re


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
