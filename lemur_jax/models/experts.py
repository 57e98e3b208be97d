"""Mixtures of experts without dropped tokens: routing, grouped products, and the exchange of tokens between devices.

Axes: B batch, T position, D model, E experts, K experts of a token, F mlp, R rows (a token for each of its experts), W
devices of the mesh axis `expert`.

Each device sorts its rows by expert, sends each to the device that holds the expert, and computes gate, up and down
as products with groups of rows (`jax.lax.ragged_dot`, a kernel on TPU). Devices along `expert` have different tokens
and different experts; `fsdp` and `tensor` cut the experts' weights as they cut those of a dense mlp.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.weights import ACTIVATIONS, fresh_weight
from lemur_jax.parallel.mesh import platform
from lemur_jax.parallel.projection import Projection, einsum, gather_weight, is_quantized
from lemur_jax.parallel.rules import spec

GATE_AXES = ("experts", "expert_embed", "mlp")  # and of up
DOWN_AXES = ("experts", "mlp", "expert_embed")
Router = dict[str, jax.Array]  # float32 []: losses and statistics of one router, by name


class Experts(nnx.Module):
    """A mixture of gated mlps (Shazeer et al. 2017); no token is dropped."""

    def __init__(self, config: DecoderConfig, project: Projection, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
        self.project = project
        self.activation = ACTIVATIONS[config.activation]
        self.choose = functools.partial(
            choose, count=config.experts_per_token, normalized=config.normalize_expert_weights
        )
        self.router = fresh_weight(config, rngs, (D, E), "embed", "width")
        self.gate = fresh_weight(config, rngs, (E, D, F), *GATE_AXES)
        self.up = fresh_weight(config, rngs, (E, D, F), *GATE_AXES)
        self.down = fresh_weight(config, rngs, (E, F, D), *DOWN_AXES)

    def __call__(self, x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, Router]:
        """[B, T, D], valid tokens bool [B, T] or None -> ([B, T, D], losses and statistics of the router)."""
        x, mesh = self.project.gather(x), self.project.mesh
        logits = self.project.route(x, self.router)
        weights, chosen = self.choose(logits)
        matrices = tuple(map(self._matrix, (self.gate, self.up, self.down)))
        out = mixture(x, weights, chosen, matrices, self.activation, mesh)
        return out, router_statistics(logits, chosen, valid)

    def _matrix(self, weight: nnx.Param) -> jax.Array:
        value = weight.get_value()
        if is_quantized(value):
            return gather_weight(value, weight.axes, self.project.mesh, self.project.dtype)
        return value


def choose(logits: jax.Array, count: int, normalized: bool) -> tuple[jax.Array, jax.Array]:
    """(weights float32, experts int32), both [B, T, count], of the largest probabilities.

    Args:
      logits: float32 [B, T, E].
      count: experts of a token.
      normalized: whether the weights are divided by their sum.
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) if normalized else weights, chosen


def router_statistics(logits: jax.Array, chosen: jax.Array, valid: jax.Array | None) -> Router:
    """Losses and statistics of a router over the valid tokens.

    `balance` is E Σ f P (Fedus et al. 2022, eq. 4) with f the share of tokens that an expert gets, which sums to K, and
    P its mean probability: K where all are equal. `z` is the mean of log²Z (Zoph et al. 2022, eq. 5). `max_load` is
    the busiest expert's share of rows times E: 1 where all are equal.

    Args:
      logits: float32 [B, T, E].
      chosen: int32 [B, T, K].
      valid: bool [B, T]; None: all are.
    """
    E, K = logits.shape[-1], chosen.shape[-1]
    valid = jnp.ones(chosen.shape[:2]) if valid is None else valid
    share = valid / jnp.maximum(jnp.sum(valid), 1)
    hit = jnp.sum(chosen[..., None] == jnp.arange(E), axis=-2)
    load = jnp.einsum("BT,BTE->E", share, hit.astype(jnp.float32))
    probability = jnp.einsum("BT,BTE->E", share, jax.nn.softmax(logits, axis=-1))
    z = jnp.sum(share * jnp.square(jax.nn.logsumexp(logits, axis=-1)))
    return {"balance": E * jnp.sum(load * probability), "z": z, "max_load": jnp.max(load) * E / K}


def mixture(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    matrices: tuple[jax.Array, ...],
    activation: Callable,
    mesh: Mesh | None,
) -> jax.Array:
    """The weighted sum of the mlps of each token's experts.

    Args:
      x: [B, T, D].
      weights, chosen: [B, T, K], as from `choose`.
      matrices: gate and up [E, D, F], down [E, F, D], in any dtype; products are in that of `x`.
      activation: of the gate.
      mesh: the device mesh.

    Returns:
      [B, T, D].
    """
    weights = weights.astype(x.dtype)
    if mesh is None:
        return _LocalMoE(activation, len(matrices[0]), {})(x, weights, chosen, *matrices)
    tokens = spec(mesh, ("batch", "length", "width"), x.shape)
    out = spec(mesh, ("batch", "residual_length", "width"), x.shape)
    local = _LocalMoE(activation, len(matrices[0]), dict(mesh.shape), platform(mesh), scatter=out != tokens)
    specs = (
        spec(mesh, axes, matrix.shape)
        for axes, matrix in zip((GATE_AXES, GATE_AXES, DOWN_AXES), matrices, strict=True)
    )
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(tokens, tokens, tokens, *specs), out_specs=out, check_vma=False
    )
    return run(x, weights, chosen, *matrices)


@dataclasses.dataclass(frozen=True)
class _LocalMoE:
    """What one device computes: its tokens, with all experts; the arguments of `mixture`, cut by the mesh."""

    activation: Callable
    experts: int  # E, of all devices
    ways: dict[str, int]  # sizes of the mesh axes; empty without a mesh
    platform: str = ""
    scatter: bool = False  # whether positions of the result are cut over `tensor`

    def __call__(self, x, weights, chosen, gate, up, down):
        gate, up = self._gather(gate, x.dtype, axis=1), self._gather(up, x.dtype, axis=1)
        down = self._gather(down, x.dtype, axis=2)
        (b, t, D), K = x.shape, chosen.shape[-1]
        order, inverse = _sorted(chosen.reshape(-1))
        sizes = _counts(chosen.reshape(-1), self.experts)
        rows = _take(K, x.reshape(-1, D), order, inverse)
        rows = self._exchanged(rows, sizes, K, functools.partial(self._mlps, gate, up, down))
        rows = _take(1, rows, inverse, order).reshape(b, t, K, D)
        out = einsum("btKD,btK->btD", rows, weights)
        if self.scatter:
            return jax.lax.psum_scatter(out, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(out, "tensor") if self.ways.get("tensor", 1) > 1 else out

    def _gather(self, weight, dtype, axis: int):
        """The weight in `dtype`, gathered over `fsdp`; its gradient is reduced in `dtype` and scattered again."""
        weight = weight.astype(dtype)
        if self.ways.get("fsdp", 1) == 1:
            return weight
        return jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True)

    def _mlps(self, gate, up, down, rows, sizes):
        """[R, D], sorted by expert, through the experts of this device, which have int32 [E / W] rows each."""
        gate = checkpoint_name(_grouped(rows, gate, sizes), "gate")
        up = checkpoint_name(_grouped(rows, up, sizes), "up")
        return _grouped(self.activation(gate) * up, down, sizes)

    def _exchanged(self, rows, sizes, K: int, mlps: Callable):
        """`mlps` of rows [R, D] that are sorted by expert, on the devices that hold the experts."""
        W = self.ways.get("expert", 1)
        if W == 1:
            return mlps(rows, sizes)
        experts, R = self.experts // W, rows.shape[0]
        by_source = jax.lax.all_gather(sizes, "expert").reshape(W, W, experts)  # [source, target, expert]
        sent = jnp.sum(by_source, axis=-1)
        received = by_source[:, jax.lax.axis_index("expert")]
        # The most rows that can arrive, as no token chooses an expert twice.
        space = W * (R // K) * min(K, experts)
        arrived = self._all_to_all(rows, sent, space)
        # Rows arrive ordered by source; unused ones get the index after the last expert.
        ends = jnp.cumsum(received.reshape(-1))
        group = jnp.searchsorted(ends, jnp.arange(space), side="right")
        order, inverse = _sorted(jnp.where(group < W * experts, group % experts, experts))
        out = mlps(_take(1, arrived, order, inverse), jnp.sum(received, axis=0))
        return self._all_to_all(_take(1, out, inverse, order), sent.T, R)

    def _all_to_all(self, rows, sent, space: int):
        """[space, D]: the rows that all devices send here, by source; sent[s, t] go from s to t, in order of t."""
        device = jax.lax.axis_index("expert")
        start = jnp.cumsum(sent, axis=1) - sent  # of the rows for t, among those of s
        offset = jnp.cumsum(sent, axis=0) - sent  # of the rows from s, among those of t
        if self.platform != "cpu":
            out = jnp.zeros((space, rows.shape[1]), rows.dtype)
            return jax.lax.ragged_all_to_all(
                rows, out, start[device], sent[device], offset[device], sent[:, device], axis_name="expert"
            )
        # XLA:CPU has no ragged exchange: send the rows in blocks that hold all.
        size = min(rows.shape[0], space)
        block = start[device][:, None] + jnp.arange(size)
        blocks = jax.lax.all_to_all(jnp.take(rows, block, axis=0, mode="clip"), "expert", 0, 0)
        row = jnp.arange(space)
        source = jnp.searchsorted(jnp.cumsum(sent[:, device]), row, side="right")
        values = blocks.at[source, row - offset[source, device]].get(mode="clip")
        return jnp.where((source < len(sent))[:, None], values, 0)


def _grouped(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(rows, weight, sizes, precision=precision)


def _sorted(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stable order of int32 keys [R], and its inverse."""
    order = jnp.argsort(keys)
    return order, jnp.argsort(order)


def _counts(keys: jax.Array, size: int) -> jax.Array:
    """How many of int32 keys [R] are 0, 1, ...: int32 [size]."""
    return jnp.sum(keys[:, None] == jnp.arange(size), axis=0, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(copies: int, x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of [R / copies, D], each repeated `copies` times, in this order: [R, D].

    The gradient takes by the inverse order and sums copies; that of a gather would be a slow scatter.
    """
    return x[order // copies]


def _take_backward(copies: int, inverse: jax.Array, upstream: jax.Array):
    back = upstream[inverse]
    return back.reshape(-1, copies, back.shape[-1]).sum(axis=1), None, None


_take.defvjp(lambda copies, x, order, inverse: (x[order // copies], inverse), _take_backward)
