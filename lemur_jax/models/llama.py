"""Llama as a Flax NNX module, its parameters as a plain nested dict.

Axis legend: B batch, T position, D model, H query heads, K key heads, N head width, F mlp,
V vocabulary, L layers.

The module says what the parameters are and how they are used; outside of it (optimizer, checkpoint,
conversion) parameters are a nested dict of arrays with layers stacked on a leading axis L.
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
from lemur_jax.models.config import ComputeConfig, LlamaConfig
from lemur_jax.models.linear import Reduction, gathered, is_quantized, product, sharded_products, whole_stream
from lemur_jax.models.remat import rematerialize
from lemur_jax.models.rope import rotary_angles, rotate, rotate_by_matmul
from lemur_jax.parallel import compiler_flags
from lemur_jax.parallel.rules import constrain

Params = dict[str, Any]
# (query [B,T,H,N], key [B,T,K,N], value [B,T,K,N], cache, layer index) -> ([B,T,H,N], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the model is computed; none of it changes the result beyond rounding.

    Attributes:
      dtype: of activations and of matmul inputs ("float32", "bfloat16").
      remat: a name in `models.remat.POLICIES`.
      reduce_dtype: of weight gradients on their way between devices; "": as `dtype`.
      attention: "auto" or a name in `models.attention.IMPLEMENTATIONS`.
      attention_blocks: as in `models.splash.block_sizes`.
      loss_chunk: positions whose logits exist at a time; 0: all at once.
      mesh: where activations are sharded; None: wherever XLA puts them.
    """

    dtype: str = "float32"
    remat: str = "none"
    reduce_dtype: str = ""
    attention: str = "auto"
    attention_blocks: tuple[int, int] = (0, 0)
    loss_chunk: int = 0
    mesh: Mesh | None = None

    @property
    def on_tpu(self) -> bool:
        """Whether the mesh is of TPU devices, real or described."""
        return self.mesh is not None and self.mesh.devices.flat[0].platform == "tpu"

    def recomputed(self, function: Callable) -> Callable:
        """`function`, whose elementwise work the backward pass does again rather than keep; as it is on TPU.

        Autodiff keeps several arrays for one norm or one SiLU; on CPU to write and read them takes longer. On TPU it is
        the policy `remat` alone that says what is kept.
        """
        # prevent_cse=False: as in models/remat.py
        return function if self.on_tpu else jax.checkpoint(function, prevent_cse=False)

    @property
    def reduction(self) -> Reduction | None:
        """How weight gradients are reduced over `fsdp` and `data`; None: as autodiff and XLA do."""
        if self.mesh is None:
            return None
        dtype = self.reduce_dtype or self.dtype
        device = self.mesh.devices.flat[0]
        exchange = self.mesh.shape["fsdp"] > 1 and compiler_flags.exchanges_gradients(device.device_kind)
        written = exchange or dtype != self.dtype or device.platform != "tpu"
        return Reduction(dtype, exchange) if written else None

    @property
    def head_reduction(self) -> Reduction | None:
        """The same for the head, whose gradient is never exchanged: it is reduced once and not in every layer."""
        found = self.reduction
        if found is None or (found.exchange and found.dtype == self.dtype):
            return None
        return Reduction(found.dtype, exchange=False)

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


class RMSNorm(nnx.Module):
    """Zhang & Sennrich 2019: x / rms(x) · scale, statistics in float32."""

    def __init__(self, config: LlamaConfig, compute: Compute):
        self.compute = compute
        self.epsilon = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones((config.hidden_size,)), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        out = self.compute.recomputed(self._normalize)(x)
        # On TPU the norm would be computed again inside each matmul that reads it, tile by tile.
        return jax.lax.optimization_barrier(out) if self.compute.on_tpu else out

    def _normalize(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Projections(nnx.Module):
    """A module of matrices that are gathered from `fsdp` and cast just before use."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        self.compute = compute
        self._initialize = functools.partial(_normal, rngs, config.initializer_range)

    def weight(self, param: nnx.Param) -> jax.Array:
        """The matrix in the compute dtype, whole along `fsdp`."""
        return gathered(param.get_value(), param.axes, self.compute.mesh, self.compute.dtype)

    def einsums(self, x: jax.Array, *products: tuple[str, nnx.Param]) -> tuple[jax.Array, ...]:
        """The einsum of `x` and each matrix."""
        equations, params = zip(*products, strict=True)
        values, axes = tuple(param.get_value() for param in params), tuple(param.axes for param in params)
        reduction = self.compute.reduction
        if reduction and not any(map(is_quantized, values)):  # of integers there is no gradient
            return sharded_products(equations, axes, self.compute.mesh, reduction, x, values)
        return tuple(product(equation, x, self.weight(param)) for equation, param in products)

    def einsum(self, equation: str, x: jax.Array, param: nnx.Param) -> jax.Array:
        return self.einsums(x, (equation, param))[0]


def _normal(rngs: nnx.Rngs, scale: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)


class Attention(Projections):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs)
        D, H, K, N = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.query = self._initialize((D, H, N), ("embed", "heads", "head_dim"))
        self.key = self._initialize((D, K, N), ("embed", "kv_heads", "head_dim"))
        self.value = self._initialize((D, K, N), ("embed", "kv_heads", "head_dim"))
        self.out = self._initialize((H, N, D), ("heads", "head_dim", "embed"))

    def __call__(self, x: jax.Array, angles, attend: Callable) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], whatever cache `attend` returns)."""
        mesh = self.compute.mesh
        turn = rotate_by_matmul if self.compute.on_tpu else rotate
        query, key, value = self.einsums(
            x,
            ("BTD,DHN->BTHN", self.query),
            ("BTD,DKN->BTKN", self.key),
            ("BTD,DKN->BTKN", self.value),
        )
        query, key = turn(query, angles), turn(key, angles)
        query = constrain(query, mesh, "batch", "length", "heads", "head_dim")
        key = constrain(key, mesh, "batch", "length", "kv_heads", "head_dim")
        value = constrain(value, mesh, "batch", "length", "kv_heads", "head_dim")
        query = checkpoint_name(query, "query")
        key, value = checkpoint_name(key, "key_value"), checkpoint_name(value, "key_value")
        mixed, cache = attend(query, key, value)
        return self.einsum("BTHN,HND->BTD", mixed, self.out), cache


class MLP(Projections):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs)
        D, F = config.hidden_size, config.intermediate_size
        self.gate = self._initialize((D, F), ("embed", "mlp"))
        self.up = self._initialize((D, F), ("embed", "mlp"))
        self.down = self._initialize((F, D), ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.einsums(x, ("BTD,DF->BTF", self.gate), ("BTD,DF->BTF", self.up))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.compute.recomputed(self._down)(gate, up)

    def _down(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(gate) * up
        hidden = constrain(hidden, self.compute.mesh, "batch", "length", "mlp")
        return self.einsum("BTF,FD->BTD", hidden, self.down)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        self.compute = compute
        self.attention_norm = RMSNorm(config, compute)
        self.attention = Attention(config, compute, rngs)
        self.mlp_norm = RMSNorm(config, compute)
        self.mlp = MLP(config, compute, rngs)

    def __call__(self, x: jax.Array, angles, attend: Callable) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], cache)."""
        mesh = self.compute.mesh
        mixed, cache = self.attention(whole_stream(self.attention_norm(x), mesh), angles, attend)
        x = x + constrain(mixed, mesh, "batch", "stream", "width")
        x = checkpoint_name(x, "residual")
        out = self.mlp(whole_stream(self.mlp_norm(x), mesh))
        return x + constrain(out, mesh, "batch", "stream", "width"), cache


class Embedding(Projections):
    """Token embedding [V, D]; also the head of a tied model."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs)
        self.embedding = self._initialize((config.vocab_size, config.hidden_size), ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        # Cast after the lookup: what the lookup takes is what its gradient is reduced in.
        dtype = self.compute.reduce_dtype or self.compute.dtype
        table = gathered(self.embedding.get_value(), self.embedding.axes, self.compute.mesh, dtype)
        x = jnp.take(table, tokens, axis=0, mode="clip").astype(self.compute.dtype)
        return constrain(x, self.compute.mesh, "batch", "stream", "width")


class Head(Projections):
    """Output projection [D, V] of an untied model."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs)
        self.kernel = self._initialize((config.hidden_size, config.vocab_size), ("embed", "vocab"))


class Llama(nnx.Module):
    """The decoder. `self.layers` is one `Block` whose parameters carry a leading axis L."""

    def __init__(self, config: LlamaConfig, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.embed = Embedding(config, compute, rngs)
        make = nnx.vmap(lambda rngs: Block(config, compute, rngs), in_axes=0, out_axes=0)
        self.layers = make(rngs.split(config.num_hidden_layers))
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

        def body(carry, layer):
            x, cache, index = carry
            block = nnx.merge(graph, layer)
            x = checkpoint_name(x, "layer_in")
            x, cache = block(x, angles, lambda q, k, v: attend(q, k, v, cache, index))
            return (x, cache, index + 1), None

        body = rematerialize(body, self.compute.remat)
        (x, cache, _), _ = jax.lax.scan(body, (x, cache, jnp.int32(0)), stacked)
        return whole_stream(self.final_norm(x), self.compute.mesh), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        if self.config.tie_word_embeddings:
            module: Embedding | Head = self.embed
            param, equation = self.embed.embedding, "BTD,VD->BTV"
        else:
            module = self.head
            param, equation = self.head.kernel, "BTD,DV->BTV"
        if reduction := self.compute.head_reduction:
            (out,) = sharded_products(
                (equation,),
                (param.axes,),
                self.compute.mesh,
                reduction,
                hidden,
                (param.get_value(),),
                "float32",
            )
        else:
            out = product(equation, hidden, module.weight(param), "float32")
        return constrain(out, self.compute.mesh, "batch", "length", "vocab")

    def packed(self, segment_ids: jax.Array) -> Attend:
        """Attention for training: causal inside each segment of int32 [B, T], no cache."""
        compute = self.compute
        implementation = attention(compute.attention, compute.mesh, compute.dtype, compute.attention_blocks)

        def attend(query, key, value, cache, index):
            return implementation(query, key, value, segment_ids, compute.mesh), cache

        return attend


@functools.lru_cache(maxsize=32)
def _abstract(config: LlamaConfig, compute: Compute):
    """(graph definition, abstract state) of a model; no array is made."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, compute, nnx.Rngs(0))))


def bind(config: LlamaConfig, compute: Compute, params: Params) -> Llama:
    """The module with these parameters in it."""
    graph, state = _abstract(config, compute)
    state = nnx.clone(state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_params(config: LlamaConfig, dtype: str = "float32") -> Params:
    """The parameter tree as ShapeDtypeStructs."""
    tree = nnx.to_pure_dict(_abstract(config, Compute())[1])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def logical_axes(config: LlamaConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names at each leaf."""
    axes: dict[str, Any] = {}
    for path, param in nnx.to_flat_state(_abstract(config, Compute())[1]):
        node = axes
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = (("layers",) if path[0] == "layers" else ()) + tuple(param.axes)
    return axes


def init_params(config: LlamaConfig, key: jax.Array, dtype: str = "float32") -> Params:
    """Fresh parameters: normal with `initializer_range`, norm scales one."""
    params = nnx.to_pure_dict(nnx.state(Llama(config, Compute(), nnx.Rngs(key))))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def num_params(config: LlamaConfig) -> int:
    """Parameters, embedding and head included."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def forward(
    config: LlamaConfig,
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
