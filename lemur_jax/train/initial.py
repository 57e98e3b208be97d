"""Where the first parameters of a run come from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lemur_jax.cluster.hosts import agree
from lemur_jax.common.errors import UserError
from lemur_jax.convert.peft import read_peft
from lemur_jax.convert.source import ModelSource, open_again
from lemur_jax.convert.vocabulary import resize
from lemur_jax.infer.quantize import leaf_quantizer
from lemur_jax.models import decoder, lora
from lemur_jax.models.config import AdapterConfig, DecoderConfig
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.config import InitConfig
from lemur_jax.train.state import shardings_of
from lemur_jax.train.step import Program

# Config key -> step and digest of the model that it named when the run began; every checkpoint has them.
Origins = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialParams:
    """The first parameters of a run, made when they are asked for; `teacher` is `config.distill.teacher`.

    A model that is in the given `Origins` is read at its step there, and refused if its weights have changed since.
    One that is not is read at its newest step, and added to them.
    """

    init: InitConfig
    adapter: AdapterConfig
    seed: int
    tokenizer: Tokenizer
    program: Program
    teacher: str = ""

    def params(self, origins: Origins) -> Any:
        """What is trained; UserError as `initial_params`, or the PEFT adapter does not fit the config."""
        if not self.adapter.rank:
            return initial_params(self.init, self.seed, self.tokenizer, self.program, origins)
        program, key = self.program, jax.random.key(self.seed)
        shardings, dtype = shardings_of(program.state.params), program.param_dtype
        if self.adapter.checkpoint:
            return jax.device_put(read_peft(self.adapter, program.model, dtype), shardings)
        init_fn = jax.jit(
            lambda key: lora.init_adapter(self.adapter, program.model, key, dtype), out_shardings=shardings
        )
        return init_fn(key)

    def frozen(self, origins: Origins) -> Any:
        """What is not trained: the base of an adapter, a reference, a teacher of the same vocabulary, or None."""
        program = self.program
        if program.state.frozen is None:
            return None
        if self.teacher:
            return self._open_teacher(origins).restore(program.state.frozen)
        if not self.adapter.rank:
            return self.params(origins)
        source = self._open_base(origins)
        model, mesh, dtype = program.model, program.mesh, self.adapter.base_dtype
        if dtype != "int8":
            return source.restore(decoder.abstract_params(model, dtype, mesh))
        # Leaf by leaf: the whole model in bfloat16 may be more than the devices hold.
        abstract = decoder.abstract_params(model, "bfloat16", mesh)
        return source.restore(abstract, leaf_quantizer(model, mesh))

    def check(self, resumed: bool, origins: Origins) -> list[str]:
        """Opens what a start reads, without restoring models, and returns the paths; `resumed`: it has checkpoints.

        Raises UserError as `params` and `frozen`.
        """
        names = []
        if self.teacher:
            self._open_teacher(origins)
            names.append(self.teacher)
        if self.init.checkpoint and not (resumed and (self.teacher or self.program.state.frozen is None)):
            self._open_base(origins)
            names.append(self.init.checkpoint)
        if self.adapter.checkpoint and not resumed:
            read_peft(self.adapter, self.program.model, self.program.param_dtype)
            names.append(self.adapter.checkpoint)
        return names

    def _open_teacher(self, origins: Origins) -> ModelSource:
        source = _open("distill.teacher", self.teacher, origins)
        if source.model.vocab_size != self.program.model.vocab_size:
            raise UserError(
                f"config.distill.teacher {self.teacher} has a vocabulary of {source.model.vocab_size},"
                f" config.model.vocab_size is {self.program.model.vocab_size}: they must be the same"
            )
        if source.tokenizer_files:
            _check_tokenizer("distill.teacher", self.teacher, source, self.tokenizer)
        return source

    def _open_base(self, origins: Origins) -> ModelSource:
        """`config.init.checkpoint`, which an adapter or a reference may need at each start."""
        model = self.program.model
        source = open_initial(self.init, self.tokenizer, model, origins)
        if self.adapter.rank and (source.model.vocab_size != model.vocab_size or self.init.drop_rows_above):
            raise UserError(
                f"config.init.checkpoint {self.init.checkpoint} has a vocabulary of {source.model.vocab_size},"
                f" config.model.vocab_size is {model.vocab_size}: an adapter leaves the vocabulary as it is"
            )
        return source


def _open(key: str, path: str, origins: Origins) -> ModelSource:
    """What a key of the config names, the same on all hosts, as `InitialParams` says."""
    source, origins[key] = open_again(path, origins.get(key, {}))
    agree(f"the model that config.{key} names", lambda: origins[key]["digest"])
    return source


def initial_params(
    init: InitConfig, seed: int, tokenizer: Tokenizer, program: Program, origins: Origins
) -> Any:
    """Fresh parameters from the seed, or those of `config.init.checkpoint`, whose step `origins` may have.

    Raises UserError as `open_initial`.
    """
    if init.checkpoint:
        return _read(open_initial(init, tokenizer, program.model, origins), init, program)
    model, dtype = program.model, program.param_dtype
    shardings = shardings_of(decoder.abstract_params(model, dtype, program.mesh))
    init_fn = jax.jit(lambda key: decoder.init_params(model, key, dtype), out_shardings=shardings)
    return init_fn(jax.random.key(seed))


def _read(source: ModelSource, init: InitConfig, program: Program) -> Any:
    """The parameters of a source, with the vocabulary of the run."""
    model, dtype, mesh = program.model, program.param_dtype, program.mesh
    params = source.restore(decoder.abstract_params(source.model, dtype, mesh))
    if source.model.vocab_size == model.vocab_size and not init.drop_rows_above:
        return params
    shardings = shardings_of(decoder.abstract_params(model, dtype, mesh))
    return jax.jit(_resize_to(init, model), out_shardings=shardings)(params)


def _resize_to(init: InitConfig, model: DecoderConfig) -> Callable[[Any], Any]:
    changes = {"drop_rows_above": init.drop_rows_above, "new_rows": init.new_rows}
    return functools.partial(resize, vocab_size=model.vocab_size, **changes)


def open_initial(
    init: InitConfig, tokenizer: Tokenizer, model: DecoderConfig, origins: Origins
) -> ModelSource:
    """`config.init.checkpoint`, opened.

    Raises UserError: it is not there, made again, of another shape or tokenizer, or `config.init` does not allow its
    vocabulary.
    """
    source = _open("init.checkpoint", init.checkpoint, origins)
    _check_shape(source.model, model, init)
    if source.tokenizer_files:
        _check_tokenizer("init.checkpoint", init.checkpoint, source, tokenizer, init.drop_rows_above)
    jax.eval_shape(_resize_to(init, model), decoder.abstract_params(source.model))  # raises
    return source


def _check_tokenizer(key: str, path: str, source: ModelSource, current: Tokenizer, num_kept: int = 0) -> None:
    """UserError: an id whose row is kept is another token in `current`; the file formats may differ."""
    stored = Tokenizer.from_files(source.tokenizer_files)
    num_kept = num_kept or source.model.vocab_size
    for index in range(min(num_kept, stored.vocab_size, current.vocab_size)):
        if stored.token(index) != current.token(index):
            raise UserError(
                f"config.{key} {path} was trained with another tokenizer: id {index} is {stored.token(index)!r} there"
                f" and {current.token(index)!r} in config.tokenizer.path: take the same, or where parameters come from"
                " it, forget rows with config.init.drop_rows_above"
            )


def _check_shape(source: DecoderConfig, expected: DecoderConfig, init: InitConfig) -> None:
    ignored = {"vocab_size", "initializer_range", "max_position_embeddings"}
    stored, config = source.to_dict(), expected.to_dict()
    for field, value in stored.items():
        is_rope = field.startswith("rope_")
        if field not in ignored and value != config[field] and not (is_rope and init.change_rope):
            raise UserError(
                f"config.init.checkpoint {init.checkpoint} has model.{field} {value}, the config {config[field]}:"
                f" they must be the same model{', or set config.init.change_rope' if is_rope else ''}"
            )
