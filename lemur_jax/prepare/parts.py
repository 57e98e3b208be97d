"""Parts of a token store by label, e.g. the languages of a corpus of code.

The source `code/python` of a config is the documents of the task `code` with the label `python`. The whole task is
tokenized once, and each part is copied into a store of its own, which has rows, shares and epochs like any source.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.data.manifest import describe_labels
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.store_writer import StoreWriter

_COPIED = 256  # documents that are looked at together


def split_name(source: str) -> tuple[str, str]:
    """(task, label) of a source's name; the label of a whole task is ""."""
    task, _, label = source.partition("/")
    return task, label


def check_part(source: str, split: str, sources: Sequence[str], steps: Mapping[str, Any]) -> None:
    """Refuses a part whose task has no step `label`, or is a source too, so that documents would repeat.

    A label that is called like a split would be the directory of the whole store.
    """
    task, label = split_name(source)
    if not label:
        return
    if "label" not in steps:
        raise UserError(
            f"{source!r} is a part of the task {task}, and prepare.steps.{task} has no step `label`: add e.g."
            " 'label': {'field': 'language'}"
        )
    if label in ("train", "validation", split):
        raise UserError(f"{source!r}: a label that is called like a split cannot be a source")
    if source in sources and task in sources:
        raise UserError(f"data.sources names {task} and its part {source}: name the whole or parts, not both")


def copy_part(store: TokenStore, label: str, writer: StoreWriter) -> None:
    """Adds the documents with a label to `writer`, in the order of the store; UserError: no document has it."""
    manifest = store.manifest
    if label not in manifest.labels:
        raise UserError(
            f"the task {manifest.task} has no document with {manifest.label_field} = {label!r} in its"
            f" {manifest.split} split; there are {describe_labels(manifest)}"
        )
    n_bytes = manifest.labels[label]["bytes"]
    for start in range(0, store.num_documents, _COPIED):
        documents = store.documents_of(label, start, start + _COPIED)
        if documents.size:
            # Only the sum is known: the first document gets it all.
            writer.copy(store, documents, [n_bytes, *[0] * (documents.size - 1)])
            n_bytes = 0
