"""A decoder as a Flax NNX module, its parameters as a plain nested dict.

Axes: B batch, T position, D model, H query heads, K key heads, N head width, F mlp, V vocabulary, L layers.

Outside the module (optimizer, checkpoint, conversion) the layers of the nested dict are stacked on a leading axis L.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lemur_jax.models.attention import attention
from lemur_jax.models.config import ComputeConfig, DecoderConfig
from lemur_jax.models.experts import Experts, Router
from lemur_jax.models.mlp import MLP
from lemur_jax.models.remat import rematerialize
from lemur_jax.models.rope import angles_by_layer, rotate
from lemur_jax.models.scores import ScoreOptions
from lemur_jax.models.weights import add_bias, fresh_bias, fresh_weight
from lemur_jax.parallel.projection import Projection
from lemur_jax.parallel.rules import with_shardings

Params = dict[str, Any]
# (query [B,T,H,N], key [B,T,K,N], value [B,T,K,N], cache, layer index) -> ([B,T,H,N], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(ComputeConfig):
    """`config.compute` on a mesh; by default in float32, with nothing recomputed."""

    dtype: str = "float32"
    remat: str = "none"
    loss_chunk: int = 0
    mesh: Mesh | None = None  # shards activations; None: no sharding
    frozen: bool = False  # weights have no gradient: adapters alone are trained

    @property
    def project(self) -> Projection:
        """The products with weights."""
        return Projection(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Projection)}
        )

    @classmethod
    def from_config(cls, options: ComputeConfig, mesh: Mesh | None) -> "Compute":
        """From `config.compute`."""
        return cls(mesh=mesh, **vars(options))


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, with statistics in float32 (Zhang & Sennrich 2019), over the dimensions of the scale."""

    def __init__(self, config: DecoderConfig, compute: Compute, shape: tuple[int, ...], *axes: str):
        self.project = compute.project
        self.epsilon = config.rms_norm_eps
        self.offset = config.norm_offset
        self.over = tuple(range(-len(shape), 0))
        self.scale = nnx.Param(jnp.full(shape, 1 - self.offset), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, ..., *scale] -> the same shape."""
        return self.project.pointwise(self._normalize, x)

    def _normalize(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=self.over, keepdims=True) + self.epsilon)
        scale = self.scale.get_value().astype(jnp.float32)
        return (wide * (scale + self.offset if self.offset else scale)).astype(x.dtype)


def identity(x: jax.Array) -> jax.Array:
    return x


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    return x if multiplier == 1 else x * jnp.asarray(multiplier, x.dtype)


def _qk_norm(config: DecoderConfig, compute: Compute, heads: int, axis: str) -> Callable:
    """The norm of queries or keys [B, T, heads, N]."""
    if config.qk_norm == "head":
        return RMSNorm(config, compute, (config.head_dim,), "norm")
    if config.qk_norm == "width":
        return RMSNorm(config, compute, (heads, config.head_dim), axis, "norm")
    return identity


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        D, N = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.project = compute.project
        self.query = fresh_weight(config, rngs, (D, H, N), "embed", "heads", "head_dim")
        self.key = fresh_weight(config, rngs, (D, K, N), "embed", "kv_heads", "head_dim")
        self.value = fresh_weight(config, rngs, (D, K, N), "embed", "kv_heads", "head_dim")
        self.out = fresh_weight(config, rngs, (H, N, D), "heads", "head_dim", "embed")
        biased = config.attention_bias != ""
        self.query_bias = fresh_bias((H, N), "heads", "norm") if biased else None
        self.key_bias = fresh_bias((K, N), "kv_heads", "norm") if biased else None
        self.value_bias = fresh_bias((K, N), "kv_heads", "norm") if biased else None
        self.out_bias = fresh_bias((D,), "norm") if config.attention_bias == "qkvo" else None
        self.query_norm = _qk_norm(config, compute, H, "heads")
        self.key_norm = _qk_norm(config, compute, K, "kv_heads")

    def __call__(self, x: jax.Array, angles, attend: Callable) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], the cache that `attend` returns)."""
        weights = (("BTD,DHN->BTHN", self.query), ("BTD,DKN->BTKN", self.key), ("BTD,DKN->BTKN", self.value))
        query, key, value = self.project.read(x, *weights)
        query = add_bias(query, self.query_bias)
        key = add_bias(key, self.key_bias)
        value = add_bias(value, self.value_bias)
        query, key = self.query_norm(query), self.key_norm(key)
        query, key = (rotate(array, angles, self.project.mesh) for array in (query, key))
        query = self.project.shard(query, "heads", "head_dim")
        key = self.project.shard(key, "kv_heads", "head_dim")
        value = self.project.shard(value, "kv_heads", "head_dim")
        query = checkpoint_name(query, "query")
        key, value = checkpoint_name(key, "key_value"), checkpoint_name(value, "key_value")
        mixed, cache = attend(query, key, value)
        return add_bias(self.project.write("BTHN,HND->BTD", mixed, self.out), self.out_bias), cache


class Block(nnx.Module):
    """One transformer layer, its norms before or after attention and mlp, or both."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config, compute, (config.hidden_size,), "norm")
        self.multiplier = config.residual_multiplier
        pre, post = config.norm_position != "post", config.norm_position != "pre"
        self.attention_norm = norm() if pre else identity
        self.attention = Attention(config, compute, rngs)
        self.attention_post_norm = norm() if post else identity
        self.mlp_norm = norm() if pre else identity
        self.mlp = (
            Experts(config, compute.project, rngs)
            if config.num_experts
            else MLP(config, compute.project, compute.gate_share, rngs)
        )
        self.mlp_post_norm = norm() if post else identity

    def __call__(
        self, x: jax.Array, angles, attend: Callable, valid: jax.Array | None
    ) -> tuple[jax.Array, Any, Router]:
        """[B, T, D] -> ([B, T, D], cache, losses and statistics of the router)."""
        mixed, cache = self.attention(self.attention_norm(x), angles, attend)
        h = checkpoint_name(x + scaled(self.attention_post_norm(mixed), self.multiplier), "residual")
        out, router = self.mlp(self.mlp_norm(h), valid)
        return h + scaled(self.mlp_post_norm(out), self.multiplier), cache, router


class Embedding(nnx.Module):
    """Token embedding [V, D]; also the head of a tied model."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        self.project = compute.project
        self.multiplier = config.embedding_multiplier
        self.embedding = fresh_weight(config, rngs, (config.vocab_size, config.hidden_size), "vocab", "embed")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return scaled(self.project.embed(tokens, self.embedding), self.multiplier)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        return self.project.logits("BTD,VD->BTV", hidden, self.embedding)


class Head(nnx.Module):
    """Output projection [D, V] of an untied model."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        self.project = compute.project
        self.kernel = fresh_weight(config, rngs, (config.hidden_size, config.vocab_size), "embed", "vocab")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        return self.project.logits("BTD,DV->BTV", hidden, self.kernel)


class Decoder(nnx.Module):
    """The decoder. `self.layers` is one `Block` whose parameters carry a leading axis L."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.embed = Embedding(config, compute, rngs)
        make_layers = nnx.vmap(lambda rngs: Block(config, compute, rngs), in_axes=0, out_axes=0)
        self.layers = make_layers(rngs.split(config.num_hidden_layers))
        self.final_norm = RMSNorm(config, compute, (config.hidden_size,), "norm")
        if not config.tie_word_embeddings:
            self.head = Head(config, compute, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Any = (),
        long: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Router]:
        """Tokens to final hidden states.

        Args:
          tokens, positions: int32 [B, T].
          attend: attention over (query, key, value, cache, layer index); see `packed` for training.
          cache: pytree carried through the layers, e.g. keys and values [L, ...]; () without one.
          long: as in `rope.rotary_angles`; needed with a cache, in which keys stay as they were rotated.
          valid: bool [B, T], tokens that the routers' statistics count; None: all.

        Returns:
          Hidden states [B, T, D] after the final norm, the cache, and the losses and statistics of the routers,
          float32 [L] each; none of a dense model.
        """
        x = self.embed(tokens)
        angles = angles_by_layer(self.config, positions, long)
        graph, stacked = nnx.split(self.layers)

        def layer(carry, params):
            x, cache, index = carry
            block = nnx.merge(graph, params)
            x = checkpoint_name(x, "layer_in")
            x, cache, router = block(x, angles(index), lambda q, k, v: attend(q, k, v, cache, index), valid)
            return (x, cache, index + 1), router

        layer = rematerialize(layer, self.compute.remat)
        (x, cache, _), routers = jax.lax.scan(layer, (x, cache, jnp.int32(0)), stacked)
        return self.compute.project.gather(self.final_norm(x)), cache, routers

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        logits = (self.embed if self.config.tie_word_embeddings else self.head).logits(hidden)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def packed(self, segment_ids: jax.Array) -> Attend:
        """Attention for training: causal inside each segment of int32 [B, T], no cache."""
        implementation = self_attention(self.config, self.compute)
        return lambda query, key, value, cache, layer: (
            implementation(query, key, value, segment_ids, layer),
            cache,
        )


def score_options(config: DecoderConfig, window: int = 0) -> ScoreOptions:
    """How the layers of this model score, with a window or without one."""
    return ScoreOptions(divisor=config.query_scale, softcap=config.attention_softcap, window=window)


def self_attention(config: DecoderConfig, compute: Compute) -> Callable:
    """Causal attention over whole rows: (query, key, value, segment ids, layer index) -> [B, T, H, N]."""
    implementation = attention(
        compute.attention,
        compute.mesh,
        compute.dtype,
        compute.attention_blocks,
        capped=config.attention_softcap > 0,
    )
    windows = (0, config.sliding_window)
    full, windowed = (
        functools.partial(implementation, mesh=compute.mesh, options=score_options(config, window))
        for window in windows
    )

    def attend(query, key, value, segment_ids, layer):
        arrays = query, key, value, segment_ids
        if not 0 < config.sliding_window < query.shape[1]:
            return full(*arrays)
        if not config.full_attention_every:
            return windowed(*arrays)
        return jax.lax.cond(config.attends_fully(layer), full, windowed, *arrays)

    return attend


@functools.lru_cache(maxsize=32)
def _abstract(config: DecoderConfig, compute: Compute):
    """(graph definition, abstract state) of a model; no array is made."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, compute, nnx.Rngs(0))))


def bind(config: DecoderConfig, compute: Compute, params: Params) -> Decoder:
    """The module with these parameters in it."""
    graph, state = _abstract(config, compute)
    state = nnx.clone(state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_params(config: DecoderConfig, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """The parameter tree as ShapeDtypeStructs, with their shardings on a mesh.

    Raises UserError: a leaf has no rule, or the mesh does not divide it.
    """
    tree = nnx.to_pure_dict(_abstract(config, Compute())[1])
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)
    return tree if mesh is None else with_shardings(mesh, tree, logical_axes(config))


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names at each leaf."""
    state = nnx.to_flat_state(_abstract(config, Compute())[1])
    lead = {"layers": ("layers",)}
    axes = {tuple(map(str, path)): lead.get(path[0], ()) + tuple(param.axes) for path, param in state}
    return unflatten_dict(axes)


def init_params(config: DecoderConfig, key: jax.Array, dtype: str = "float32") -> Params:
    """Fresh parameters: normal with `initializer_range`, norm scales one."""
    params = nnx.to_pure_dict(nnx.state(Decoder(config, Compute(), nnx.Rngs(key))))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def param_sizes(config: DecoderConfig) -> dict[str, int]:
    """Parameters of each leaf, by its "/"-joined path."""
    return {path: leaf.size for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}


def num_params(config: DecoderConfig) -> int:
    """Parameters, embedding and head included."""
    return sum(param_sizes(config).values())


def forward(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Logits float32 [B, T, V] for int32 tokens, positions and segment ids [B, T]."""
    model = bind(config, compute, params)
    hidden, _, _ = model(tokens, positions, model.packed(segment_ids))
    return model.logits(hidden)
