"""Which row of which source stands where in the global batch: a pure function of (seed, step, row).

Nothing is drawn and nothing is remembered. Sources take turns so that each one's rows are its exact
share of any stretch of the run; a source's own rows come in a new permutation each epoch. So a run
resumes at any step at no cost, and on any number of hosts sees the same batches.

Axes: B rows of the global batch, T position in a row.
"""

import bisect
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lemur_jax.common.errors import UserError
from lemur_jax.data.permutation import key_of, permute
from lemur_jax.data.rows import Batch, ConcatRows, FitRows, Rows
from lemur_jax.data.store import TokenStore
from lemur_jax.text.tokenizer import Tokenizer

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Shares that hold from an update on, until the next stage begins.

    Attributes:
      name: for people.
      step: its first update.
      shares: the share of tokens of each source, by name; a source that is not named has none.
    """

    name: str
    step: int
    shares: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stretch:
    """A stage by rows: where it begins, how far each source was by then, and how they take turns."""

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

    The first source is split off from the others by a fraction p in lowest terms: of the first g rows of
    a stage, floor(g p + 1/2) are its own. What is left is split in the same way for the second source,
    and so on. All in integers: with two sources the rows of each in any window of a stage, however far
    into the run, are its share to within one row; with n sources, to within n - 1. A source goes through
    its rows in one order over all stages: none is repeated or left out where a stage begins.

    Args:
      stages: those after the first, which begins at step 0 with the sources' own shares.

    Attributes:
      stages: all of them, in order.

    Raises:
      UserError: no sources, two of one name, a negative share, all shares 0, or sources that differ in
        sequence length; of stages, see `check_stages`.
    """

    def __init__(self, sources: Sequence[Source], seed: int, batch_rows: int, stages: Sequence[Stage] = ()):
        _check_sources(sources)
        own = {source.name: source.share for source in sources}
        check_stages(stages, list(own))
        self.sources = tuple(sources)
        self.stages = (
            Stage(name="start", step=0, shares=own),
            *sorted(stages, key=lambda stage: stage.step),
        )
        self.seed = seed
        self.batch_rows = batch_rows
        self.length = sources[0].rows.length
        self._keys = [key_of("rows", int(seed), source.name) for source in sources]
        self._stretches: list[_Stretch] = []
        for stage in self.stages:
            row = stage.step * batch_rows
            visited = self.rows_before(row) if row else [0] * len(sources)
            splits = _splits(sources, stage.shares)
            self._stretches.append(_Stretch(first_row=row, visited=visited, splits=splits))

    def rows_before(self, row: int) -> list[int]:
        """How many of the first `row` global rows of the run each source has; they add up to `row`."""
        return self._stretch(row).rows_before(row)

    def _stretch(self, row: int) -> _Stretch:
        return self._stretches[bisect.bisect(self._stretches, row, key=lambda each: each.first_row) - 1]

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the global batch at a step.

        Returns:
          source_ids: int32 [B], indices into `sources`.
          row_indices: int64 [B], indices into the rows of that source.
        """
        row = step * self.batch_rows
        stretch = self._stretch(row)
        first = row - stretch.first_row  # a stage begins with a batch, so this one lies in it whole
        source_ids = np.empty(self.batch_rows, np.int32)
        row_indices = np.empty(self.batch_rows, np.int64)
        left = np.arange(self.batch_rows)  # rows of the batch not yet given to a source
        for index, visited in enumerate(stretch.rows_before(row)):
            numerator, denominator = stretch.splits[index]
            # Python's integers carry the run so far; inside the batch int64 is enough.
            remainder = (2 * first * numerator + denominator) % (2 * denominator)
            turns = (remainder + 2 * numerator * np.arange(len(left) + 1)) // (2 * denominator)
            taken = np.diff(turns) > 0
            mine, left = left[taken], left[~taken]
            source_ids[mine] = index
            row_indices[mine] = self._visit(index, visited, len(mine))
            first -= visited - stretch.visited[index]
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
    return Mixture(sources, config.seed, config.train.batch_rows, stages_of(config))


def stages_of(config: ConfigDict) -> list[Stage]:
    """The stages of `config.data.stages`, the first one (the sources' own shares) left out.

    Raises:
      UserError: one without `step` or `shares`, a step that is not one of the run's, or what
        `check_stages` finds.
    """
    stages = []
    for name, options in config.data.stages.items():
        where = f"data.stages.{name}"
        if not isinstance(options, ConfigDict) or set(options) != {"step", "shares"}:
            raise UserError(f"{where} must be {{'step': first update, 'shares': {{source: share}}}}")
        if not isinstance(options.step, int) or not 0 < options.step < config.train.steps:
            raise UserError(
                f"{where}.step is {options.step!r}: it must be a whole number above 0 and below train.steps"
                f" ({config.train.steps})"
            )
        stages.append(Stage(name=name, step=options.step, shares=options.shares.to_dict()))
    check_stages(stages, list(config.data.sources))
    return stages


def check_stages(stages: Sequence[Stage], sources: Sequence[str]) -> None:
    """Raises UserError for an unknown source, a share that is none, or two stages that begin together."""
    begins: dict[int, str] = {}
    for stage in stages:
        if begins.setdefault(stage.step, stage.name) != stage.name:
            raise UserError(
                f"data.stages.{begins[stage.step]} and data.stages.{stage.name} both begin at step {stage.step}"
            )
        where = f"data.stages.{stage.name}.shares"
        for name in stage.shares:
            if name not in sources:
                nearest = difflib.get_close_matches(name, sources, n=1, cutoff=0.0)[0]
                raise UserError(
                    f"{where} names {name!r}, which is not in data.sources; did you mean {nearest!r}?"
                )
        _check_shares({f"{where}.{name}": share for name, share in stage.shares.items()}, where)


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
        if source.max_epochs < 0:
            raise UserError(
                f"data.sources.{source.name}.max_epochs is {source.max_epochs}: it must be 0 (no limit) or"
                " more"
            )
    _check_shares({f"data.sources.{source.name}.share": source.share for source in sources}, "data.sources")
    lengths = {source.rows.length for source in sources}
    if len(lengths) > 1:
        raise UserError(f"sources of one mixture differ in sequence length: {sorted(lengths)}")


def _check_shares(shares: Mapping[str, float], where: str) -> None:
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < float("inf"):
            raise UserError(f"{name} is {share!r}: it must be a number, 0 or more, and finite")
    if not any(shares.values()):
        raise UserError(f"all shares of {where} are 0: give one source a share")


def _splits(sources: Sequence[Source], shares: Mapping[str, float]) -> list[tuple[int, int]]:
    """By which fraction (numerator, denominator) each source is split off from those after it."""
    # Rows of a source, by the share of tokens that they are to make up.
    weights = [
        Fraction(str(shares.get(source.name, 0))) * len(source.rows) / source.rows.num_tokens
        for source in sources
    ]
    left = sum(weights)
    splits = []
    for weight in weights:
        part = (weight / left if left else Fraction(0)).limit_denominator(_MAX_DENOMINATOR)
        splits.append((part.numerator, part.denominator))
        left -= weight
    return splits
