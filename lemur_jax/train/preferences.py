"""Preference losses: DPO, IPO, SimPO, ORPO and KTO on chosen and rejected conversations.

Rows are packed: document n of a row has the segment 2 n for its chosen conversation and 2 n + 1 for the rejected one
(`data/rows.py`), so a sum of log-probabilities by segment is all that the losses need. The losses equal those of TRL.

Axis legend: B batch row, T position, N segment id, P pair or sequence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lemur_jax.models.decoder import Decoder
from lemur_jax.train.config import NOT_ADDITIVE, PreferenceConfig
from lemur_jax.train.losses import RowSums
from lemur_jax.train.objectives import REFERENCE, Batch, Loss, Objective, reference_logprobs, token_logprobs

KL_REFERENCE = "kl_reference_logprobs"
log_sigmoid = jax.nn.log_sigmoid


def dpo(options: PreferenceConfig, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Rafailov et al. 2023, with conservative label smoothing; takes log-ratios to the reference, summed."""
    logits, smoothing = options.beta * (chosen - rejected), options.label_smoothing
    return -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)


def ipo(options: PreferenceConfig, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Azar et al. 2023; takes log-ratios to the reference, averaged over tokens."""
    return jnp.square(chosen - rejected - 1 / (2 * options.beta))


def simpo(options: PreferenceConfig, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Meng et al. 2024; takes log-probabilities, averaged over tokens."""
    return dpo(options, chosen - options.margin / options.beta, rejected)


def odds_ratio(options: PreferenceConfig, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """ORPO's second term (Hong et al. 2024); takes log-probabilities, averaged over tokens."""

    def log_odds(x: jax.Array) -> jax.Array:
        return x - jnp.log(-jnp.expm1(jnp.minimum(x, -1e-7)))

    return -options.beta * log_sigmoid(log_odds(chosen) - log_odds(rejected))


def kto(options: PreferenceConfig, chosen: jax.Array, rejected: jax.Array, kl: jax.Array) -> tuple:
    """Ethayarajh et al. 2024: losses of desirable and of undesirable sequences; takes summed log-ratios."""
    desirable = 1 - jax.nn.sigmoid(options.beta * (chosen - kl))
    undesirable = 1 - jax.nn.sigmoid(options.beta * (kl - rejected))
    return options.desirable_weight * desirable, options.undesirable_weight * undesirable


# loss -> (function of pairs, whether of log-ratios to a reference, whether of means instead of sums)
PAIRS: dict[str, tuple[Callable[..., jax.Array], bool, bool]] = {
    "dpo": (dpo, True, False),
    "ipo": (ipo, True, True),
    "simpo": (simpo, False, True),
    "orpo": (odds_ratio, False, True),
}


def preference(options: PreferenceConfig) -> Objective:
    """The objective of `config.preference`. Its weights count pairs, for KTO sequences."""
    additive = options.loss not in NOT_ADDITIVE
    if options.loss == "kto":
        return Objective(
            loss=lambda model, batch: _kto_loss(options, model, batch),
            reference=_kto_reference,
            additive=additive,
        )
    function, has_reference, is_mean = PAIRS[options.loss]

    def loss(model: Decoder, batch: Batch) -> Loss:
        logprobs = token_logprobs(model, batch)
        scores = logprobs - batch[REFERENCE] if has_reference else logprobs
        (chosen, rejected), (chosen_count, rejected_count) = _sides(scores, batch)
        if is_mean:
            chosen = chosen / jnp.maximum(chosen_count, 1)
            rejected = rejected / jnp.maximum(rejected_count, 1)
        is_pair = (chosen_count > 0) & (rejected_count > 0)  # a pair may be cut at T
        # Where there is no pair, finite arguments keep the gradient finite.
        chosen, rejected = (jnp.where(is_pair, score, -1.0) for score in (chosen, rejected))
        losses = jnp.where(is_pair, function(options, chosen, rejected), 0.0)
        metrics = _rewards(options, chosen, rejected, is_pair, is_pair)
        weight = jnp.sum(is_pair, axis=-1, dtype=jnp.float32)
        row_losses = jnp.sum(losses, axis=-1)
        if options.loss == "orpo":
            nll, count = _chosen_nll(logprobs, batch)
            metrics["nll"] = nll, count
            row_losses += weight * nll / jnp.maximum(count, 1)
        return Loss(jnp.sum(row_losses), RowSums(loss=row_losses, z=None, weight=weight), metrics)

    reference = reference_logprobs if has_reference else None
    return Objective(loss=loss, reference=reference, additive=additive)


def _segment_sums(values: jax.Array, segments: jax.Array) -> jax.Array:
    """Sums [B, N] of values [B, T] by segment id, N = 2 T + 2."""
    size = 2 * values.shape[1] + 2
    return jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, size))(values, segments)


def _sides(scores: jax.Array, batch: Batch) -> tuple[tuple, tuple]:
    """(sums of chosen, of rejected), (their supervised tokens), all [B, P], of scores [B, T]."""
    weights = batch["loss_weights"]
    sums, counts = (_segment_sums(x, batch["segment_ids"]) for x in (scores * weights, weights))
    return (sums[:, 2::2], sums[:, 3::2]), (counts[:, 2::2], counts[:, 3::2])


def _rewards(options: PreferenceConfig, chosen, rejected, has_chosen, has_rejected) -> dict:
    """Means of β times the scores [B, P], and how often the chosen one is larger."""
    both = has_chosen & has_rejected

    def mean(values, mask):
        return jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32)

    return {
        "chosen_reward": mean(options.beta * chosen, has_chosen),
        "rejected_reward": mean(options.beta * rejected, has_rejected),
        "margin": mean(options.beta * (chosen - rejected), both),
        "accuracy": mean((chosen > rejected).astype(jnp.float32), both),
    }


def _chosen_nll(logprobs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """ORPO's first term: sum and number of all targets of chosen conversations, prompts included."""
    segments = batch["segment_ids"]
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    mask = (segments == following) & (segments > 0) & (segments % 2 == 0)
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def _kto_loss(options: PreferenceConfig, model: Decoder, batch: Batch) -> Loss:
    scores = token_logprobs(model, batch) - batch[REFERENCE]
    (chosen, rejected), (chosen_count, rejected_count) = _sides(scores, batch)
    mismatched = exchange_completions(batch)
    ratios = jax.lax.stop_gradient(token_logprobs(model, mismatched)) - batch[KL_REFERENCE]
    sums = _segment_sums(ratios * mismatched["loss_weights"], mismatched["segment_ids"])
    # A row of one document has nothing to exchange.
    has_several = jnp.max(batch["segment_ids"], axis=-1, keepdims=True) >= 4
    is_valid = (_segment_sums(mismatched["loss_weights"], mismatched["segment_ids"]) > 0) & has_several
    kl = jnp.sum(jnp.where(is_valid, sums, 0.0)) / jnp.maximum(jnp.sum(is_valid), 1)
    kl = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    has_chosen, has_rejected = chosen_count > 0, rejected_count > 0
    desirable, undesirable = kto(options, chosen, rejected, kl)
    losses = jnp.where(has_chosen, desirable, 0.0) + jnp.where(has_rejected, undesirable, 0.0)
    weight = jnp.sum(has_chosen, axis=-1) + jnp.sum(has_rejected, axis=-1)
    rows = RowSums(loss=jnp.sum(losses, axis=-1), z=None, weight=weight.astype(jnp.float32))
    metrics = _rewards(options, chosen, rejected, has_chosen, has_rejected) | {"kl": (kl, jnp.float32(1))}
    return Loss(jnp.sum(rows.loss), rows, metrics)


def _kto_reference(model: Decoder, batch: Batch) -> Batch:
    return {
        **reference_logprobs(model, batch),
        KL_REFERENCE: token_logprobs(model, exchange_completions(batch)),
    }


def exchange_completions(batch: Batch) -> Batch:
    """The batch in which each prompt of a row is followed by the completion of the document before it.

    A completion begins with the first supervised token. The total length of a row stays the same, so this permutes
    its tokens. KTO estimates the divergence from the reference on these mismatched sequences.
    """
    arrays = (batch[key] for key in ("tokens", "loss_weights", "segment_ids"))
    keys = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    return {**batch, **dict(zip(keys, jax.vmap(_exchange)(*arrays), strict=True))}


def _exchange(tokens: jax.Array, weights: jax.Array, segments: jax.Array) -> tuple:
    """One row of `exchange_completions`; all arrays [T]."""
    T = tokens.shape[0]
    positions, N = jnp.arange(T), 2 * T + 4
    # The target of position t is token t + 1.
    supervised = jnp.pad(weights[:-1], (1, 0)) > 0
    completion_start = jax.ops.segment_min(jnp.where(supervised, positions, T), segments, N)
    is_completion = positions >= completion_start[segments]
    exists = jax.ops.segment_max((segments > 0).astype(jnp.int32), segments, N) > 0
    count = jnp.max(segments) // 2
    following = jnp.where(segments // 2 == count, 1, segments // 2 + 1)
    same_kind = 2 * following + segments % 2
    target = jnp.where(exists[same_kind], same_kind, same_kind ^ 1)
    segment = jnp.where(segments > 0, jnp.where(is_completion, target, segments), N)
    order = jnp.argsort(2 * segment + is_completion, stable=True)
    segment, tokens, supervised = segment[order], tokens[order], supervised[order]
    is_first = segment != jnp.pad(segment[:-1], (1, 0), constant_values=-1)
    starts = jax.lax.cummax(jnp.where(is_first, positions, 0))
    has_target = jnp.append(~is_first[1:], False)
    segment = jnp.where(segment == N, 0, segment)
    targets = jnp.append(tokens[1:], 0)
    weights = has_target & jnp.append(supervised[1:], False)
    return tokens, targets, weights.astype(jnp.float32), segment, positions - starts
