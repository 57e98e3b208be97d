"""Counts of the training stores, from which a config's epochs and batch of documents become rows and updates.

`lemur prepare` records them beside the stores, `RunConfig.with_counts` reads the record, and training compares it with
the stores that it opens.
"""

import dataclasses
import json
import logging

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import write_json
from lemur_jax.data.config import DataConfig, SourceCounts
from lemur_jax.data.mixture import Mixture, open_rows
from lemur_jax.data.rows import Rows
from lemur_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def count(rows: Rows, packing: str) -> SourceCounts:
    """What a training store has."""
    documents = rows.store.num_documents
    return SourceCounts(packing=packing, documents=documents, rows=len(rows), tokens=rows.num_tokens)


def record_counts(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Writes the counts of the sources beside their stores; those of other sources stay."""
    record = data.counts_record
    counts = json.loads(record.read_text()) if record.exists() else {}
    for name, source in data.sources.items():
        rows = open_rows(data, tokenizer, name, "train", source.packing)
        counts[name] = dataclasses.asdict(count(rows, source.packing))
    write_json(record, counts)


def check_counts(mixture: Mixture, data: DataConfig, batch_documents: int) -> None:
    """Refuses stores other than those from which the config's epochs or batch of documents were computed.

    Args:
      mixture: of the training stores.
      data: the config that `mixture` was opened with.
      batch_documents: `config.train.batch_documents`.

    Raises:
      UserError: there is no record, or it has other counts.
    """
    if not (data.by_epochs or batch_documents):
        return
    record = data.counts_record
    counts = json.loads(record.read_text()) if record.exists() else {}
    for source in mixture.sources:
        current = count(source.rows, data.sources[source.name].packing)
        if counts.get(source.name) != dataclasses.asdict(current):
            raise UserError(
                f"{record} does not have the counts of {source.name}, from which epochs and train.batch_documents"
                " become rows and updates: run `lemur prepare` with this config"
            )
