"""A model that is ready to generate: parameters on a mesh, tokenizer, compiled functions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from lemur_jax.common.errors import UserError
from lemur_jax.convert.source import open_source
from lemur_jax.infer.programs import Programs, programs
from lemur_jax.infer.quantize import WEIGHTS, check_installed, quantize
from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute, Params
from lemur_jax.parallel.adapted import is_adapted
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.text.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A model on a mesh and its compiled programs.

    Attributes:
      model: the architecture.
      compute: dtype, attention and mesh.
      tokenizer: None where only ids are used.
      params: the parameter tree on the mesh, in the compute dtype or with int8 matrices.
      weights: "float" or "int8".
      programs: the compiled prefill and decode.
      step: of the checkpoint; None: not one of our checkpoints.
    """

    model: DecoderConfig
    compute: Compute
    tokenizer: Tokenizer | None
    params: Params
    weights: str
    programs: Programs
    step: int | None = None

    @property
    def mesh(self) -> Mesh:
        assert self.compute.mesh is not None  # `make_session` gives one
        return self.compute.mesh

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError if there is none."""
        return _required(self.tokenizer)


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            "this checkpoint holds no tokenizer: put tokenizer.model or tokenizer.json into the Hugging Face directory,"
            " and import it again"
        )
    return tokenizer


def load(
    checkpoint: epath.PathLike,
    mesh_sizes: Mapping[str, int],
    dtype: str,
    step: int | None = None,
    *,
    weights: str = "float",
    devices: Sequence[jax.Device] | None = None,
    check: Callable[[Tokenizer], None] | None = None,
) -> Session:
    """Opens a checkpoint for generation; each device reads only its own shards.

    Args:
      checkpoint: checkpoint directory, a workdir that holds one, or a Hugging Face directory; local or gs://.
      mesh_sizes: sizes of the mesh axes, e.g. `config.mesh`; one may be -1.
      dtype: of parameters, activations and cache: "float32", "bfloat16" or "float16".
      step: which checkpoint; None: the newest.
      weights: "float", or "int8" for the matrices; then both are in memory while it loads.
      devices: default `jax.devices()`.
      check: may refuse the tokenizer, which then is required, before the weights are read.

    Raises:
      UserError: no checkpoint there, a damaged one, or a mesh that does not fit the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"cannot generate in dtype {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}: it must be one of {', '.join(WEIGHTS)}")
    if weights == "int8":
        check_installed()
    mesh = make_mesh(mesh_sizes, devices, option="--mesh")
    source = open_source(checkpoint, step)
    abstract = abstract_params(source.model, mesh, dtype)
    tokenizer = Tokenizer.from_files(source.tokenizer_files) if source.tokenizer_files else None
    if check:
        check(_required(tokenizer))
    params = source.restore(abstract)
    session = make_session(source.model, params, mesh, dtype, tokenizer=tokenizer, weights=weights)
    return dataclasses.replace(session, step=source.step)


def make_session(
    model: DecoderConfig,
    params: Params,
    mesh: Mesh,
    dtype: str,
    *,
    tokenizer: Tokenizer | None = None,
    weights: str = "float",
) -> Session:
    """A session from parameters in memory, e.g. those of a run in training.

    Args:
      params: arrays of any dtype, anywhere; moved and cast where needed. With an adapter (`lora.adapt`) they stay as
        they are, and are cast where they are read.

    Raises:
      UserError: the mesh does not fit the model.
    """
    abstract = abstract_params(model, mesh, dtype)
    if not is_adapted(params):  # nothing is copied where dtype and sharding are right already
        params = jax.tree.map(
            lambda x, target: jax.device_put(x.astype(target.dtype), target.sharding), params, abstract
        )
    if weights == "int8":
        params = quantize(model, mesh, params)
    compute = Compute(dtype=dtype, mesh=mesh)
    return Session(
        model=model,
        compute=compute,
        tokenizer=tokenizer,
        params=params,
        weights=weights,
        programs=programs(model, compute),
    )


def check_mesh(mesh: Mesh) -> None:
    """UserError: the mesh has an axis that generation cannot use."""
    if mesh.shape["sequence"] > 1:
        raise UserError(
            f"generation cannot shard the sequence: mesh axis sequence is {mesh.shape['sequence']}: set it to 1"
        )


def abstract_params(model: DecoderConfig, mesh: Mesh, dtype: str) -> Params:
    """The parameter tree as ShapeDtypeStructs with shardings; UserError if the mesh does not fit the model."""
    check_mesh(mesh)
    return decoder.abstract_params(model, dtype, mesh)
