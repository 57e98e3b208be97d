"""The 16 sources of Lemur's continued pretraining (Table 8 of the paper) and its 4 chat sets (Table 1), as seqio
tasks.

Each task reads files as published, in directories of $LEMUR_DATA, which may be on gs://:

    the-stack-dedup/data/LANGUAGE/*.parquet    bigcode/the-stack-dedup
    falcon-refinedweb/data/*.parquet           tiiuae/falcon-refinedweb
    wikipedia/20231101.en/*.parquet            wikimedia/wikipedia
    redpajama/{book,arxiv,stackexchange}/*     togethercomputer/RedPajama-Data-1T, JSON Lines
    pile/dm_mathematics/*.jsonl*               the Pile's copy of DeepMind Mathematics
    oasst1/data/*.parquet                      OpenAssistant/oasst1
    openorca/*.parquet                         Open-Orca/OpenOrca
    sharegpt/*.json*                           ShareGPT's format, one conversation a line
    evol_code_alpaca/*.jsonl                   theblackcat102/evol-codealpaca-v1 or similar

The paper names The Stack, RefinedWeb and the kinds of the other texts. Which copies of Wikipedia, books, arXiv,
StackExchange and DM Mathematics it used is not published; those above are chosen here.
"""

import os

from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.tasks import add_files
from lemur_jax.text import conversation_formats

DATA = os.environ.get("LEMUR_DATA", "data")

# Task -> folders of The Stack. "Others" of Table 8 is every language without a row of its own; these are the largest.
CODE = {
    "stack_python": ["python"],
    "stack_sql": ["sql"],
    "stack_java": ["java"],
    "stack_shell": ["shell"],
    "stack_notebook": ["jupyter-notebook"],
    "stack_javascript": ["javascript"],
    "stack_c": ["c"],
    "stack_php": ["php"],
    "stack_cpp": ["c++"],
    "stack_other": [
        "c-sharp",
        "css",
        "go",
        "html",
        "julia",
        "lua",
        "markdown",
        "perl",
        "r",
        "ruby",
        "rust",
        "scala",
        "typescript",
    ],
}
TEXT = {
    "refinedweb": ("falcon-refinedweb/data/*.parquet", Fields(text="content", id="url")),
    "wikipedia": ("wikipedia/20231101.en/*.parquet", Fields(text="text", id="id")),
    "books": ("redpajama/book/*.jsonl*", Fields()),
    "arxiv": ("redpajama/arxiv/*.jsonl*", Fields()),
    "stackexchange": ("redpajama/stackexchange/*.jsonl*", Fields()),
    "dm_mathematics": ("pile/dm_mathematics/*.jsonl*", Fields()),
}
CHAT = {
    "openassistant": (
        "oasst1/data/*.parquet",
        Fields(
            messages=conversation_formats.openassistant_messages,
            gather="message_tree_id",  # the rows of one tree make one conversation
            id="message_tree_id",
            meta=("lang",),
        ),
    ),
    "openorca": ("openorca/*.parquet", Fields(messages=conversation_formats.openorca, id="id")),
    "sharegpt": ("sharegpt/*.json*", Fields(messages=conversation_formats.sharegpt, id="id")),
    "evol_code_alpaca": ("evol_code_alpaca/*.jsonl", Fields(messages=conversation_formats.evol_code_alpaca)),
}

STACK = Fields(
    text="content",
    id="hexsha",
    meta=("lang", "max_stars_repo_name", "max_stars_repo_path", "max_stars_repo_licenses"),
    group="max_stars_repo_name",  # a repository is held out whole
)
for name, folders in CODE.items():
    patterns = [f"{DATA}/the-stack-dedup/data/{folder}/*.parquet" for folder in folders]
    add_files(name, patterns, STACK, held_out=0.001)
for name, (pattern, fields) in TEXT.items():
    add_files(name, f"{DATA}/{pattern}", fields, held_out=0.001)
for name, (pattern, fields) in CHAT.items():
    add_files(name, f"{DATA}/{pattern}", fields, held_out=0.01)
