"""Causal self-attention over packed rows.

Axes: B batch, T query position, S key position, H query heads, K key heads, G queries a key head, N head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from lemur_jax.common.errors import UserError
from lemur_jax.models.scores import PLAIN, ScoreOptions
from lemur_jax.parallel.mesh import platform
from lemur_jax.parallel.rules import RULES, constrain

# Query positions of a block; a block reads only the keys up to its own end, which saves up to half of the causal
# square. Smaller blocks would save a little more and take longer to compile.
QUERY_BLOCK = 256
# Rows of more positions compute the softmax again in the backward pass.
REMAT_ABOVE = 1024


def grouped_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, options: ScoreOptions = PLAIN
) -> jax.Array:
    """Softmax attention with grouped keys and an explicit mask.

    Args:
      query: [B, T, H, N], already rotated.
      key, value: [B, S, K, N], keys already rotated; H must be a multiple of K.
      visible: bool, broadcastable to [B, 1, 1, T, S]: which keys a query sees.
      options: scale and cap; the window is not read.

    Returns:
      [B, T, H, N] in query's dtype. Scores and softmax are float32. A query that sees no key gets
      the mean of the values (its row carries no loss).
    """
    B, T, H, N = query.shape
    K = key.shape[2]
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    grouped = query.reshape(B, T, K, H // K, N) * jnp.asarray(options.scale(N), query.dtype)
    logits = jnp.einsum(
        "BTKGN,BSKN->BKGTS", grouped, key, precision=precision, preferred_element_type=jnp.float32
    )
    if options.softcap:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("BKGTS,BSKN->BTKGN", weights, value, precision=precision)
    return out.reshape(B, T, H, N)


def xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    mesh: Mesh | None,
    options: ScoreOptions = PLAIN,
) -> jax.Array:
    """Causal attention inside segments, in blocks of queries.

    With a `sequence` axis above 1 the queries stay sharded over it, and every device gathers the keys.

    Args:
      query: [B, T, H, N]; key, value: [B, T, K, N]; all rotated.
      segment_ids: int32 [B, T]; documents packed in a row do not see each other.

    Returns:
      [B, T, H, N].
    """
    T = query.shape[1]
    positions = jnp.arange(T)

    def attend(start: int, stop: int) -> jax.Array:
        key_start = max(0, start - options.window + 1) if options.hides_keys(T) else 0
        rows, columns = positions[start:stop], positions[key_start:stop]
        in_window = rows[:, None] >= columns[None, :]
        if options.hides_keys(T):
            in_window &= rows[:, None] - columns[None, :] < options.window
        same_segment = segment_ids[:, start:stop, None] == segment_ids[:, None, key_start:stop]
        visible = (in_window & same_segment)[:, None, None]
        return grouped_attention(
            query[:, start:stop], key[:, key_start:stop], value[:, key_start:stop], visible, options
        )

    if mesh is not None and mesh.shape["sequence"] > 1:
        key = constrain(key, mesh, "batch", "keys", "kv_heads", "head_dim")
        value = constrain(value, mesh, "batch", "keys", "kv_heads", "head_dim")
        return attend(0, T)
    if T <= QUERY_BLOCK:
        return attend(0, T)
    block = attend if T <= REMAT_ABOVE else jax.checkpoint(attend, static_argnums=(0, 1))
    out = jnp.concatenate(
        [block(start, min(start + QUERY_BLOCK, T)) for start in range(0, T, QUERY_BLOCK)], axis=1
    )
    return checkpoint_name(out, "attention_out")


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    mesh: Mesh | None,
    options: ScoreOptions = PLAIN,
) -> jax.Array:
    """Causal attention inside segments by cuDNN's fused kernels, on NVIDIA GPUs.

    Rows of one document each need only the causal mask, and the kernels skip its upper half. Which rows those are is
    known only when the step runs. Packed rows take a mask [B, 1, T, T], which the backward pass computes again.
    Arguments and result are those of `xla_attention`, in bfloat16 or float16.

    Raises:
      UserError: float32, capped scores, or a mesh with a `sequence` axis.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"cuDNN's attention needs bfloat16, not {query.dtype}: set config.compute.dtype or"
            ' config.compute.attention to "xla"'
        )
    if mesh is not None and mesh.shape["sequence"] > 1:
        raise UserError(
            'config.mesh.sequence above 1 is not possible with config.compute.attention "cudnn": set it to "xla"'
        )
    if options.softcap:
        raise UserError(
            'cuDNN cannot cap scores (model.attention_softcap): set config.compute.attention to "xla"'
        )
    fused = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        scale=options.scale(query.shape[-1]),
        local_window_size=(options.window - 1, 0) if options.hides_keys(query.shape[1]) else None,
        implementation="cudnn",
    )

    @jax.checkpoint
    def packed(query, key, value, segment_ids):
        return fused(query, key, value, mask=(segment_ids[:, None, :, None] == segment_ids[:, None, None, :]))

    def local(query, key, value, segment_ids):
        unpacked = jnp.all(segment_ids == segment_ids[:, :1])
        return jax.lax.cond(unpacked, lambda *x: fused(*x[:3]), packed, query, key, value, segment_ids)

    if mesh is not None:
        heads = PartitionSpec(RULES["batch"], None, RULES["heads"], None)
        rows = PartitionSpec(RULES["batch"], None)
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return checkpoint_name(local(query, key, value, segment_ids), "attention_out")


def _splash_attention(query, key, value, segment_ids, mesh, options=PLAIN, blocks=(0, 0)) -> jax.Array:
    # Pallas costs half a second to import, and only TPU runs need it.
    from lemur_jax.models.splash import splash_attention

    return splash_attention(query, key, value, segment_ids, mesh, options, blocks)


# name -> (query, key, value, segment ids, mesh, options) -> mixed values
IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla_attention,
    "splash": _splash_attention,
    "cudnn": cudnn_attention,
}


def attention(
    implementation: str,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    blocks: tuple[int, int] = (0, 0),
    capped: bool = False,
) -> Callable:
    """The attention function named in `config.compute.attention`.

    Args:
      implementation: "auto" takes what fits the mesh's devices: splash on TPU, cudnn on a GPU if the dtype and the
        mesh allow it, xla elsewhere.
      mesh: the device mesh; None: the default device.
      dtype: of queries, keys and values.
      blocks: for splash, as in `models.splash.block_sizes`.
      capped: whether scores are, which cuDNN cannot do.

    Raises:
      UserError: the mesh's devices have no such kernels.
    """
    if implementation == "auto":
        implementation = _best_implementation(mesh, dtype, capped)
    needed = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}.get(implementation)
    if mesh is not None and needed and platform(mesh) not in needed:
        raise UserError(
            f"config.compute.attention {implementation!r} needs a {needed[0].upper()}, not {platform(mesh)}: set it to"
            ' "auto"'
        )
    chosen = IMPLEMENTATIONS[implementation]
    return functools.partial(chosen, blocks=blocks) if implementation == "splash" else chosen


def _best_implementation(mesh: Mesh | None, dtype: str, capped: bool) -> str:
    if platform(mesh) == "tpu" and mesh is not None:
        return "splash"
    whole_rows = mesh is None or mesh.shape["sequence"] == 1
    if platform(mesh) in ("gpu", "cuda") and whole_rows and dtype != "float32" and not capped:
        return "cudnn"
    return "xla"
