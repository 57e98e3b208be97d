"""Counts of the training stores, from which a config's epochs and batch of documents become rows and updates.

`lemur prepare` records them beside the stores, `RunConfig.with_counts` reads the record, and training compares it with
the stores that it opens.
"""

import dataclasses
import logging

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import write_json
from lemur_jax.data.config import DataConfig, SourceCounts, read_record
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
    counts = read_record(data.counts_record, SourceCounts)
    for name, source in data.sources.items():
        counts[name] = count(open_rows(data, tokenizer, name, "train", source.packing), source.packing)
    write_json(data.counts_record, {name: dataclasses.asdict(each) for name, each in counts.items()})


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
    counts = read_record(data.counts_record, SourceCounts)
    for source in mixture.sources:
        if counts.get(source.name) != count(source.rows, data.sources[source.name].packing):
            raise UserError(
                f"{data.counts_record} does not have the counts of {source.name}, from which epochs and"
                " train.batch_documents become rows and updates: run `lemur prepare` with this config"
            )
