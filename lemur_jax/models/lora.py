"""Low-rank adapters (LoRA, Hu et al. 2021; rsLoRA, Kalajdzievski 2023) of any projections of a decoder.

The adapter is a tree of its own, {"layers": {"attention": {"query": {"a": ..., "b": ...}}}}: all that is trained and
saved. The parameters of the model are frozen. `adapt` puts both together without a copy, `merge` adds an update.
"""

import fnmatch
import functools
import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lemur_jax.common.errors import UserError
from lemur_jax.models import decoder
from lemur_jax.models.config import AdapterConfig, DecoderConfig
from lemur_jax.models.decoder import Params
from lemur_jax.parallel.adapted import Adapted, num_inputs

# Weights that are read by products; the embedding is looked up.
PROJECTIONS = (
    *(f"layers/attention/{name}" for name in ("query", "key", "value", "out")),
    *(f"layers/mlp/{name}" for name in ("gate", "up", "down")),
    "head/kernel",
)


def targets(options: AdapterConfig, model: DecoderConfig) -> list[str]:
    """Paths of the adapted projections.

    Raises:
      UserError: a pattern that fits no projection of the model.
    """
    axes = flatten_dict(decoder.logical_axes(model), sep="/")
    paths = [path for path in PROJECTIONS if path in axes and "experts" not in axes[path]]
    for pattern in options.targets:
        if not fnmatch.filter(paths, pattern):
            raise UserError(
                f"config.adapter.targets: {pattern!r} fits no projection; there are {', '.join(paths)}"
            )
    return [path for path in paths if any(fnmatch.fnmatch(path, pattern) for pattern in options.targets)]


def _factors(
    options: AdapterConfig, model: DecoderConfig
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """(logical axes, shape) of each `a` and `b` by path."""
    axes, params = (
        flatten_dict(tree, sep="/") for tree in (decoder.logical_axes(model), decoder.abstract_params(model))
    )
    factors = {}
    for path in targets(options, model):
        names, sizes = axes[path], params[path].shape
        lead = int(names[0] == "layers")
        cut = lead + num_inputs(names[lead:])
        factors[f"{path}/a"] = (*names[:cut], "rank"), (*sizes[:cut], options.rank)
        factors[f"{path}/b"] = (
            (*names[:lead], "rank", *names[cut:]),
            (*sizes[:lead], options.rank, *sizes[cut:]),
        )
    return factors


def logical_axes(options: AdapterConfig, model: DecoderConfig) -> Params:
    """The tree of the adapter with a tuple of logical axis names at each leaf."""
    return unflatten_dict({path: axes for path, (axes, _) in _factors(options, model).items()}, sep="/")


def abstract_adapter(options: AdapterConfig, model: DecoderConfig, dtype: str) -> Params:
    """The tree of the adapter as ShapeDtypeStructs."""
    leaves = {
        path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for path, (_, shape) in _factors(options, model).items()
    }
    return unflatten_dict(leaves, sep="/")


def init_adapter(options: AdapterConfig, model: DecoderConfig, key: jax.Array, dtype: str) -> Params:
    """As PEFT does: `a` uniform within ±1/√(number of inputs), `b` zero."""
    flat = {}
    for index, (path, (axes, shape)) in enumerate(_factors(options, model).items()):
        bound = 1 / math.sqrt(math.prod(shape[axes[0] == "layers" : -1]))
        if path.endswith("/b"):
            flat[path] = jnp.zeros(shape, dtype)
        else:
            flat[path] = jax.random.uniform(jax.random.fold_in(key, index), shape, dtype, -bound, bound)
    return unflatten_dict(flat, sep="/")


def adapt(options: AdapterConfig, base: Params, adapter: Params, keys: jax.Array | None = None) -> Params:
    """The parameters with an `Adapted` in the place of each adapted weight; nothing is copied.

    Args:
      base: the frozen parameters.
      adapter: as from `abstract_adapter`.
      keys: [B], of the dropout of each row, others for each update; None: no dropout.
    """
    flat, factors = flatten_dict(base, sep="/"), flatten_dict(adapter, sep="/")
    for index, path in enumerate(sorted({factor.rpartition("/")[0] for factor in factors})):
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        own = None
        if keys is not None:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            if path.startswith("layers/"):  # [L, B], for the scan over layers
                own = jax.vmap(functools.partial(jax.random.split, num=len(a)), out_axes=1)(own)
            own = jax.random.key_data(own)
        flat[path] = Adapted(
            base=flat[path], a=a, b=b, keys=own, scale=options.scale, dropout=options.dropout
        )
    return unflatten_dict(flat, sep="/")


def merge(options: AdapterConfig, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A weight with its update added in float32, in the weight's dtype."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")

    stacked = a.ndim + b.ndim == weight.ndim + 3  # L is in both
    update = (jax.vmap(product) if stacked else product)(a, b)
    return (weight.astype(jnp.float32) + options.scale * update).astype(weight.dtype)
