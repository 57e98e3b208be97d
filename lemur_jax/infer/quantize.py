"""Weights as 8-bit integers for inference, through Qwix: half the memory and traffic of bfloat16.

The matrices of the layers and an untied head become int8 with one scale for each output channel (and layer);
embedding and norms stay as they are. Each matrix is cast to `compute.dtype` where it is used; activations are not
rounded.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from lemur_jax.common.errors import UserError
from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Params
from lemur_jax.parallel.projection import scale_axes
from lemur_jax.parallel.rules import spec

WEIGHTS = ("float", "int8")

# The axes that a product with the matrix sums over.
_SUMMED = {
    **dict.fromkeys(("query", "key", "value", "gate", "up", "kernel"), ("embed", "expert_embed")),
    **{"out": ("heads", "head_dim"), "down": ("mlp",)},
}


def check_installed() -> None:
    """Raises UserError if Qwix is not installed."""
    try:
        import qwix  # noqa: F401
    except ImportError:
        raise UserError("int8 weights need qwix: pip install 'lemur_jax[int8]'") from None


def leaf_quantizer(config: DecoderConfig, mesh: Mesh) -> Callable[[str, Any], Any]:
    """A function of a parameter's path and array that returns a matrix as a `qwix.QArray`, and others unchanged.

    For an abstract array it returns an abstract one with shardings.
    """
    check_installed()
    import qwix

    all_axes = flatten_dict(decoder.logical_axes(config), sep="/")

    def quantize_leaf(path: str, leaf: Any) -> Any:
        axes, summed = all_axes[path], _SUMMED.get(path.rpartition("/")[2])
        if summed is None:
            return leaf
        channels = [index for index, axis in enumerate(axes) if axis not in summed]
        quantizer = functools.partial(qwix.quantize, qtype="int8", channelwise_axes=channels)
        abstract = jax.eval_shape(quantizer, leaf)
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, spec(mesh, scale_axes(axes, x.shape), x.shape)), abstract
        )
        sharded = jax.jit(quantizer, out_shardings=shardings)
        return jax.eval_shape(sharded, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else sharded(leaf)

    return quantize_leaf


def quantize(config: DecoderConfig, mesh: Mesh, params: Params) -> Params:
    """The parameters with int8 matrices (`qwix.QArray`), sharded as they were.

    Args:
      config: the model.
      mesh: where the parameters lie.
      params: arrays of a float dtype, which becomes that of the scales.

    Raises:
      UserError: Qwix is not installed.
    """
    quantize_leaf = leaf_quantizer(config, mesh)
    flat = {path: quantize_leaf(path, leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    return unflatten_dict(flat, sep="/")
