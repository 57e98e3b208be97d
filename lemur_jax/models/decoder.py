"""Llama as a Flax NNX module, its parameters as a plain nested dict.

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
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lemur_jax.models.attention import attention
from lemur_jax.models.config import ComputeConfig, DecoderConfig
from lemur_jax.models.remat import rematerialize
from lemur_jax.models.rope import rotary_angles, rotate
from lemur_jax.parallel.projection import Projection

Params = dict[str, Any]
# (query [B,T,H,N], key [B,T,K,N], value [B,T,K,N], cache, layer index) -> ([B,T,H,N], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the model is computed: affects speed and memory, not results (up to rounding)."""

    dtype: str = "float32"  # of activations and products
    remat: str = "none"  # a name in `models.remat.POLICIES`
    reduce_dtype: str = ""  # of weight gradients in transit between devices; "": `dtype`
    attention: str = "auto"  # or a name in `models.attention.IMPLEMENTATIONS`
    attention_blocks: tuple[int, int] = (0, 0)  # as in `models.splash.block_sizes`
    loss_chunk: int = 0  # positions whose logits exist at a time; 0: all at once
    mesh: Mesh | None = None  # shards activations; None: no sharding

    @property
    def project(self) -> Projection:
        """The products with weights."""
        return Projection(dtype=self.dtype, reduce_dtype=self.reduce_dtype, mesh=self.mesh)

    @classmethod
    def from_config(cls, options: ComputeConfig, mesh: Mesh | None) -> "Compute":
        """From `config.compute`."""
        return cls(
            dtype=options.dtype,
            remat=options.remat,
            reduce_dtype=options.reduce_dtype,
            attention=options.attention,
            attention_blocks=(options.attention_blocks[0], options.attention_blocks[1]),
            loss_chunk=options.loss_chunk,
            mesh=mesh,
        )


def _weight(config: DecoderConfig, rngs: nnx.Rngs, shape: tuple[int, ...], *axes: str) -> nnx.Param:
    """A fresh weight; `axes` are its logical axes (`parallel/rules.py`)."""
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, with statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, config: DecoderConfig, compute: Compute):
        self.project = compute.project
        self.epsilon = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones((config.hidden_size,)), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.project.pointwise(self._normalize, x)

    def _normalize(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        D, N = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.project = compute.project
        self.query = _weight(config, rngs, (D, H, N), "embed", "heads", "head_dim")
        self.key = _weight(config, rngs, (D, K, N), "embed", "kv_heads", "head_dim")
        self.value = _weight(config, rngs, (D, K, N), "embed", "kv_heads", "head_dim")
        self.out = _weight(config, rngs, (H, N, D), "heads", "head_dim", "embed")

    def __call__(self, x: jax.Array, angles, attend: Callable) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], the cache that `attend` returns)."""
        weights = (("BTD,DHN->BTHN", self.query), ("BTD,DKN->BTKN", self.key), ("BTD,DKN->BTKN", self.value))
        query, key, value = self.project.read(x, *weights)
        query, key = (rotate(each, angles, self.project.mesh) for each in (query, key))
        query = self.project.shard(query, "heads", "head_dim")
        key = self.project.shard(key, "kv_heads", "head_dim")
        value = self.project.shard(value, "kv_heads", "head_dim")
        query = checkpoint_name(query, "query")
        key, value = checkpoint_name(key, "key_value"), checkpoint_name(value, "key_value")
        mixed, cache = attend(query, key, value)
        return self.project.write("BTHN,HND->BTD", mixed, self.out), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.project = compute.project
        self.gate = _weight(config, rngs, (D, F), "embed", "mlp")
        self.up = _weight(config, rngs, (D, F), "embed", "mlp")
        self.down = _weight(config, rngs, (F, D), "mlp", "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.project.read(x, ("BTD,DF->BTF", self.gate), ("BTD,DF->BTF", self.up))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        hidden = self.project.pointwise(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        return self.project.write("BTF,FD->BTD", self.project.shard(hidden, "mlp"), self.down)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, compute)
        self.attention = Attention(config, compute, rngs)
        self.mlp_norm = RMSNorm(config, compute)
        self.mlp = MLP(config, compute, rngs)

    def __call__(self, x: jax.Array, angles, attend: Callable) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], cache)."""
        mixed, cache = self.attention(self.attention_norm(x), angles, attend)
        h = checkpoint_name(x + mixed, "residual")
        return h + self.mlp(self.mlp_norm(h)), cache


class Embedding(nnx.Module):
    """Token embedding [V, D]; also the head of a tied model."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        self.project = compute.project
        self.embedding = _weight(config, rngs, (config.vocab_size, config.hidden_size), "vocab", "embed")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return self.project.embed(tokens, self.embedding)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        return self.project.logits("BTD,VD->BTV", hidden, self.embedding)


class Head(nnx.Module):
    """Output projection [D, V] of an untied model."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs):
        self.project = compute.project
        self.kernel = _weight(config, rngs, (config.hidden_size, config.vocab_size), "embed", "vocab")

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
        self.final_norm = RMSNorm(config, compute)
        if not config.tie_word_embeddings:
            self.head = Head(config, compute, rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, cache: Any = ()
    ) -> tuple[jax.Array, Any]:
        """Tokens to final hidden states.

        Args:
          tokens, positions: int32 [B, T].
          attend: attention over (query, key, value, cache, layer index); see `packed` for training.
          cache: pytree carried through the layers, e.g. keys and values [L, ...]; () without one.

        Returns:
          Hidden states [B, T, D] after the final norm, and the cache.
        """
        x = self.embed(tokens)
        angles = rotary_angles(self.config, positions)
        graph, stacked = nnx.split(self.layers)

        def layer(carry, params):
            x, cache, index = carry
            block = nnx.merge(graph, params)
            x = checkpoint_name(x, "layer_in")
            x, cache = block(x, angles, lambda q, k, v: attend(q, k, v, cache, index))
            return (x, cache, index + 1), None

        layer = rematerialize(layer, self.compute.remat)
        (x, cache, _), _ = jax.lax.scan(layer, (x, cache, jnp.int32(0)), stacked)
        return self.compute.project.gather(self.final_norm(x)), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        return (self.embed if self.config.tie_word_embeddings else self.head).logits(hidden)

    def packed(self, segment_ids: jax.Array) -> Attend:
        """Attention for training: causal inside each segment of int32 [B, T], no cache."""
        compute = self.compute
        implementation = attention(compute.attention, compute.mesh, compute.dtype, compute.attention_blocks)

        def attend(query, key, value, cache, index):
            return implementation(query, key, value, segment_ids, compute.mesh), cache

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


def abstract_params(config: DecoderConfig, dtype: str = "float32") -> Params:
    """The parameter tree as ShapeDtypeStructs."""
    tree = nnx.to_pure_dict(_abstract(config, Compute())[1])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names at each leaf."""
    axes: dict[str, Any] = {}
    for path, param in nnx.to_flat_state(_abstract(config, Compute())[1]):
        node = axes
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = (("layers",) if path[0] == "layers" else ()) + tuple(param.axes)
    return axes


def init_params(config: DecoderConfig, key: jax.Array, dtype: str = "float32") -> Params:
    """Fresh parameters: normal with `initializer_range`, norm scales one."""
    params = nnx.to_pure_dict(nnx.state(Decoder(config, Compute(), nnx.Rngs(key))))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def num_params(config: DecoderConfig) -> int:
    """Parameters, embedding and head included."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


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
    hidden, _ = model(tokens, positions, model.packed(segment_ids))
    return model.logits(hidden)
