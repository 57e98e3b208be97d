"""How the next token is chosen from the logits.

Axis legend: B batch, V vocabulary.

The filters and their order (repetition penalty, temperature, top-k, top-p, min-p) are those of
`transformers`. Thresholds are found by bisection over the bits of the logits: exact, without a sort,
and as cheap on a vocabulary that is sharded.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError

# Values by name, each a scalar or one for each row.
Knobs = dict[str, np.generic | jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    Attributes:
      temperature: logits are divided by it; 0: greedy, and every filter below is without effect.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the fewest most likely tokens that hold this much probability; 1: all.
      min_p: only tokens at least this fraction as likely as the most likely one; 0: all.
      repetition_penalty: logits of tokens in the prompt or already generated are divided by it if
        positive, else multiplied (Keskar et al. 2019); 1: off. Acts on greedy choice too.
      seed: with a sequence's own seed and a position it determines the draw there, independent of the
        rest of the batch.

    Raises:
      UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 (0: greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (1e-9 <= self.repetition_penalty <= 1e9, "between 1e-9 and 1e9 (1: off)"),
            "seed": (0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
        }
        for name, (valid, rule) in ranges.items():
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {rule}")

    def knobs(self) -> Knobs:
        """The values that `choose` reads, as NumPy scalars."""
        return {
            field.name: (np.uint32 if field.name == "seed" else np.float32)(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }


def choose(
    logits: jax.Array, knobs: Knobs, seeds: jax.Array, positions: jax.Array, history: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of each sequence and its log-probability.

    Args:
      logits: float32 [B, V].
      knobs: of `Sampling.knobs`, each scalar or [B].
      seeds: uint32 [B].
      positions: int32 [B], of the chosen token in its sequence.
      history: int32 [B, S], the tokens so far in any order, -1 where there is none.

    Returns:
      int32 [B], and float32 [B] under the model's own distribution, before any filter, in nats.
    """
    scores = jax.lax.cond(
        jnp.any(knobs["repetition_penalty"] != 1),
        _penalize,
        lambda scores, *_: scores,
        logits,
        knobs,
        history,
    )
    tokens = jax.lax.cond(
        jnp.any(knobs["temperature"] > 0),
        _draw,
        lambda scores, *_: jnp.argmax(scores, axis=-1),
        scores,
        knobs,
        seeds,
        positions,
    )
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _penalize(scores: jax.Array, knobs: Knobs, history: jax.Array) -> jax.Array:
    rows = jnp.arange(len(scores))[:, None]
    in_history = jnp.zeros(scores.shape, bool).at[rows, history].max(history >= 0)
    penalty = _column(knobs["repetition_penalty"])
    return jnp.where(in_history, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def _draw(scores: jax.Array, knobs: Knobs, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    temperature = _column(knobs["temperature"])
    # At most 0, so that a temperature near 0 does not make the best one infinite.
    scores -= jnp.max(scores, axis=-1, keepdims=True)
    filtered = restrict(scores / jnp.where(temperature > 0, temperature, 1), knobs)
    bases = jnp.broadcast_to(knobs["seed"], seeds.shape)

    def gumbel(base: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(base), seed), position)
        return jax.random.gumbel(key, scores.shape[1:])

    # The argmax of scores plus Gumbel noise is a draw from their softmax.
    noisy = filtered + jax.vmap(gumbel)(bases, seeds, positions)
    return jnp.argmax(jnp.where(temperature > 0, noisy, scores), axis=-1)


def _column(knob: np.generic | jax.Array) -> jax.Array:
    """[B, 1], or [1, 1] of a scalar."""
    return jnp.reshape(jnp.asarray(knob), (-1, 1))


def restrict(scores: jax.Array, knobs: Knobs) -> jax.Array:
    """Scores float32 [B, V] with -inf where top-k, top-p and min-p forbid a token.

    Tokens that tie with the last allowed one are allowed too. A filter that no row uses costs nothing.
    """
    top_k, top_p, min_p = (_column(knobs[name]) for name in ("top_k", "top_p", "min_p"))

    def apply_if(used, keep: Callable, scores):
        change = lambda scores: jnp.where(used, keep(scores), scores)  # noqa: E731
        return jax.lax.cond(jnp.any(used), change, lambda scores: scores, scores)

    scores = apply_if(top_k > 0, lambda x: _keep_top(x, jnp.ones_like(x), top_k), scores)
    scores = apply_if(top_p < 1, lambda x: _keep_top(x, jax.nn.softmax(x, axis=-1), top_p), scores)

    def keep_likely(scores: jax.Array) -> jax.Array:
        limit = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(min_p)
        return jnp.where(scores >= limit, scores, -jnp.inf)

    return apply_if(min_p > 0, keep_likely, scores)


def _keep_top(scores: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Keeps the fewest highest scores whose weights sum to `target` at least, or all."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)  # 0, as of a top_p of 1e-50, would keep none
    # Unsigned integers in the order of the floats: flip the sign bit, of a negative float every bit.
    ranks = jnp.where(bits >= sign, ~bits, bits | sign)

    def refine(step, threshold):
        trial = threshold | (sign >> step.astype(jnp.uint32))
        above = jnp.sum(jnp.where(ranks >= trial, weights, 0), axis=-1, keepdims=True)
        return jnp.where(above >= target, trial, threshold)

    # The highest threshold that leaves enough, bit by bit from the top.
    threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros_like(ranks[:, :1]))
    return jnp.where(ranks >= threshold, scores, -jnp.inf)
