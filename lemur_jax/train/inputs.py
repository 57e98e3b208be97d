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
from lemur_jax.data.mixture import Mixture, open_mixture
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import step
from lemur_jax.train.config import TrainConfig
from lemur_jax.train.evaluate import HeldOut, open_held_out
from lemur_jax.train.steplog import BatchSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the config names, opened: nothing is written yet, and no state is made."""

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
    tokenizer = Tokenizer.from_config(config.tokenizer)
    mixture = open_run_mixture(config.data, config.train, tokenizer, config.seed)
    check_data(mixture, tokenizer, config.model.vocab_size, config.preference.loss)
    held_out = open_held_out(config.data, config.eval, tokenizer)
    program = build(config, mesh, num_sources=len(mixture.sources))
    return Inputs(
        tokenizer=tokenizer,
        mixture=mixture,
        held_out=held_out,
        program=program,
        loader=Loader(mixture, batch_sharding(program.mesh)),
        plan=format_budget(budget(mixture, config.train.steps)),
    )


def check_data(mixture: Mixture, tokenizer: Tokenizer, vocab_size: int, loss: str) -> None:
    """Refuses a tokenizer that is larger than the model's vocabulary, and stores that `config.preference.loss` does not
    read, or next-token loss should not.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"config.tokenizer.path has {tokenizer.vocab_size} tokens, config.model.vocab_size is {vocab_size}: it must"
            " be at least as large"
        )
    for source in mixture.sources:
        preferences = source.rows.store.manifest.preferences
        if loss and not preferences:
            raise UserError(
                f"config.preference.loss is {loss!r}, but data.sources.{source.name} has no preferences"
            )
        if preferences and not loss:
            raise UserError(
                f"data.sources.{source.name} has preferences: set config.preference.loss, as next-token loss would"
                " train on the rejected answers too"
            )


def open_run_mixture(data: DataConfig, train: TrainConfig, tokenizer: Tokenizer, seed: int) -> Mixture:
    """The mixture of a run; UserError: it cannot be opened, or `train.steps` updates would read too much of it."""
    mixture = open_mixture(data, tokenizer, seed=seed, batch_rows=train.batch_rows)
    check_counts(mixture, data, train.batch_documents)
    check_budget(budget(mixture, train.steps))
    return mixture
