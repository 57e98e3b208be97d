"""Distillation: the student's distribution of the next token against that of a teacher with the same vocabulary.

At each position the teacher gives its K most likely tokens; all others are one more outcome. The divergence of these
K + 1 probabilities is at most that of the whole distributions, and equal to it for K = V.

Only positions with loss count, in any text (off-policy) or in text that the student sampled (`lemur rl`).

Axis legend: B batch row, T position, D model, K outcomes, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Decoder
from lemur_jax.train.config import DistillConfig
from lemur_jax.train.losses import RowSums, by_chunk
from lemur_jax.train.objectives import Batch, Loss, Objective, hidden_states

IDS, LOGPROBS = "teacher_ids", "teacher_logprobs"  # int32 and float32 [B, T, K]
LEAST = 1e-7  # probability of all other tokens, which rounding may make negative


def divergence(logprobs: jax.Array, top: jax.Array, ids: jax.Array, reverse: bool = False) -> jax.Array:
    """KL(teacher ‖ student) in nats, or reversed, float32 [...].

    `logprobs` [..., V] are the student's; `top` and `ids` [..., K] the teacher's log-probabilities and tokens.
    """

    def with_others(top: jax.Array) -> jax.Array:
        others = jnp.maximum(1 - jnp.sum(jnp.exp(top), axis=-1, keepdims=True), LEAST)
        return jnp.concatenate([top, jnp.log(others)], axis=-1)

    teacher, student = with_others(top), with_others(jnp.take_along_axis(logprobs, ids, axis=-1))
    log_p, log_q = (student, teacher) if reverse else (teacher, student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def distillation(options: DistillConfig, teacher: DecoderConfig) -> Objective:
    """The objective of `config.distill`: `weight` × divergence + (1 - `weight`) × cross-entropy, mean over tokens."""

    def top_of_teacher(model: Decoder, batch: Batch) -> Batch:
        def chunk(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.lax.top_k(jax.nn.log_softmax(model.logits(hidden)), options.top_k)

        top, ids = by_chunk(model, chunk, hidden_states(model, batch))
        return {LOGPROBS: top, IDS: ids}

    def loss(model: Decoder, batch: Batch) -> Loss:
        def chunk(hidden: jax.Array, targets: jax.Array, top: jax.Array, ids: jax.Array) -> Any:
            logprobs = jax.nn.log_softmax(model.logits(hidden))
            chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
            return divergence(logprobs, top, ids, options.reverse), chosen

        weights, hidden = batch["loss_weights"], hidden_states(model, batch)
        kl, chosen = by_chunk(model, chunk, hidden, batch["targets"], batch[LOGPROBS], batch[IDS])
        total = jnp.sum(weights)
        row_losses = jnp.sum(weights * (options.weight * kl - (1 - options.weight) * chosen), axis=-1)
        metrics = {
            "divergence": (jnp.sum(weights * kl), total),
            "negative_logprob": (-jnp.sum(weights * chosen), total),
        }
        if "sampling_logprobs" in batch:
            gap = jnp.abs(chosen - batch["sampling_logprobs"])
            metrics["logprob_gap"] = jnp.sum(jnp.where(weights > 0, gap, 0.0)), total
        rows = RowSums(loss=row_losses, z=None, weight=jnp.sum(weights, axis=-1))
        return Loss(jnp.sum(row_losses), rows, metrics)

    return Objective(loss=loss, reference=top_of_teacher, teacher=teacher)
