"""What an update minimizes: a function (model, batch) -> sums of losses and of weights, and metrics.

`train/step.py` differentiates `Loss.total`, adds the sums of microbatches, and divides by the sum of `rows.weight`: an
objective knows nothing of accumulation, sharding, the optimizer, checkpoints or logs.

Axis legend: B batch row, T position.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Decoder
from lemur_jax.models.experts import Router
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.train.config import OptimizerConfig
from lemur_jax.train.losses import RowSums, row_sums, target_logprobs

Batch = dict[str, Any]

# Arrays of every batch, and what else an objective may ask for: name -> (dimensions, dtype).
ARRAYS: Mapping[str, tuple[int, str]] = {
    "tokens": (2, "int32"), "targets": (2, "int32"), "loss_weights": (2, "float32"),
    "segment_ids": (2, "int32"), "positions": (2, "int32"), "source_ids": (1, "int32"),
}  # fmt: skip
REFERENCE = "reference_logprobs"


class Loss(NamedTuple):
    """What an objective returns for a microbatch."""

    total: jax.Array  # float32 [], a sum over the microbatch: what is differentiated
    rows: RowSums  # reported losses and their weights by row
    metrics: Mapping[str, tuple[jax.Array, jax.Array]] = {}  # name -> (sum, weight), float32 []: a mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and what it reads.

    Attributes:
      loss: (model, batch) -> Loss. Its sums are divided by the update's sum of `rows.weight`.
      arrays: further arrays of the batch, [B] or [B, T]: name -> (1 or 2 dimensions, dtype), e.g.
        {"advantages": (2, "float32")}. They are sharded and divided into microbatches like the others.
      reference: (model with the first parameters of the run, batch) -> further arrays of the batch, without gradient:
        the function `reference_logprobs`, or another. Those parameters then stay on the devices: the base of an
        adapter, or a copy. None: no reference.
      teacher: the model of those first parameters, if it is that of `config.distill` and not the run's.
      additive: whether the sums of parts of a batch add up to those of the batch; False if the loss has a mean over
        the batch, which is then taken over a microbatch.
    """

    loss: Callable[[Decoder, Batch], Loss]
    arrays: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    reference: Callable[[Decoder, Batch], Batch] | None = None
    teacher: DecoderConfig | None = None
    additive: bool = True


def abstract_batch(
    rows: int, length: int, mesh: Mesh, more: Mapping[str, tuple[int, str]] | None = None
) -> Batch:
    """Shapes, dtypes and shardings of a batch of `rows` × `length`; `more` as `Objective.arrays`."""
    return {
        name: jax.ShapeDtypeStruct(
            (rows, length)[:ndim], jnp.dtype(dtype), sharding=batch_sharding(mesh, ndim)
        )
        for name, (ndim, dtype) in {**ARRAYS, **(more or {})}.items()
    }


def hidden_states(model: Decoder, batch: Batch) -> jax.Array:
    """[B, T, D] after the final norm, for packed rows."""
    hidden, _, _ = model(batch["tokens"], batch["positions"], model.packed(batch["segment_ids"]))
    return hidden


def token_logprobs(model: Decoder, batch: Batch) -> jax.Array:
    """Log-probability of each target given all before it in its segment, in nats: float32 [B, T].

    It is defined at every position with a target, regardless of `loss_weights`; mask what must not count.
    """
    return target_logprobs(model, hidden_states(model, batch), batch["targets"])


def reference_logprobs(model: Decoder, batch: Batch) -> Batch:
    """For `Objective.reference`: {REFERENCE: log-probabilities of the targets, float32 [B, T]}."""
    return {REFERENCE: token_logprobs(model, batch)}


def next_token(options: OptimizerConfig | None = None) -> Objective:
    """Cross-entropy of the targets.

    `options` weighs log(Z)^2 and the routers' losses, which are trained on and not part of the reported loss.
    """

    def loss(model: Decoder, batch: Batch) -> Loss:
        segments = batch["segment_ids"]
        hidden, _, routers = model(
            batch["tokens"], batch["positions"], model.packed(segments), valid=segments > 0
        )
        rows = row_sums(model, hidden, batch["targets"], batch["loss_weights"])
        if options is None:
            return Loss(jnp.sum(rows.loss), rows)
        total = jnp.sum(rows.loss + options.z_loss * rows.z)
        return _with_routers(Loss(total, rows), routers, options) if routers else Loss(total, rows)

    return Objective(loss=loss)


def _with_routers(loss: Loss, routers: Router, options: OptimizerConfig) -> Loss:
    """With the losses of the routers, [L] each: a mean over layers and tokens, weighted like the tokens' losses."""
    weight = jnp.sum(loss.rows.weight)
    balance, z = (jnp.mean(routers[name]) for name in ("balance", "z"))
    statistics = {"balance": balance, "z": z, "max_load": jnp.max(routers["max_load"])}
    metrics = {f"router_{name}": (value * weight, weight) for name, value in statistics.items()}
    term = options.router_balance_loss * balance + options.router_z_loss * z
    return loss._replace(total=loss.total + weight * term, metrics={**loss.metrics, **metrics})
