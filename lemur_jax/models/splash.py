"""Causal attention on TPU: JAX's Pallas splash kernels under `shard_map`.

Axes: B batch, T query position, S key position, H query heads, K key heads, N head width.

The kernels skip the blocks above the diagonal, read each key head once for all its query heads, and mask by segment
inside a block. Scores and softmax are float32. Queries enter already divided by √N.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.extend.core import Jaxpr, Literal
from jax.extend.core.primitives import convert_element_type_p, jit_p, reduce_sum_p
from jax.sharding import Mesh, PartitionSpec

from lemur_jax.common.errors import UserError
from lemur_jax.models.scores import PLAIN, ScoreOptions
from lemur_jax.parallel.rules import RULES

# Lanes of a TPU register: block sizes must be multiples of it.
LANES = 128
# The fused backward kernel writes one part of dq for each block of keys, each as large as dq. Beyond this number of
# parts, dq has its own kernel: at T 131,072, blocks of 1024 give 128 parts.
MAX_DQ_PARTS = 32
# Name under which the output and its log-sum-exp can be kept by a policy in models/remat.py. Both are
# needed: with one of them missing the whole forward kernel runs again in the backward pass.
RESIDUALS = "attention_out"


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    mesh: Mesh | None,
    options: ScoreOptions = PLAIN,
    blocks: tuple[int, int] = (0, 0),
) -> jax.Array:
    """Causal attention inside segments by the splash kernels.

    With a `sequence` axis above 1, each device trades its slice of positions for a slice of heads before the kernel
    and back after it (Jacobs et al. 2023, "DeepSpeed Ulysses"), so that the causal triangle costs every device the
    same; key heads fewer than devices are repeated for the trade. Off TPU the kernels run in the interpreter.

    Args:
      query: [B, T, H, N]; key, value: [B, T, K, N]; all rotated.
      segment_ids: int32 [B, T]; documents packed in a row do not see each other.
      mesh: the device mesh; None: one device.
      options: scale, cap and window.
      blocks: as in `block_sizes`.

    Returns:
      [B, T, H, N] in query's dtype.

    Raises:
      UserError: T is not a multiple of 128, `blocks` do not divide it, or the heads cannot be cut over `sequence`.
    """
    T = query.shape[1]
    if T % LANES:
        raise UserError(
            f"config.data.sequence_length {T} is not a multiple of {LANES}, which the splash kernels need:"
            ' change it or set config.compute.attention to "xla"'
        )
    query = (query.astype(jnp.float32) * options.scale(query.shape[-1])).astype(query.dtype)
    kind = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).device_kind
    sizes = block_sizes(T, query.shape[-1], kind, blocks)
    kernel = functools.partial(_kernel, sizes=sizes, interpret="TPU" not in kind, options=options)
    local = functools.partial(_local, kernel)
    if mesh is None:
        return local(query, key, value, segment_ids, ways=1)
    ways = mesh.shape["sequence"]
    check_heads(query.shape[2], key.shape[2], mesh)
    heads = PartitionSpec(RULES["batch"], RULES["length"], RULES["heads"], None)
    return jax.shard_map(
        functools.partial(local, ways=ways),
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(RULES["batch"], RULES["length"])),
        out_specs=heads,
        check_vma=False,
    )(query, key, value, segment_ids)


def check_heads(H: int, K: int, mesh: Any) -> None:
    """Raises UserError if heads cannot be traded for positions on a mesh, which may be abstract."""
    ways = mesh.shape["sequence"]
    H, K = H // mesh.shape["tensor"], K // mesh.shape["tensor"]
    if H % ways or max(K, ways) % min(K, ways):
        raise UserError(
            f"{H} query heads and {K} key heads a device cannot be cut over config.mesh.sequence {ways}: it must"
            " divide the query heads, and divide the key heads or be a multiple of them"
        )


def _local(make_kernel: Callable[[int, int], Any], query, key, value, segment_ids, *, ways: int) -> jax.Array:
    """The kernel, for a group size and T, on one device's shard: [B, T/ways, H, N] in and out."""
    if ways > 1:
        repeats = max(1, ways // key.shape[2])
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        # [B, T/ways, H, N] -> [B, T, H/ways, N]
        trade = functools.partial(
            jax.lax.all_to_all, axis_name="sequence", split_axis=2, concat_axis=1, tiled=True
        )
        query, key, value = map(trade, (query, key, value))
        segment_ids = jax.lax.all_gather(segment_ids, "sequence", axis=1, tiled=True)
    B, T, H, N = query.shape
    K = key.shape[2]
    query = query.swapaxes(1, 2).reshape(B, K, H // K, T, N)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    # The two cores of a v4 or v5p chip divide the mapped axes among them; inside the kernels they can
    # divide only an axis of the forward one.
    kernel = jax.vmap(jax.vmap(make_kernel(H // K, T), in_axes=(0, 0, 0, None)))
    out = kernel(query, key, value, kernels.SegmentIds(q=segment_ids, kv=segment_ids))
    out = out.reshape(B, H, T, N).swapaxes(1, 2)
    return jax.lax.all_to_all(out, "sequence", split_axis=1, concat_axis=2, tiled=True) if ways > 1 else out


def _kernel(heads: int, length: int, sizes: kernels.BlockSizes, interpret: bool, options: ScoreOptions):
    """The kernel for one row and the query heads of one key head."""
    square = (length, length)
    mask = (
        masks.LocalMask(square, (options.window - 1, 0), 0)
        if options.hides_keys(length)
        else masks.CausalMask(square)
    )
    kernel = kernels.make_splash_mqa(
        masks.MultiHeadMask([mask] * heads),
        attn_logits_soft_cap=options.softcap or None,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    return _with_added_parts(kernel) if sizes.use_fused_bwd_kernel else kernel


def _with_added_parts(kernel: Callable) -> Callable:
    """The same kernel with another backward pass, which adds the parts of dq one by one.

    The library sums them by a reduction, which XLA:TPU does not fuse. The compiler estimates it at 2.5 times the
    additions on v4 and 9 times on tpu7x, where it was 5% of a step of Llama-3.1-70B.
    """

    @jax.custom_vjp
    def attend(query, key, value, segments):
        return kernel(query, key, value, segments)

    def forward(query, key, value, segments):
        return jax.vjp(lambda *qkv: kernel(*qkv, segments), query, key, value)

    def backward(pullback, upstream):
        closed = jax.make_jaxpr(pullback)(upstream)
        return *_evaluate(closed.jaxpr, closed.consts, [upstream]), None

    attend.defvjp(forward, backward)
    return attend


def _evaluate(jaxpr: Jaxpr, consts: list[Any], args: list[Any]) -> list[Any]:
    """Runs a program, and computes its sums over a leading axis as additions of slices."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    converted: dict[Any, Any] = {}  # arrays before their dtype changed: slices are converted one by one

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive is jit_p:
            inner = eqn.params["jaxpr"]
            results = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif eqn.primitive is reduce_sum_p and eqn.params["axes"] == (0,):
            parts = converted.get(eqn.invars[0], inputs[0])
            total = functools.reduce(operator.add, [part.astype(inputs[0].dtype) for part in parts])
            # With one query head per key head XLA would copy the parts into the layout of their sum's consumer: 1.2 of
            # 68.8 s of Llama-2-7B on v4-32. With more it would not, and fuses the sum with what reads it.
            results = [jax.lax.optimization_barrier(total) if total.shape[0] == 1 else total]
        else:
            # Kernels keep their names, by which plan/kernels.py and profiles know them.
            with jax.named_scope(eqn.params.get("name") or eqn.primitive.name):
                outputs: Any = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            results = outputs if eqn.primitive.multiple_results else [outputs]
        if eqn.primitive is convert_element_type_p:
            converted[eqn.outvars[0]] = inputs[0]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def block_sizes(length: int, width: int, kind: str, blocks: tuple[int, int] = (0, 0)) -> kernels.BlockSizes:
    """Block sizes of the kernels: the best in static schedules for v4 and v5e at T 4096, cut to what divides T.

    The fused backward kernel computes the scores once for dq, dk and dv, and leaves one dq a block of keys to be
    summed, so its blocks are large. On v5e that sum takes longer than computing the scores twice, and at T 131,072
    the parts of dq are 4 GiB a head: on v5e, and above `MAX_DQ_PARTS`, dq has a kernel of its own.

    Args:
      length: T.
      width: N; blocks of heads wider than 128 are smaller, or they do not fit the VMEM of a v4.
      kind: `jax.Device.device_kind`, e.g. "TPU v5 lite".
      blocks: positions of a block in the forward and in the backward kernels; 0: those above.

    Raises:
      UserError: one of `blocks` is not a multiple of 128 that divides T.
    """
    for block in blocks:
        if block < 0 or block % LANES or (block and length % block):
            raise UserError(
                f"config.compute.attention_blocks {blocks}: {block} is not a multiple of {LANES} that divides the"
                f" {length} positions of a row; 0 takes what suits the TPU"
            )
    forward = blocks[0] or math.gcd(length, 512)
    backward = blocks[1] or math.gcd(length, 1024 if width <= 128 else 512)
    fused = kind != "TPU v5 lite" and length // backward <= MAX_DQ_PARTS
    return kernels.BlockSizes(
        block_q=forward,
        block_kv=forward,
        block_kv_compute=forward,
        block_q_dkv=backward,
        block_kv_dkv=backward,
        block_kv_dkv_compute=math.gcd(backward, 512),
        block_q_dq=None if fused else backward,
        block_kv_dq=None if fused else backward,
        use_fused_bwd_kernel=fused,
    )
