"""The corpora of the real runs as seqio tasks, as their publishers ship them.

    $LEMUR_DATA/code/    The Stack's Parquet files, a folder a language
    $LEMUR_DATA/text/    RefinedWeb's Parquet files
    $LEMUR_DATA/chat/    conversations in ShareGPT's form, *.jsonl, *.jsonl.gz or *.jsonl.zst

The directory may be on gs://. See docs/data.md for other formats and chat data sets.
"""

import os

from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.tasks import add_files
from lemur_jax.text import conversation_formats

DATA = os.environ.get("LEMUR_DATA", "data")

CODE = Fields(
    text="content",
    id="hexsha",
    meta=("lang", "max_stars_repo_name", "max_stars_repo_path", "max_stars_repo_licenses"),
    group="max_stars_repo_name",  # a repository is held out whole
)
add_files("lemur_code", f"{DATA}/code/*/*.parquet", CODE, held_out=0.001)
add_files("lemur_text", f"{DATA}/text/*.parquet", Fields(text="content", id="url"), held_out=0.001)
add_files(
    "lemur_chat",
    f"{DATA}/chat/*.jsonl*",
    Fields(messages=conversation_formats.sharegpt, id="id"),
    held_out=0.01,
)
