"""The table between our parameters and Hugging Face's tensors, read by import and export in opposite directions.

Axes: V vocabulary, D model, L layers, E experts, H query heads, K key and value heads, N head width, F mlp. A Hugging
Face dimension of two axes has both letters, outer first: `q_proj.weight` is [HN, D], our `query` [L, D, H, N]. Rows of
q and k are not permuted: both sides rotate channel i with i + N/2.
"""

import dataclasses
import itertools
import math
import re

import numpy as np
from flax.traverse_util import flatten_dict

from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig

_LAYER = "model.layers.{layer}."

# our path, our axes, Hugging Face's name, its axes
TABLE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("embed/embedding", "VD", "model.embed_tokens.weight", ("V", "D")),
    ("layers/attention_norm/scale", "LD", _LAYER + "input_layernorm.weight", ("D",)),
    ("layers/attention/query", "LDHN", _LAYER + "self_attn.q_proj.weight", ("HN", "D")),
    ("layers/attention/key", "LDKN", _LAYER + "self_attn.k_proj.weight", ("KN", "D")),
    ("layers/attention/value", "LDKN", _LAYER + "self_attn.v_proj.weight", ("KN", "D")),
    ("layers/attention/out", "LHND", _LAYER + "self_attn.o_proj.weight", ("D", "HN")),
    ("layers/attention/query_bias", "LHN", _LAYER + "self_attn.q_proj.bias", ("HN",)),
    ("layers/attention/key_bias", "LKN", _LAYER + "self_attn.k_proj.bias", ("KN",)),
    ("layers/attention/value_bias", "LKN", _LAYER + "self_attn.v_proj.bias", ("KN",)),
    ("layers/attention/out_bias", "LD", _LAYER + "self_attn.o_proj.bias", ("D",)),
    ("layers/attention/query_norm/scale", "LHN", _LAYER + "self_attn.q_norm.weight", ("HN",)),
    ("layers/attention/key_norm/scale", "LKN", _LAYER + "self_attn.k_norm.weight", ("KN",)),
    ("layers/attention_post_norm/scale", "LD", _LAYER + "post_attention_layernorm.weight", ("D",)),
    ("layers/mlp_norm/scale", "LD", _LAYER + "post_attention_layernorm.weight", ("D",)),
    ("layers/mlp/gate", "LDF", _LAYER + "mlp.gate_proj.weight", ("F", "D")),
    ("layers/mlp/up", "LDF", _LAYER + "mlp.up_proj.weight", ("F", "D")),
    ("layers/mlp/down", "LFD", _LAYER + "mlp.down_proj.weight", ("D", "F")),
    ("layers/mlp/gate_bias", "LF", _LAYER + "mlp.gate_proj.bias", ("F",)),
    ("layers/mlp/up_bias", "LF", _LAYER + "mlp.up_proj.bias", ("F",)),
    ("layers/mlp/down_bias", "LD", _LAYER + "mlp.down_proj.bias", ("D",)),
    ("layers/mlp/router", "LDE", _LAYER + "mlp.gate.weight", ("E", "D")),
    ("layers/mlp_post_norm/scale", "LD", _LAYER + "post_feedforward_layernorm.weight", ("D",)),
    ("final_norm/scale", "D", "model.norm.weight", ("D",)),
    ("head/kernel", "DV", "lm_head.weight", ("V", "D")),
)
# Rows that differ with norms of queries and keys per head, and with norms on both sides.
_QK_NORM_BY_HEAD = {
    "layers/attention/query_norm/scale": ("LN", ("N",)),
    "layers/attention/key_norm/scale": ("LN", ("N",)),
}
# Rows that are different with experts. Those of models without norms of queries and keys have names of their own.
_EXPERTS = {
    "layers/mlp/gate": ("LEDF", _LAYER + "mlp.experts.{expert}.gate_proj.weight"),
    "layers/mlp/up": ("LEDF", _LAYER + "mlp.experts.{expert}.up_proj.weight"),
    "layers/mlp/down": ("LEFD", _LAYER + "mlp.experts.{expert}.down_proj.weight"),
}
_EXPERTS_WITHOUT_QK_NORM = {
    "mlp.gate.": "block_sparse_moe.gate.",
    "mlp.experts.": "block_sparse_moe.experts.",
    **{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}
_NORM_BEFORE_MLP = {"layers/mlp_norm/scale": _LAYER + "pre_feedforward_layernorm.weight"}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = (EMBEDDING, HEAD)  # both [V, D]

# Buffers that transformers ignores too: tables of angles that its old versions saved. Used with `search`.
IGNORED = re.compile(r"rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of the table for one model."""

    path: str  # "/"-joined, in the parameter tree
    shape: tuple[int, ...]  # ours, with the leading axes
    names: tuple[str, ...]  # Hugging Face's tensors, one for each index of the leading axes
    hf_shape: tuple[int, ...]  # of each of them
    lead: tuple[int, ...]  # sizes of our leading axes that have a tensor for each index: (), (L,) or (L, E)
    _split: tuple[int, ...]  # hf_shape with joined axes separated
    _order: tuple[int, ...]  # our axes as indices into `_split`

    def parts(self, block: np.ndarray) -> np.ndarray:
        """Some layers of our array, or all, with one axis for each index of the leading axes."""
        return block.reshape(-1, *self.shape[len(self.lead) :])

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor of `hf_shape` as a view of our shape for one index of the leading axes."""
        return tensor.reshape(self._split).transpose(self._order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_hf`; a view or, where axes are joined, a copy."""
        return array.transpose(np.argsort(self._order)).reshape(self.hf_shape)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """The rows of the table for this model: those of the parameters that it has."""
    sizes = dict(V=config.vocab_size, D=config.hidden_size, F=config.intermediate_size)
    sizes |= dict(H=config.num_attention_heads, K=config.num_key_value_heads, N=config.head_dim)
    sizes |= dict(L=config.num_hidden_layers, E=config.num_experts)
    present = flatten_dict(decoder.abstract_params(config), sep="/")
    rows = []
    for path, axes, name, hf_axes in TABLE:
        if path not in present:
            continue
        if config.qk_norm == "head":
            axes, hf_axes = _QK_NORM_BY_HEAD.get(path, (axes, hf_axes))
        if config.norm_position == "both":
            name = _NORM_BEFORE_MLP.get(path, name)
        if config.num_experts:
            axes, name = _EXPERTS.get(path, (axes, name))
            if not config.qk_norm:
                for usual, other in _EXPERTS_WITHOUT_QK_NORM.items():
                    name = name.replace(usual, other) if "layers/mlp/" in path else name
        split, lead = "".join(hf_axes), "LE" if axes.startswith("LE") else "L" if axes.startswith("L") else ""
        inner = axes.removeprefix(lead)
        indices = itertools.product(*(range(sizes.get(axis, 1) if axis in lead else 1) for axis in "LE"))
        rows.append(
            Weight(
                path=path,
                shape=tuple(sizes[axis] for axis in axes),
                names=tuple(name.format(layer=layer, expert=expert) for layer, expert in indices),
                hf_shape=tuple(math.prod(sizes[axis] for axis in joined) for joined in hf_axes),
                lead=tuple(sizes[axis] for axis in lead),
                _split=tuple(sizes[axis] for axis in split),
                _order=tuple(split.index(axis) for axis in inner),
            )
        )
    return tuple(rows)
