"""Lower bounds on memory and time of an update, from shapes alone.

Axis legend: D model, H query heads, K key heads, N head width, F mlp, L layers.

They take a millisecond and a compilation minutes: a search uses them to drop what cannot fit or cannot win.
They count only what cannot be avoided: no padding, no workspace, every transfer hidden, every product at the peak.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from lemur_jax.config import RunConfig
from lemur_jax.models.config import AdapterConfig, ComputeConfig, DecoderConfig
from lemur_jax.models.decoder import param_sizes
from lemur_jax.models.remat import POLICIES
from lemur_jax.models.splash import check_heads
from lemur_jax.parallel.mesh import AXES, mesh_shape
from lemur_jax.parallel.rules import spec
from lemur_jax.plan.compile import device_bytes
from lemur_jax.plan.topologies import Slice
from lemur_jax.telemetry import flops
from lemur_jax.train.config import OptimizerConfig
from lemur_jax.train.optimizer import make_optimizer
from lemur_jax.train.state import TrainState, run_state, trained_axes
from lemur_jax.train.step import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Lower bounds of an update per device.

    Attributes:
      buffers: (bytes, description) that are alive at one time, largest first.
      compute: seconds of the products at the chip's peak, recomputation included.
      memory: seconds to read and write the state once at the HBM's bandwidth.
      network: seconds in which weights and activations cross all links of the chip.
      exchange: seconds in which activations cross one link in each direction, as over `tensor` or `sequence`.
      host: seconds in which offloaded activations go to the host and come back.
    """

    buffers: tuple[tuple[int, str], ...]
    compute: float
    memory: float
    network: float
    exchange: float
    host: float

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.buffers)

    @property
    def seconds(self) -> float:
        """The optimizer reads the state after the products; transfers may run beside both."""
        return max(self.compute + self.memory, self.network, self.host)

    @property
    def likely_seconds(self) -> float:
        """Seconds if transfers to the host alone were hidden behind products: not a bound, but a good order."""
        waiting = self.network + self.exchange + max(0.0, self.host - self.compute)
        return self.compute + self.memory + waiting


def lower_bound(config: RunConfig, tpu: Slice) -> Bound:
    """Bounds on the update of a config on a slice.

    Raises:
      UserError: the mesh does not divide the slice, the model or the batch.
    """
    mesh = AbstractMesh(mesh_shape(config.mesh, tpu.devices), AXES)
    check(config.train, config.data.sequence_length, config.model, mesh)
    model, compute, length = config.model, config.compute, config.data.sequence_length
    if mesh.shape["sequence"] > 1:
        check_heads(model.num_attention_heads, model.num_key_value_heads, mesh)
    options = compute.param_dtype, config.optimizer, config.train.steps
    state = _state(model, config.adapter, *options, mesh)
    parameters, moments, frozen = map(device_bytes, (state.params, state.optimizer, state.frozen))
    batch_tokens, microbatches = config.train.batch_rows * length, config.train.microbatches
    tokens = batch_tokens / tpu.devices * mesh.shape["tensor"]
    backward = [
        (int(tokens / microbatches * size), f"activations kept: {name}, all layers")
        for name, size in stored_bytes(model, compute, length, mesh, "keep")
    ]
    gradients = parameters
    if microbatches > 1:  # their sums are float32
        gradients = parameters * 4 // jnp.dtype(compute.param_dtype).itemsize
        backward.append((gradients, "gradients, summed so far"))
    # All gradients exist when the last one is done; with one microbatch there are activations in their place before.
    update = [(gradients, "gradients")]
    buffers = [(moments, "optimizer state"), (parameters, "parameters"), (frozen, "frozen parameters")]
    buffers += max(backward, update, key=lambda each: sum(size for size, _ in each))
    # Each parameter, moment and gradient is read; parameter and moment are written. Frozen ones are read in products.
    moved = 2 * (parameters + moments) + gradients
    chip = tpu.generation
    offloaded = sum(size for _, size in stored_bytes(model, compute, length, mesh, "host"))
    network, exchange = _transfers(model, compute, config.adapter, microbatches, mesh, tokens, tpu)
    update_flops = batch_tokens * _flops_per_token(model, compute, length, config.adapter.rank > 0)
    speed = 2 if compute.product_dtype else 1  # of 8-bit products, over the peak of bfloat16
    return Bound(
        buffers=tuple(sorted((each for each in buffers if each[0]), reverse=True)),
        compute=update_flops / (tpu.devices * flops.chip(chip.device_kind).flops_per_device * speed),
        memory=moved / chip.bandwidth,
        network=network,
        exchange=exchange,
        host=2 * tokens * offloaded / chip.host,
    )


@functools.lru_cache(maxsize=256)
def _state(
    model: DecoderConfig,
    adapter: AdapterConfig,
    dtype: str,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Any,
) -> TrainState:
    """The abstract train state on the mesh."""
    tx = make_optimizer(optimizer, steps, trained_axes(model, adapter))
    return run_state(model, adapter, dtype, tx, mesh)


@functools.cache
def remat_decision(policy: str, name: str) -> str:
    """What a policy of models/remat.py does with a named value: "keep", "host" or "recompute"."""
    rule = POLICIES[policy]
    if rule is None or (policy == "dots" and name != "attention_out"):  # "dots" knows products, not names
        return "keep"
    # The primitive that carries a name, as the policies see it.
    eqn = jax.make_jaxpr(lambda x: checkpoint_name(x, name))(0.0).eqns[0]
    decision = rule(eqn.primitive, **eqn.params)
    if isinstance(decision, bool):
        return "keep" if decision else "recompute"
    kinds = {"Offloadable": "host", "SaveableType": "keep", "RecomputeType": "recompute"}
    return kinds[type(decision).__name__]


def stored_bytes(
    model: DecoderConfig, compute: ComputeConfig, length: int, mesh: Any, where: str
) -> list[tuple[str, float]]:
    """(name, bytes per token of all layers) that the forward pass leaves for the backward pass on one device.

    A layer's input is always stored. The policies "dots" and "none" also keep what has no name: "dots" every
    projection's output, "none" also the parts of norms, in float32, and of the activation function. Of these the
    compiler keeps six of width D and four of width F a layer (tests/plan/test_analytic.py); counted are four and three.

    Args:
      length: tokens of a row.
      where: "keep" for HBM, or "host".
    """
    elements = {name: number for name, (number, _) in _named_values(model, compute, length).items()}
    itemsize = jnp.dtype(compute.dtype).itemsize
    if compute.remat == "none":
        norms = 4 * model.hidden_size * 4 // itemsize
        elements |= {"norms": norms, "activation function": 3 * model.active_mlp_width}
    decisions = {name: remat_decision(compute.remat, name) for name in elements}
    if decisions["layer_in"] == "recompute":
        decisions["layer_in"] = "keep"
    size = itemsize * model.num_hidden_layers
    shards = mesh.shape["tensor"]
    stream = shards if "tensor" in spec(mesh, ("residual_length",), (length,))[0] else 1
    return [
        (name, size * elements[name] / (stream if name in ("layer_in", "residual", "norms") else shards))
        for name, decision in decisions.items()
        if decision == where
    ]


def _flops_per_token(model: DecoderConfig, compute: ComputeConfig, T: int, adapted: bool) -> float:
    """FLOPs per token of an update: three passes, and what the policy recomputes; attention causal."""
    named = _named_values(model, compute, T).items()
    extra = sum(cost for name, (_, cost) in named if remat_decision(compute.remat, name) == "recompute")
    return flops.train_flops_per_token(model, T, adapted) + model.num_hidden_layers * extra


def _named_values(model: DecoderConfig, compute: ComputeConfig, T: int) -> dict[str, tuple[float, float]]:
    """What the policies of models/remat.py name: elements per token of a layer, and FLOPs to compute them."""
    D, F, share = model.hidden_size, model.active_mlp_width, compute.gate_share
    HN, KN = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    attention = flops.flops_per_token(model, T, backward=False).attention / model.num_hidden_layers
    return {
        "layer_in": (D, 0), "attention_out": (HN, attention), "query": (HN, 2 * D * HN),
        "key_value": (2 * KN, 4 * D * KN), "residual": (D, 2 * D * HN), "up": (F, 2 * D * F),
        "gate_part": (share * F, share * 2 * D * F), "gate": ((1 - share) * F, (1 - share) * 2 * D * F),
    }  # fmt: skip


def _transfers(
    model: DecoderConfig,
    compute: ComputeConfig,
    adapter: AdapterConfig,
    microbatches: int,
    mesh: Any,
    tokens: float,
    tpu: Slice,
) -> tuple[float, float]:
    """Seconds of everything that moves, over all links at once, and seconds of the activations alone over one link.

    Gathered weights, summed activations, and positions exchanged for heads are counted.

    `tokens`: of a device.
    """
    data, fsdp, expert, sequence, tensor = (mesh.shape[axis] for axis in AXES)
    size = jnp.dtype(compute.dtype).itemsize
    narrow = compute.product_dtype or (adapter.rank and adapter.base_dtype == "int8")
    gathered = reduced = shards = 0.0
    for path, count in param_sizes(model).items():
        # Weights of experts are gathered over fsdp alone.
        routed = model.num_experts and "/mlp/" in path
        shard = count / tensor / expert / fsdp
        others = shard * (fsdp * (1 if routed else expert) - 1)
        # In both passes of a microbatch; the embedding is read forward alone, the head in one loop over chunks.
        gathered += microbatches * others * (2 if path.startswith("layers/") else 1)
        reduced += others
        shards += shard
    # Two sums of the layer's width forward and two backward, each a reduce-scatter and a gather.
    layers = model.num_hidden_layers
    activations = 8 * layers * tokens * model.hidden_size * size * (tensor - 1) / tensor
    # Positions are exchanged for heads before the attention and back after it, in both passes (models/splash.py).
    # Fewer key heads than devices are repeated first.
    key_heads = max(model.num_key_value_heads / tensor, sequence) if sequence > 1 else 0
    exchanged = 2 * (model.num_attention_heads / tensor + key_heads) * model.head_dim
    activations += 2 * layers * tokens * exchanged * size * (sequence - 1) / sequence
    axes = [2 if wrap else 1 for wrap, length in zip(tpu.wrap, tpu.shape, strict=True) if length > 1]
    all_links = max(1, sum(axes)) * tpu.generation.link
    moved = gathered * (1 if narrow else size)
    if not adapter.rank:  # gradients are reduced once at least, over `fsdp` and over `data`
        moved += size * (reduced + 2 * shards * (data - 1) / data)
    return (moved + activations) / all_links, activations / tpu.generation.link
