"""Assigns rows of the sources to rows of the global batch: a pure function of (seed, step, row).

Sources take turns so that each one has its exact share of any stretch of the run; a source's rows come in a
new permutation each epoch. So a run resumes at any step at no cost, and sees the same batches on any number of hosts.

Axes: B rows of the global batch, T position in a row.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.data.config import DataConfig, StageConfig
from lemur_jax.data.permutation import key_of, permute
from lemur_jax.data.rows import Batch, ConcatRows, FitRows, Rows
from lemur_jax.data.store import TokenStore
from lemur_jax.text.tokenizer import Tokenizer

PACKINGS: dict[str, Callable[[TokenStore, int], Rows]] = {"concat": ConcatRows, "fit": FitRows}

# Of the fractions by which sources take turns. A batch adds up to B times as much in int64, so B may be 2^20.
_MAX_DENOMINATOR = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One ingredient of a mixture, as in `config.data.sources`, with its rows."""

    name: str
    rows: Rows
    share: float
    max_epochs: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StageRows:
    """A stage by rows: its first row, the rows each source has had before, and how sources take turns."""

    first_row: int
    visited: Sequence[int]
    splits: Sequence[tuple[int, int]]

    def rows_before(self, row: int) -> list[int]:
        counts = []
        row -= self.first_row
        for visited, (numerator, denominator) in zip(self.visited, self.splits, strict=True):
            count = (2 * row * numerator + denominator) // (2 * denominator)
            counts.append(visited + count)
            row -= count
        return counts


class Mixture:
    """Sources mixed by tokens into global batches of `batch_rows` rows.

    The first source is split off from the others by a fraction p: of the first g rows of a stage, floor(g p + 1/2) are
    its own. What is left is split in the same way for the second source, and so on. With n sources the rows of each in
    any window of a stage are its share to within n - 1 rows. A source goes through its rows in one order over all
    stages: none is repeated or left out where a stage begins.

    Args:
      sources: all with rows of one length.
      stages: name and config of those after the first, which begins at step 0 with the sources' own shares.

    Attributes:
      stages: all of them, in order.

    Raises:
      UserError: no sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        batch_rows: int,
        stages: Iterable[tuple[str, StageConfig]] = (),
    ):
        if not sources:
            raise UserError(
                "data.sources is empty: name at least one seqio task with a share, e.g. code=dict(share=1.0)"
            )
        shares = {source.name: source.share for source in sources}
        self.sources = tuple(sources)
        self.stages = (
            ("start", StageConfig(step=0, shares=shares)),
            *sorted(stages, key=lambda item: item[1].step),
        )
        self.seed = seed
        self.batch_rows = batch_rows
        self.length = sources[0].rows.length
        self._keys = [key_of("rows", int(seed), source.name) for source in sources]
        self._stage_rows: list[_StageRows] = []
        for _, stage in self.stages:
            row = stage.step * batch_rows
            visited = self.rows_before(row) if row else [0] * len(sources)
            splits = _splits(sources, stage.shares)
            self._stage_rows.append(_StageRows(first_row=row, visited=visited, splits=splits))

    def rows_before(self, row: int) -> list[int]:
        """How many of the first `row` rows of the run each source has; they add up to `row`."""
        return self._stage_rows_at(row).rows_before(row)

    def _stage_rows_at(self, row: int) -> _StageRows:
        return self._stage_rows[bisect.bisect(self._stage_rows, row, key=lambda each: each.first_row) - 1]

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the global batch at a step.

        Returns:
          source_ids: int32 [B], indices into `sources`.
          row_indices: int64 [B], indices into the rows of that source.
        """
        row = step * self.batch_rows
        stage = self._stage_rows_at(row)
        offset = row - stage.first_row  # stages begin with a batch, so the batch is within one
        source_ids = np.empty(self.batch_rows, np.int32)
        row_indices = np.empty(self.batch_rows, np.int64)
        unassigned = np.arange(self.batch_rows)  # rows of the batch that have no source yet
        for index, visited in enumerate(stage.rows_before(row)):
            numerator, denominator = stage.splits[index]
            # Python's integers carry the run so far; inside the batch int64 is enough.
            remainder = (2 * offset * numerator + denominator) % (2 * denominator)
            turns = (remainder + 2 * numerator * np.arange(len(unassigned) + 1)) // (2 * denominator)
            taken = np.diff(turns) > 0
            assigned, unassigned = unassigned[taken], unassigned[~taken]
            source_ids[assigned] = index
            row_indices[assigned] = self.visits(index, visited, len(assigned))
            offset -= visited - stage.visited[index]
        return source_ids, row_indices

    def read(self, source_ids: np.ndarray, row_indices: np.ndarray) -> Batch:
        """Reads rows that `locate` names; arrays as of `Rows.read`."""
        batch: Batch = {}
        for index in np.unique(source_ids):
            positions = np.flatnonzero(source_ids == index)
            for key, values in self.sources[index].rows.read(row_indices[positions]).items():
                if key not in batch:
                    batch[key] = np.empty((len(source_ids), self.length), values.dtype)
                batch[key][positions] = values
        return batch

    def documents(self, step: int, rows: Sequence[int] | None = None) -> list[str]:
        """`source/document` of each document in a step's batch; each once, in order of the rows.

        `rows`: the rows [0, B) of the batch to look at, in this order; None: all.
        """
        source_ids, row_indices = self.locate(step)
        names: dict[str, None] = {}  # an ordered set
        for row in range(self.batch_rows) if rows is None else rows:
            source = self.sources[source_ids[row]]
            documents = source.rows.documents(int(row_indices[row]))
            names.update(dict.fromkeys(f"{source.name}/{document}" for document in documents))
        return list(names)

    def digests(self) -> dict[str, str]:
        """Digests of the sources' stores."""
        return {source.name: source.rows.store.manifest.digest for source in self.sources}

    def visits(self, index: int, visited: int, count: int) -> np.ndarray:
        """Row indices of a source's reads number `visited` to `visited + count - 1`."""
        size = len(self.sources[index].rows)
        epoch, offset = divmod(visited, size)
        offsets = offset + np.arange(count)
        return permute(offsets % size, size, self._keys[index], epoch + offsets // size)


def open_mixture(data: DataConfig, tokenizer: Tokenizer, *, seed: int, batch_rows: int) -> Mixture:
    """The mixture of the training stores of `config.data`; UserError: no sources, a `data.mixture` that is not
    prepared, or as `open_rows`.
    """
    if data.mixture and not data.sources:
        raise UserError(
            f"config.data.mixture is {data.mixture!r}, and {data.mixture_record} is not there: run `lemur prepare` with"
            " this config, which records the sources of the mixture, and load the config again"
        )
    sources = [
        Source(
            name=name,
            rows=open_rows(data, tokenizer, name, "train", source.packing),
            share=max(source.share, 0.0),  # not given: `check_counts` refuses the run
            max_epochs=source.max_epochs,
        )
        for name, source in data.sources.items()
    ]
    return Mixture(sources, seed, batch_rows, data.stages.items())


def open_rows(data: DataConfig, tokenizer: Tokenizer, task: str, split: str, packing: str = "") -> Rows:
    """The rows of one task and split; UserError: its store is missing or of another tokenizer.

    Without a `packing` it is "fit" for a store with a loss mask, else "concat".
    """
    store = TokenStore.open(epath.Path(data.stores) / task / split, tokenizer)
    packing = packing or ("fit" if store.manifest.has_loss_mask else "concat")
    if store.manifest.preferences and packing != "fit":
        raise UserError(
            f"data.sources.{task}.packing is {packing!r}: preferences are not cut, so it must be 'fit'"
        )
    return PACKINGS[packing](store, data.sequence_length)


def _splits(sources: Sequence[Source], shares: Mapping[str, float]) -> list[tuple[int, int]]:
    """The fraction (numerator, denominator) by which each source is split off from those after it."""
    weights = [
        Fraction(str(shares.get(source.name, 0))) * len(source.rows) / source.rows.num_tokens
        for source in sources
    ]
    remaining = sum(weights)
    splits = []
    for weight in weights:
        fraction = (weight / remaining if remaining else Fraction(0)).limit_denominator(_MAX_DENOMINATOR)
        splits.append((fraction.numerator, fraction.denominator))
        remaining -= weight
    return splits
