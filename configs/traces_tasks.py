"""Episodes that `lemur export-traces` wrote, as the task `traces`; a fifth of them is held out.

$LEMUR_TRACES names the file, by default quickstart/traces/solved.jsonl.
"""

import os

from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.tasks import add_files
from lemur_jax.text import conversation_formats

FILE = os.environ.get("LEMUR_TRACES", "quickstart/traces/solved.jsonl")

add_files("traces", FILE, Fields(messages=conversation_formats.openai, id="id"), held_out=0.2)
