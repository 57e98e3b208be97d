"""Advantages of groups, and the clipped policy objective.

Axis legend: B episode (a row), T position, G group, N episode of a group.

- GRPO (Shao et al. 2024): advantages (r - mean) / std of the group; the mean over episodes of the mean over tokens.
- Dr. GRPO (Liu et al. 2025): r - mean; token losses summed, over the number of episodes × T.
- DAPO (Yu et al. 2025): as GRPO, but the mean over all tokens.
- RLOO (Ahmadian et al. 2024): r - mean of the others; averaged as Dr. GRPO.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.models.decoder import Decoder
from lemur_jax.rl.config import RlConfig
from lemur_jax.train.losses import RowSums
from lemur_jax.train.objectives import REFERENCE, Loss, Objective, reference_logprobs, token_logprobs

ARRAYS = {"advantages": (2, "float32"), "sampling_logprobs": (2, "float32")}  # of a batch of episodes
EPSILON = 1e-4  # added to the standard deviation, as TRL does


def advantages(rewards: np.ndarray, valid: np.ndarray, algorithm: str) -> np.ndarray:
    """float64 [G, N, ...] of rewards [G, N, ...]; invalid ones are ignored and get 0."""
    count = valid.sum(1, keepdims=True)
    masked = np.where(valid, rewards, 0.0)
    mean = masked.sum(1, keepdims=True) / np.maximum(count, 1)
    # Equal rewards and their mean differ by rounding, which Adam would scale up to an update.
    centred = np.where(valid & ~np.isclose(masked, mean, rtol=1e-9, atol=1e-12), masked - mean, 0.0)
    others = np.maximum(count - 1, 1)
    if algorithm == "rloo":
        return centred * count / others
    if algorithm == "dr_grpo":
        return centred
    return centred / (np.sqrt(np.square(centred).sum(1, keepdims=True) / others) + EPSILON)


def importance_ratios(options: RlConfig, new: Any, old: Any, mask: Any) -> jax.Array:
    """Ratios to clip: new over old probability of each token [B, T], or the geometric mean over a sequence [B, 1]."""
    log_ratio = jnp.where(mask > 0, new - old, 0.0)
    if options.importance == "sequence":
        tokens = jnp.sum(mask, axis=-1, keepdims=True)
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(tokens, 1.0)
    return jnp.exp(log_ratio)


def row_losses(options: RlConfig, losses: jax.Array, mask: jax.Array) -> RowSums:
    """Sums of losses [B, T] by row, and weights: over the batch, Σ loss / Σ weight is the algorithm's average."""
    tokens, total = jnp.sum(mask, axis=-1), jnp.sum(losses, axis=-1)
    nonempty = (tokens > 0).astype(jnp.float32)
    if options.algorithm == "grpo":
        return RowSums(loss=total / jnp.maximum(tokens, 1.0), z=None, weight=nonempty)
    weight = tokens if options.algorithm == "dapo" else nonempty * losses.shape[1]
    return RowSums(loss=total, z=None, weight=weight)


def policy(options: RlConfig) -> Objective:
    """The clipped objective of `lemur rl`.

    Of a batch it reads `loss_weights` [B, T], 1 where the token is the policy's own, `sampling_logprobs` [B, T],
    `advantages` [B, T], and for `options.kl` the log-probabilities under the first parameters.
    """
    low, high = 1 - options.clip_low, 1 + options.clip_high

    def loss(model: Decoder, batch: dict[str, Any]) -> Loss:
        mask, old, scores = batch["loss_weights"], batch["sampling_logprobs"], batch["advantages"]
        new = token_logprobs(model, batch)
        tokens, own = jnp.sum(mask), mask > 0
        ratio = importance_ratios(options, new, old, mask)
        losses = -jnp.minimum(ratio * scores, jnp.clip(ratio, low, high) * scores)
        gap = jnp.where(own, jnp.abs(new - old), 0.0)
        metrics = {
            # Off-policy, the parameters differ too: `Rollouts` compares log-probabilities of the same ones.
            "policy_shift" if options.off_policy else "logprob_gap": (jnp.sum(gap), tokens),
            "clip_fraction": (jnp.sum(own & ((ratio < low) | (ratio > high))), tokens),
            "negative_logprob": (-jnp.sum(jnp.where(own, new, 0.0)), tokens),  # estimates the entropy
        }
        if options.kl:
            # An estimate of KL(new, reference) for each token (Schulman's k3).
            excess = jnp.where(own, batch[REFERENCE] - new, 0.0)
            divergence = jnp.exp(excess) - excess - 1
            losses += options.kl * divergence
            metrics["kl"] = (jnp.sum(divergence), tokens)
        rows = row_losses(options, jnp.where(own, losses, 0.0), mask)
        return Loss(jnp.sum(rows.loss), rows, metrics)

    return Objective(loss=loss, arrays=ARRAYS, reference=reference_logprobs if options.kl else None)
