"""The mlp of a layer without experts.

Axes: B batch, T position, D model, F mlp.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.weights import ACTIVATIONS, add_bias, fresh_bias, fresh_weight, split_weight
from lemur_jax.parallel.projection import Projection


class MLP(nnx.Module):
    """A gated mlp: SwiGLU, GEGLU (Shazeer 2020).

    With `gate_share` it is computed in two parts of F, so that the backward pass can keep the first part of the gate
    (`gate_part` in models/remat.py) and compute the second again.
    """

    def __init__(self, config: DecoderConfig, project: Projection, gate_share: float, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.project = project
        self.gate_share = gate_share
        self.activation = ACTIVATIONS[config.activation]
        self.gate = fresh_weight(config, rngs, (D, F), "embed", "mlp")
        self.up = fresh_weight(config, rngs, (D, F), "embed", "mlp")
        self.down = fresh_weight(config, rngs, (F, D), "mlp", "embed")
        self.gate_bias = fresh_bias((F,), "norm") if config.mlp_bias else None
        self.up_bias = fresh_bias((F,), "norm") if config.mlp_bias else None
        self.down_bias = fresh_bias((D,), "norm") if config.mlp_bias else None

    def __call__(self, x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, dict]:
        """[B, T, D] -> ([B, T, D], nothing)."""
        weights = (self.gate, self.up, self.down)
        gates, ups, downs = (
            split_weight(each, "mlp", self.gate_share, self.project.mesh) for each in weights
        )
        parts = len(gates)
        products = self.project.read(x, *(("BTD,DF->BTF", weight) for weight in (*gates, *ups)))
        names = ("gate_part", "gate")[-parts:]
        outputs = []
        for name, gate, up, down in zip(names, products[:parts], products[parts:], downs, strict=True):
            gate, up = add_bias(gate, self.gate_bias), add_bias(up, self.up_bias)
            gate, up = checkpoint_name(gate, name), checkpoint_name(up, "up")
            hidden = self.project.pointwise(lambda gate, up: self.activation(gate) * up, gate, up)
            outputs.append(self.project.write("BTF,FD->BTD", self.project.shard(hidden, "mlp"), down))
        return add_bias(sum(outputs[1:], outputs[0]), self.down_bias), {}
