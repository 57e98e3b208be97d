"""Tokenizer, mixture, held-out data and program of a run, opened and checked before anything is written."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.data.budget import budget, check_budget, format_budget
from lemur_jax.data.config import DataConfig
from lemur_jax.data.counts import check_counts
from lemur_jax.data.loader import Loader
from lemur_jax.data.mixture import Mixture, Source, open_mixture
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import step
from lemur_jax.train.config import TrainConfig
from lemur_jax.train.evaluate import HeldOut, open_held_out
from lemur_jax.train.steplog import BatchSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The opened inputs of a run; nothing is written yet, and no state is made."""

    tokenizer: Tokenizer
    mixture: BatchSource
    held_out: Sequence[HeldOut]
    program: step.Program
    loader: Loader | Any  # of the mixture; has `iterate` and `batch`
    rollouts: Any = None  # of `lemur rl` (`rl/rollouts.py`): turns the loader's numbers into updates
    plan: str = ""  # how much of the data will be read, for a person


def open_data(config: RunConfig, build: Callable[..., step.Program]) -> Inputs:
    """Tokenizer, data and program; UserError: one of them is missing, or they do not fit together."""
    mesh = make_mesh(config.mesh)  # first, as it needs no file
    tokenizer, mixture, held_out = open_stores(config)
    program = build(config, mesh, num_sources=len(mixture.sources))
    return Inputs(
        tokenizer=tokenizer,
        mixture=mixture,
        held_out=held_out,
        program=program,
        loader=Loader(mixture, batch_sharding(program.mesh)),
        plan=format_budget(budget(mixture, config.train.steps)),
    )


def open_stores(config: RunConfig) -> tuple[Tokenizer, Mixture, list[HeldOut]]:
    """The tokenizer and the data that it has tokenized; UserError as `open_data`."""
    tokenizer = Tokenizer.from_config(config.tokenizer)
    mixture = open_run_mixture(config.data, config.train, tokenizer, config.seed)
    check_preferences(config.preference.loss, mixture.sources)
    check_vocabulary(tokenizer, config.model.vocab_size)
    return tokenizer, mixture, open_held_out(config.data, config.eval, tokenizer)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """UserError: the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer in config.tokenizer.path has {tokenizer.vocab_size} tokens, config.model.vocab_size is"
            f" {vocab_size}: it must be at least as large"
        )


def check_preferences(loss: str, sources: Sequence[Source]) -> None:
    """UserError: `config.preference.loss` does not fit a source; it would learn rejected answers, or nothing."""
    for source in sources:
        store = source.rows.store
        prefix = f"config.preference.loss is {loss!r}, but data.sources.{source.name} has"
        if loss and not store.manifest.preferences:
            raise UserError(f"{prefix} no preferences")
        if store.manifest.preferences and not loss:
            raise UserError(
                f"{prefix} preferences: name a loss, as rejected answers would be trained on like chosen ones"
            )
        if loss in ("", "kto"):
            continue
        if not store.has_pairs():
            raise UserError(
                f"{prefix} no pairs of a chosen and a rejected conversation: `kto` alone learns without"
            )
        if getattr(source.rows, "without_targets", 0) == store.num_documents:
            raise UserError(
                f"{prefix} only pairs with an answer beyond data.sequence_length: raise it, or shorten the prompts"
            )


def open_run_mixture(data: DataConfig, train: TrainConfig, tokenizer: Tokenizer, seed: int) -> Mixture:
    """The mixture of a run; UserError: it cannot be opened, or `train.steps` updates would read too much of it."""
    mixture = open_mixture(data, tokenizer, seed=seed, batch_rows=train.batch_rows)
    check_counts(mixture, data, train.batch_documents)
    check_budget(budget(mixture, train.steps))
    return mixture
