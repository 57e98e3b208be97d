"""What training changes: the step, the parameters and the optimizer's state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.common.errors import UserError
from lemur_jax.infer.quantize import quantize
from lemur_jax.models import decoder, lora
from lemur_jax.models.config import AdapterConfig, DecoderConfig
from lemur_jax.parallel.rules import replicated, with_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint must hold, and what is made again at each start; the position in the data is `step` alone."""

    step: Any  # int32 [], updates done
    params: Any  # nested dict of what is trained: master parameters, or the adapter
    optimizer: Any  # the optax state
    frozen: Any = None  # parameters without gradient, never saved: what an adapter adapts, or a reference


def trained_axes(model: DecoderConfig, adapter: AdapterConfig) -> Any:
    """Logical axes of what is trained: the adapter, or all parameters."""
    return lora.logical_axes(adapter, model) if adapter.rank else decoder.logical_axes(model)


def run_state(
    model: DecoderConfig,
    adapter: AdapterConfig,
    dtype: str,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    frozen: Any = None,
) -> TrainState:
    """The state of a run as ShapeDtypeStructs that carry their shardings.

    `dtype` is that of the parameters that are trained. `frozen` is abstract: what is not trained, if there is no
    adapter. UserError: a leaf of the optimizer has no rule.
    """
    if adapter.rank:
        int8 = adapter.base_dtype == "int8"
        frozen = decoder.abstract_params(model, "bfloat16" if int8 else adapter.base_dtype, mesh)
        frozen = quantize(model, mesh, frozen) if int8 else frozen
        abstract, axes = lora.abstract_adapter(adapter, model, dtype), lora.logical_axes(adapter, model)
        params = with_shardings(mesh, abstract, axes)
    else:
        params = decoder.abstract_params(model, dtype, mesh)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        params=params,
        optimizer=_shard_like(params, jax.eval_shape(optimizer.init, params), mesh),
        frozen=frozen,
    )


# Largest size of leaves that belong to no parameter: counters, rates, coefficients, remembered norms.
_SMALL = 4096


def _shard_like(params: Any, optimizer_state: Any, mesh: Mesh) -> Any:
    """Shards moments like their parameter, and sums over one of its axes like the remaining axes.

    A leaf belongs to the parameter whose path its own path ends with. Other small leaves are replicated.
    """
    parameters = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def with_sharding(path, leaf):
        for length in range(len(path)):
            parameter = parameters.get(path[length:])
            spec = parameter and _spec_like(parameter, leaf.shape)
            if spec is not None:
                return leaf.update(sharding=NamedSharding(mesh, spec))
        if leaf.size <= _SMALL:
            return leaf.update(sharding=replicated(mesh))
        raise UserError(
            f"optimizer leaf {jax.tree_util.keystr(path)} of shape {leaf.shape} has no sharding rule"
        )

    return jax.tree_util.tree_map_with_path(with_sharding, optimizer_state)


def _spec_like(parameter: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> PartitionSpec | None:
    """The spec of an array of the parameter's shape, whole or without one axis; None for other shapes."""
    spec = tuple(parameter.sharding.spec)
    if shape == parameter.shape:
        return PartitionSpec(*spec)
    for axis in range(len(parameter.shape)):
        if shape == parameter.shape[:axis] + parameter.shape[axis + 1 :]:
            return PartitionSpec(*spec[:axis], *spec[axis + 1 :])
    return None


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def start(
    params: Any,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    step: int = 0,
    frozen: Any = None,
) -> TrainState:
    """The state of a new optimizer, of `make_optimizer`, after `step` updates of another one, if any.

    Moments and their bias correction begin at 0, the learning rate where its schedule is at `step`. `params` are
    already sharded.
    """

    def init(params: Any) -> Any:
        state = optimizer.init(params)
        counts = jax.tree.map(lambda count: jnp.full_like(count, step), state.hyperparams_states)
        return state._replace(count=jnp.full_like(state.count, step), hyperparams_states=counts)

    fresh = jax.jit(init, out_shardings=shardings_of(abstract.optimizer))(params)
    done = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(step=done, params=params, optimizer=fresh, frozen=frozen)
