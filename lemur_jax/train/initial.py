"""Where the first parameters of a run come from."""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from lemur_jax.common.errors import UserError
from lemur_jax.convert.source import open_source
from lemur_jax.convert.vocabulary import resize
from lemur_jax.models import llama
from lemur_jax.models.config import LlamaConfig
from lemur_jax.train.state import abstract_params, shardings_of
from lemur_jax.train.step import Program


def initial_params(config: ConfigDict, program: Program) -> Any:
    """Fresh parameters from the seed, or those of `config.init.checkpoint`.

    Raises:
      UserError: the checkpoint is of another shape, or its vocabulary is of another size and
        `config.init` does not say what to do about that.
    """
    shardings = shardings_of(program.state.params)
    if not config.init.checkpoint:
        fresh = jax.jit(
            lambda key: llama.init_params(program.model, key, config.compute.param_dtype),
            out_shardings=shardings,
        )
        return fresh(jax.random.key(config.seed))

    source = open_source(config.init.checkpoint)
    _check_shape(source.model, program.model, config.init.checkpoint)
    params = source.restore(abstract_params(source.model, config.compute.param_dtype, program.mesh))
    if source.model.vocab_size == program.model.vocab_size and not config.init.drop_rows_above:
        return params
    change = functools.partial(
        resize,
        vocab_size=program.model.vocab_size,
        drop_rows_above=config.init.drop_rows_above,
        new_rows=config.init.new_rows,
    )
    return jax.jit(change, out_shardings=shardings)(params)


def _check_shape(source: LlamaConfig, wanted: LlamaConfig, where: str) -> None:
    free = {"vocab_size", "initializer_range", "max_position_embeddings"}
    theirs, ours = source.to_dict(), wanted.to_dict()
    for field, value in theirs.items():
        if field not in free and value != ours[field]:
            raise UserError(
                f"config.init.checkpoint {where} has model.{field} {value}, the config {ours[field]}:"
                " they must be the same model"
            )
