"""The corpora of `fetch.py` as seqio tasks: `code` (six languages), `manuals`, and `book`, held out whole."""

import os

from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.tasks import add_files

CORPORA = os.environ.get("LEMUR_CORPORA", "corpora")
FIELDS = Fields(id="id", meta=("license",))
LANGUAGES = ("python", "go", "rust", "c", "cpp", "ruby")

add_files("code", [f"{CORPORA}/{name}.jsonl" for name in LANGUAGES], FIELDS, held_out=0.02)
add_files("manuals", f"{CORPORA}/manuals.jsonl", FIELDS, held_out=0.1)
add_files("book", {"validation": f"{CORPORA}/book.jsonl"}, FIELDS)
