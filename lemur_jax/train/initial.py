"""Where the first parameters of a run come from."""

import functools
from typing import Any

import jax

from lemur_jax.common.errors import UserError
from lemur_jax.convert.source import ModelSource, open_source
from lemur_jax.convert.vocabulary import resize
from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.config import InitConfig
from lemur_jax.train.state import abstract_params, shardings_of
from lemur_jax.train.step import Program


def initial_params(init: InitConfig, seed: int, tokenizer: Tokenizer, program: Program) -> Any:
    """Fresh parameters from the seed, or those of `config.init.checkpoint`.

    Raises:
      UserError: as `open_initial`, or the vocabulary is of another size and `config.init` does not say what to do
        about that.
    """
    shardings, dtype = shardings_of(program.state.params), program.param_dtype
    if not init.checkpoint:
        fresh = jax.jit(lambda key: decoder.init_params(program.model, key, dtype), out_shardings=shardings)
        return fresh(jax.random.key(seed))

    source = open_initial(init, tokenizer, program.model)
    params = source.restore(abstract_params(source.model, dtype, program.mesh))
    if source.model.vocab_size == program.model.vocab_size and not init.drop_rows_above:
        return params
    change = functools.partial(
        resize,
        vocab_size=program.model.vocab_size,
        drop_rows_above=init.drop_rows_above,
        new_rows=init.new_rows,
    )
    return jax.jit(change, out_shardings=shardings)(params)


def open_initial(init: InitConfig, tokenizer: Tokenizer, model: DecoderConfig) -> ModelSource:
    """`config.init.checkpoint`, of which no weights are read yet.

    Raises:
      UserError: it is not there, or of another shape or another tokenizer than the run.
    """
    source = open_source(init.checkpoint)
    _check_shape(source.model, model, init.checkpoint)
    if source.tokenizer_files:
        _check_tokenizer(init, tokenizer, source)
    return source


def _check_tokenizer(init: InitConfig, ours: Tokenizer, source: ModelSource) -> None:
    """That the ids whose rows are kept mean what they did; files of one tokenizer in other formats are one."""
    theirs = Tokenizer.from_files(source.tokenizer_files)
    kept = init.drop_rows_above or source.model.vocab_size
    for index in range(min(kept, theirs.vocab_size, ours.vocab_size)):
        if theirs.token(index) != ours.token(index):
            raise UserError(
                f"config.init.checkpoint {init.checkpoint} was trained with another tokenizer: id {index} is"
                f" {theirs.token(index)!r} there and {ours.token(index)!r} in config.tokenizer.path: take the"
                " same, or forget rows with config.init.drop_rows_above"
            )


def _check_shape(source: DecoderConfig, wanted: DecoderConfig, where: str) -> None:
    free = {"vocab_size", "initializer_range", "max_position_embeddings"}
    theirs, ours = source.to_dict(), wanted.to_dict()
    for field, value in theirs.items():
        if field not in free and value != ours[field]:
            raise UserError(
                f"config.init.checkpoint {where} has model.{field} {value}, the config {ours[field]}:"
                " they must be the same model"
            )
