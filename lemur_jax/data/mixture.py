"""Which row of which source stands where in the global batch: a pure function of (seed, step, row).

Nothing is drawn and nothing is remembered. Sources take turns so that each one's rows are its exact
share of any stretch of the run; a source's own rows come in a new permutation each epoch. So a run
resumes at any step at no cost, and on any number of hosts sees the same batches.

Axes: B rows of the global batch, T position in a row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lemur_jax.common.errors import UserError
from lemur_jax.data.permutation import key_of, permute
from lemur_jax.data.rows import Batch, ConcatRows, FitRows, Rows
from lemur_jax.data.store import TokenStore
from lemur_jax.data.tokenizer import Tokenizer

PACKINGS: dict[str, Callable[[TokenStore, int], Rows]] = {"concat": ConcatRows, "fit": FitRows}

# Denominators of the fractions by which sources take turns. A batch of B rows adds up to B times as
# much in int64, so B may be 2^20; the fraction is off by less than 2^-80.
_MAX_DENOMINATOR = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One ingredient of a mixture.

    Attributes:
      name: of its task.
      rows: its examples.
      share: its part of the tokens, in proportion to the other sources' shares.
      max_epochs: how often each row may be seen; 0: without limit.
    """

    name: str
    rows: Rows
    share: float
    max_epochs: float = 0.0


class Mixture:
    """Sources mixed by tokens into global batches of `batch_rows` rows.

    The first source is split off from the others by a fraction p in lowest terms: of the first g rows of
    the run, floor(g p + 1/2) are its own. What is left is split in the same way for the second source,
    and so on. All in integers: with two sources the rows of each in any window, however far into the
    run, are its share to within one row; with n sources, to within n - 1.

    Raises:
      UserError: no sources, two of one name, a negative share, all shares 0, or sources that differ in
        sequence length.
    """

    def __init__(self, sources: Sequence[Source], seed: int, batch_rows: int):
        _check_sources(sources)
        self.sources = tuple(sources)
        self.seed = seed
        self.batch_rows = batch_rows
        self.length = sources[0].rows.length
        # Rows of a source, by the share of tokens that they are to make up.
        weights = [
            Fraction(str(source.share)) * len(source.rows) / source.rows.num_tokens for source in sources
        ]
        left = sum(weights)
        self._splits: list[tuple[int, int]] = []
        for weight in weights:
            part = (weight / left if left else Fraction(0)).limit_denominator(_MAX_DENOMINATOR)
            self._splits.append((part.numerator, part.denominator))
            left -= weight
        self._keys = [key_of("rows", int(seed), source.name) for source in sources]

    def rows_before(self, row: int) -> list[int]:
        """How many of the first `row` global rows of the run each source has; they add up to `row`."""
        counts = []
        for numerator, denominator in self._splits:
            counts.append((2 * row * numerator + denominator) // (2 * denominator))
            row -= counts[-1]
        return counts

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the global batch at a step.

        Returns:
          source_ids: int32 [B], indices into `sources`.
          row_indices: int64 [B], indices into the rows of that source.
        """
        first = step * self.batch_rows
        source_ids = np.empty(self.batch_rows, np.int32)
        row_indices = np.empty(self.batch_rows, np.int64)
        left = np.arange(self.batch_rows)  # rows of the batch not yet given to a source
        for index, visited in enumerate(self.rows_before(first)):
            numerator, denominator = self._splits[index]
            # Python's integers carry the run so far; inside the batch int64 is enough.
            remainder = (2 * first * numerator + denominator) % (2 * denominator)
            turns = (remainder + 2 * numerator * np.arange(len(left) + 1)) // (2 * denominator)
            taken = np.diff(turns) > 0
            mine, left = left[taken], left[~taken]
            source_ids[mine] = index
            row_indices[mine] = self._visit(index, visited, len(mine))
            first -= visited
        return source_ids, row_indices

    def read(self, source_ids: np.ndarray, row_indices: np.ndarray) -> Batch:
        """Reads rows as `locate` names them, all of one batch or some; arrays as of `Rows.read`."""
        batch: Batch = {}
        for index in np.unique(source_ids):
            places = np.flatnonzero(source_ids == index)
            for key, values in self.sources[index].rows.read(row_indices[places]).items():
                if key not in batch:
                    batch[key] = np.empty((len(source_ids), self.length), values.dtype)
                batch[key][places] = values
        return batch

    def documents(self, step: int, places: Sequence[int] | None = None) -> list[str]:
        """`source/document` for each document in the batch of a step, each once, in the order of its rows.

        Args:
          places: only these rows of the batch; None: all.
        """
        source_ids, row_indices = self.locate(step)
        names: dict[str, None] = {}  # ordered, without doubles
        for place in range(self.batch_rows) if places is None else places:
            source = self.sources[source_ids[place]]
            documents = source.rows.documents(int(row_indices[place]))
            names.update(dict.fromkeys(f"{source.name}/{document}" for document in documents))
        return list(names)

    def digests(self) -> dict[str, str]:
        """The digest of each source's store, by the source's name."""
        return {source.name: source.rows.store.manifest.digest for source in self.sources}

    def _visit(self, index: int, visited: int, count: int) -> np.ndarray:
        """Row indices of visits number `visited` ... `visited + count - 1` to a source."""
        size = len(self.sources[index].rows)
        epoch, place = divmod(visited, size)
        places = place + np.arange(count)
        return permute(places % size, size, self._keys[index], epoch + places // size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What a run needs of one source.

    Attributes:
      name: of the source.
      rows_wanted, rows_available: visits in the whole run, and rows of one epoch.
      tokens_wanted, tokens_available: the same in real (not padding) positions.
      max_epochs: the cap; 0: none.
    """

    name: str
    rows_wanted: int
    rows_available: int
    tokens_wanted: int
    tokens_available: int
    max_epochs: float

    @property
    def epochs(self) -> float:
        return self.rows_wanted / self.rows_available

    @property
    def exceeded(self) -> bool:
        return bool(self.max_epochs) and self.rows_wanted > Fraction(self.max_epochs) * self.rows_available


def budget(mixture: Mixture, steps: int) -> list[Need]:
    """What a run of so many updates needs of each source."""
    wanted = mixture.rows_before(steps * mixture.batch_rows)
    return [
        Need(
            name=source.name,
            rows_wanted=rows,
            rows_available=len(source.rows),
            tokens_wanted=rows * source.rows.num_tokens // len(source.rows),
            tokens_available=source.rows.num_tokens,
            max_epochs=source.max_epochs,
        )
        for source, rows in zip(mixture.sources, wanted, strict=True)
    ]


def check_budget(needs: Sequence[Need]) -> None:
    """Raises UserError if a source would be repeated more often than it may be."""
    for need in needs:
        if need.exceeded:
            raise UserError(
                f"source {need.name}: the run needs {need.tokens_wanted:,} tokens, {need.epochs:.2f} epochs"
                f" of its {need.tokens_available:,}, and data.sources.{need.name}.max_epochs is"
                f" {need.max_epochs:g}: raise that (0: no limit), lower the share or train.steps, or prepare"
                " more data"
            )


def format_budget(needs: Sequence[Need]) -> str:
    """The budget as a table for people."""
    total = sum(need.tokens_wanted for need in needs)
    lines = [("source", "share", "tokens wanted", "available", "epochs", "allowed")]
    for need in needs:
        lines.append(
            (
                need.name,
                f"{need.tokens_wanted / max(total, 1):.2%}",
                f"{need.tokens_wanted:,}",
                f"{need.tokens_available:,}",
                f"{need.epochs:.2f}",
                (f"{need.max_epochs:g}" if need.max_epochs else "any") + (" !" if need.exceeded else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in line)
        for line in (enumerate(zip(cells, widths, strict=True)) for cells in lines)
    )


def open_mixture(config: ConfigDict, tokenizer: Tokenizer) -> Mixture:
    """The mixture of the training stores that `config.data` describes.

    Raises:
      UserError: no sources, an unknown packing, a store that is missing or of another tokenizer, or
        shares that cannot be mixed.
    """
    sources = []
    for name, options in config.data.sources.items():
        sources.append(
            Source(
                name=name,
                rows=open_rows(config, tokenizer, name, "train", options.get("packing", "concat")),
                share=options.share,
                max_epochs=options.get("max_epochs", 0.0),
            )
        )
    return Mixture(sources, config.seed, config.train.batch_rows)


def open_rows(config: ConfigDict, tokenizer: Tokenizer, task: str, split: str, packing: str = "") -> Rows:
    """The rows of one task and split.

    Args:
      packing: "concat" or "fit"; "": "fit" for a store with a loss mask, else "concat".

    Raises:
      UserError: an unknown packing, or a store that is missing or of another tokenizer.
    """
    if packing and packing not in PACKINGS:
        raise UserError(
            f"data.sources.{task}.packing is {packing!r}: it must be one of {', '.join(PACKINGS)}"
        )
    store = TokenStore.open(epath.Path(config.data.stores) / task / split, tokenizer)
    packing = packing or ("fit" if store.manifest.has_loss_mask else "concat")
    return PACKINGS[packing](store, config.data.sequence_length)


def _check_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise UserError(
            "data.sources is empty: name at least one seqio task with a share, e.g. code=dict(share=1.0)"
        )
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise UserError(f"data.sources names a source twice: {', '.join(names)}")
    for source in sources:
        if not 0 <= source.share < float("inf"):
            raise UserError(
                f"data.sources.{source.name}.share is {source.share}: it must be 0 or more, and finite"
            )
        if source.max_epochs < 0:
            raise UserError(
                f"data.sources.{source.name}.max_epochs is {source.max_epochs}: it must be 0 (no limit) or"
                " more"
            )
    if not any(source.share for source in sources):
        raise UserError(f"the shares of all of data.sources ({', '.join(names)}) are 0: give one a share")
    lengths = {source.rows.length for source in sources}
    if len(lengths) > 1:
        raise UserError(f"sources of one mixture differ in sequence length: {sorted(lengths)}")
