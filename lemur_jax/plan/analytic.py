"""Lower bounds on memory and time of an update, from shapes alone: what no compiler can undercut.

Axis legend: D model, H query heads, K key heads, N head width, F mlp, L layers.

They cost a millisecond where a compile costs minutes, so a search drops with them what cannot fit or cannot win.
Only what must be is counted: no padding, no workspace, every transfer hidden, every product at the peak.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from lemur_jax.config import RunConfig
from lemur_jax.models import llama
from lemur_jax.models.config import LlamaConfig
from lemur_jax.models.remat import POLICIES
from lemur_jax.models.splash import check_heads
from lemur_jax.parallel.mesh import AXES, mesh_shape
from lemur_jax.parallel.rules import spec
from lemur_jax.plan.compile import device_bytes
from lemur_jax.plan.cost import CHIPS
from lemur_jax.plan.topologies import Slice
from lemur_jax.telemetry import flops
from lemur_jax.train.config import OptimizerConfig
from lemur_jax.train.optimizer import make_optimizer
from lemur_jax.train.state import abstract_state
from lemur_jax.train.step import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """What an update needs at least, a device.

    Attributes:
      buffers: (bytes, what) that are alive at one time, largest first.
      compute: seconds of the products at the chip's peak, recomputation included.
      memory: seconds to read and write the state once at the HBM's bandwidth.
      network: seconds in which the weights and activations cross the links that the chip has.
      host: seconds in which what is offloaded goes to the host and comes back.
    """

    buffers: tuple[tuple[int, str], ...]
    compute: float
    memory: float
    network: float
    host: float

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.buffers)

    @property
    def seconds(self) -> float:
        """The optimizer reads the state when the products are done; transfers may run beside all of it."""
        return max(self.compute + self.memory, self.network, self.host)

    @property
    def serial(self) -> float:
        """Seconds if no transfer were hidden: no bound, but a fair order in which to try."""
        return self.compute + self.memory + self.network + self.host


def bound(config: RunConfig, tpu: Slice) -> Bound:
    """Bounds on the update of a config on a slice.

    Raises:
      UserError: the mesh does not divide the slice, the model or the batch.
    """
    devices = tpu.devices_per_slice * tpu.slices
    mesh = _mesh(config, tpu)
    check(config.train, config.data.sequence_length, config.model, mesh)
    model = config.model
    if mesh.shape["sequence"] > 1:
        check_heads(model.num_attention_heads, model.num_key_value_heads, mesh)
    parameters, moments = _state_bytes(
        model, config.compute.param_dtype, config.optimizer, config.train.steps, mesh
    )
    tokens = config.train.batch_rows * config.data.sequence_length / devices * mesh.shape["tensor"]
    chip = CHIPS[tpu.generation.name]
    # When the last gradient is done, all are there. Before, with one pass, it is activations instead.
    kept = [
        (
            int(tokens / config.train.microbatches * size),
            f"activations kept: {name}, {model.num_hidden_layers} layers",
        )
        for name, size in stored_bytes(config, mesh, "keep")
    ]
    backward = kept if config.train.microbatches == 1 else [*kept, (parameters, "gradients, summed so far")]
    update = [(parameters, "gradients")]
    buffers = [(moments, "optimizer state"), (parameters, "parameters")]
    buffers += max(backward, update, key=lambda each: sum(size for size, _ in each))
    # Each parameter, moment and gradient is read; parameter and moment are written.
    moved = 2 * (parameters + moments) + parameters
    return Bound(
        buffers=tuple(sorted((each for each in buffers if each[0]), reverse=True)),
        compute=_flops(config, model) / (devices * _peak(tpu)),
        memory=moved / chip.bandwidth,
        network=_network(config, model, mesh, tokens, tpu),
        host=2 * tokens * sum(size for _, size in stored_bytes(config, mesh, "host")) / chip.host,
    )


def _mesh(config: RunConfig, tpu: Slice) -> Any:
    """A mesh without devices, for those who read nothing but its axes."""
    return AbstractMesh(mesh_shape(config.mesh, tpu.devices_per_slice * tpu.slices), AXES)


@functools.lru_cache(maxsize=256)
def _state_bytes(
    model: LlamaConfig, dtype: str, optimizer: OptimizerConfig, steps: int, mesh: Any
) -> tuple[int, int]:
    """Bytes a device of parameters and of optimizer state."""
    made = make_optimizer(optimizer, steps, llama.logical_axes(model))
    state = abstract_state(model, dtype, made, mesh)
    return device_bytes(state.params), device_bytes(state.optimizer)


def _peak(tpu: Slice) -> float:
    """Peak bfloat16 FLOP/s of a device."""
    known = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5", "v6e": "TPU v6e", "tpu7x": "TPU7x"}
    chip = flops.chip(known[tpu.generation.name])
    assert chip is not None
    return chip.bf16_flops / tpu.generation.devices_per_chip


def sizes(model: LlamaConfig) -> dict[str, int]:
    """Elements a token of what a layer can keep, by the names in models/remat.py."""
    D, F = model.hidden_size, model.intermediate_size
    HN, KN = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    return {
        "layer_in": D, "attention_out": HN, "query": HN, "key_value": 2 * KN, "residual": D,
        "gate": F, "up": F,
    }  # fmt: skip


@functools.cache
def decision(policy: str, name: str) -> str:
    """What a policy of models/remat.py does with a named value: "keep", "host" or "recompute"."""
    chosen = POLICIES[policy]
    if chosen is None:
        return "keep"
    # The primitive that carries a name, as the policies see it.
    named = jax.make_jaxpr(lambda x: checkpoint_name(x, name))(0.0).eqns[0]
    answer = chosen(named.primitive, **named.params)
    if isinstance(answer, bool):
        return "keep" if answer else "recompute"
    kinds = {"Offloadable": "host", "SaveableType": "keep", "RecomputeType": "recompute"}
    return kinds[type(answer).__name__]


def stored_bytes(config: RunConfig, mesh: Any, where: str) -> list[tuple[str, float]]:
    """(name, bytes a token of all layers) that the forward pass leaves for the backward one, on one device.

    A layer's input is always stored. The policies "dots" and "none" keep what has no name as well: every projection's
    output, and "none" more.

    Args:
      where: "keep" for HBM, or "host".
    """
    model = config.model
    policy, elements = config.compute.remat, sizes(model)
    places = {name: decision(policy, name) for name in elements}
    if policy in ("dots", "none"):
        places = dict.fromkeys(elements, "keep") | {"attention_out": "recompute"}
    if places["layer_in"] == "recompute":
        places["layer_in"] = "keep"
    size = jnp.dtype(config.compute.dtype).itemsize * model.num_hidden_layers
    cut = mesh.shape["tensor"]
    stream = cut if "tensor" in spec(mesh, ("residual_length",), (config.data.sequence_length,))[0] else 1
    return [
        (name, size * elements[name] / (stream if name in ("layer_in", "residual") else cut))
        for name, place in places.items()
        if place == where
    ]


def _flops(config: RunConfig, model: LlamaConfig) -> float:
    """FLOPs of an update: three passes, and what the policy computes again; attention causal."""
    T = config.data.sequence_length
    forward = flops.flops_per_token(model, T, backward=False)
    D, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    HN, KN = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    again = {
        "attention_out": forward.attention / L, "query": 2 * D * HN, "key_value": 4 * D * KN,
        "residual": 2 * D * HN, "gate": 2 * D * F, "up": 2 * D * F,
    }  # fmt: skip
    policy = config.compute.remat
    repeated = 0.0
    if policy == "dots":
        repeated = again["attention_out"]
    elif policy != "none":
        repeated = sum(cost for name, cost in again.items() if decision(policy, name) == "recompute")
    per_token = flops.flops_per_token(model, T).total + L * repeated
    return config.train.batch_rows * T * per_token


def _network(config: RunConfig, model: LlamaConfig, mesh: Any, tokens: float, tpu: Slice) -> float:
    """Seconds over all links at once: weights gathered twice a pass, activations summed, positions traded for heads."""
    size = jnp.dtype(config.compute.dtype).itemsize
    fsdp, tensor, sequence = mesh.shape["fsdp"], mesh.shape["tensor"], mesh.shape["sequence"]
    weights = flops.parameter_counts(model).total * size / tensor
    moved = 2 * config.train.microbatches * weights * (fsdp - 1) / fsdp
    # Two sums of the layer's width forward and two backward; each is reduced by a reduce-scatter and gathered again.
    moved += 8 * model.num_hidden_layers * tokens * model.hidden_size * size * (tensor - 1) / tensor
    # Positions are traded for heads before the attention and back after it, in both passes (models/splash.py); where
    # there are fewer key heads than devices, they are repeated for that.
    key_heads = max(model.num_key_value_heads / tensor, sequence) if sequence > 1 else 0
    traded = 2 * (model.num_attention_heads / tensor + key_heads) * model.head_dim
    moved += 2 * model.num_hidden_layers * tokens * traded * size * (sequence - 1) / sequence
    axes = [2 if wrap else 1 for wrap, length in zip(tpu.wrap, tpu.shape, strict=True) if length > 1]
    return moved / (max(1, sum(axes)) * CHIPS[tpu.generation.name].link)


def largest(config: RunConfig, tpu: Slice) -> list[tuple[int, str]]:
    """The largest arrays of the state and of what the layers keep, (bytes a device, what), largest first."""
    mesh = _mesh(config, tpu)
    model = config.model
    optimizer = make_optimizer(config.optimizer, config.train.steps, llama.logical_axes(model))
    state = abstract_state(model, config.compute.param_dtype, optimizer, mesh)
    leaves = [
        (device_bytes(leaf), f"{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))} {_name(path)}")
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    activations = [each for each in bound(config, tpu).buffers if each[1].startswith("activations")]
    return sorted(leaves + activations, reverse=True)[:10]


def _name(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
