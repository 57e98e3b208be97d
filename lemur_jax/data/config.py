"""`config.data`: the stores of a run and how they are mixed."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TypeVar

from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.sections import from_plain, require, require_one_of

PACKINGS = ("concat", "fit")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One ingredient of the mixture."""

    share: float = -1.0  # relative share of the tokens; required without `epochs`
    packing: str = "concat"  # "concat": one stream split into rows; "fit": whole documents, as many as fit
    max_epochs: float = 0.0  # maximum passes over the source; 0: no limit
    epochs: float = 0.0  # passes over the source; for all sources or none; sets shares and train.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Other shares from an update on, until the next stage begins."""

    step: int  # its first update
    shares: Mapping[str, float]  # source -> share of tokens; other sources have none


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token stores, rows and the mixture."""

    modules: tuple[str, ...] = ()  # Python modules that register seqio tasks, e.g. files beside the config
    stores: str = "stores"  # directory of token stores, one folder a task and split
    sequence_length: int = 2048  # tokens T of a row
    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)  # seqio task, or task/label
    mixture: str = ""  # a seqio.Mixture instead of `sources`; `lemur prepare` records its sources
    stages: Mapping[str, StageConfig] = dataclasses.field(default_factory=dict)  # name -> shares from a step

    def __post_init__(self):
        # A mixture takes its sources in the order of their names, however they were given.
        object.__setattr__(self, "sources", dict(sorted(self.sources.items())))
        require(self.sequence_length >= 1, "data.sequence_length", self.sequence_length, "at least 1")
        for name, source in self.sources.items():
            section = f"data.sources.{name}"
            require_one_of(f"{section}.packing", source.packing, PACKINGS)
            require(
                0 <= source.max_epochs < math.inf,
                f"{section}.max_epochs", source.max_epochs, "0 (no limit) or more",
            )  # fmt: skip
        if self.by_epochs:
            for name, source in self.sources.items():
                must = "above 0 and finite, as another source has `epochs`"
                require(0 < source.epochs < math.inf, f"data.sources.{name}.epochs", source.epochs, must)
            require(not self.stages, "data.stages", list(self.stages), "empty where sources have `epochs`")
        elif self.sources:
            if missing := [name for name, source in self.sources.items() if source.share == -1]:
                raise UserError(
                    f"config.data.sources.{missing[0]} has no share: give it one, or `epochs` to every source"
                )
            shares = {f"data.sources.{name}.share": source.share for name, source in self.sources.items()}
            _check_shares(shares, "data.sources")
        self._check_stages()

    @property
    def mixture_record(self) -> epath.Path:
        """The file beside the stores that names the sources of `mixture`: training needs no seqio."""
        return epath.Path(self.stores) / f"{self.mixture}.mixture.json"

    @property
    def by_epochs(self) -> bool:
        """Whether sources have `epochs` in place of shares."""
        return any(source.epochs for source in self.sources.values())

    @property
    def counts_record(self) -> epath.Path:
        """The file beside the stores from which `epochs` and `train.batch_documents` become rows and updates."""
        return epath.Path(self.stores) / f"counts-{self.sequence_length}.json"

    def _check_stages(self) -> None:
        steps = {name: stage.step for name, stage in self.stages.items()}
        distinct = len(set(steps.values())) == len(steps)
        require(distinct, "data.stages", steps, "stages that begin at different steps")
        for name, stage in self.stages.items():
            section = f"data.stages.{name}.shares"
            for source in stage.shares if self.sources or not self.mixture else ():
                require_one_of(section, source, self.sources)
            _check_shares({f"{section}.{source}": share for source, share in stage.shares.items()}, section)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What a training store has: of one packing and one T."""

    packing: str
    documents: int
    rows: int
    tokens: int  # without padding


def read_record(file: epath.Path, cls: type[T]) -> dict[str, T]:
    """What `lemur prepare` recorded of each source beside the stores; {} without a file, UserError: it is damaged."""
    try:
        fields = json.loads(file.read_text()) if file.exists() else {}
        return {name: from_plain(cls, values, name) for name, values in fields.items()}
    except (ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{file} is damaged ({reason_of(error)}): remove it and run `lemur prepare` with this config"
        ) from error


def shares_of_epochs(
    sources: Mapping[str, SourceConfig], counts: Mapping[str, SourceCounts]
) -> dict[str, float]:
    """The share of tokens of each source: its epochs times its tokens."""
    return {name: source.epochs * counts[name].tokens for name, source in sources.items()}


def documents_per_row(sources: Mapping[str, SourceConfig], counts: Mapping[str, SourceCounts]) -> float:
    """The mean number of documents in a row of the mixture. A source's part of the rows is share · rows / tokens."""
    rates = {name: source.share * counts[name].rows / counts[name].tokens for name, source in sources.items()}
    documents = sum(rate * counts[name].documents / counts[name].rows for name, rate in rates.items())
    return documents / sum(rates.values())


def _check_shares(shares: Mapping[str, float], section: str) -> None:
    for key, share in shares.items():
        require(0 <= share < math.inf, key, share, "a number, 0 or more, and finite")
    if not any(shares.values()):
        raise UserError(f"all shares of config.{section} are 0: give one source a share")
