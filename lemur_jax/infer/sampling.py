"""How the next token is chosen from the logits.

Axis legend: B batch, V vocabulary.

The filters and their order (repetition penalty, temperature, top-k, top-p, min-p) are those of
`transformers`. Thresholds are found by bisection over the bits of the logits: exact, without a sort,
and as cheap on a vocabulary that is cut over devices.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError

# Scalars by name, of NumPy so that the hosts of a pod can each give them to one program.
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
      seed: with a sequence's own seed and a position it determines the draw there, whatever else is
        in the batch.

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
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1: off)"),
            "seed": (0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
        }
        for name, (fine, rule) in ranges.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {rule}")

    def knobs(self) -> Knobs:
        """What `choose` reads: the filters that do something, and for a draw the seed.

        The keys decide what is compiled, the values do not.
        """
        knobs: Knobs = {}
        if self.repetition_penalty != 1:
            knobs["repetition_penalty"] = np.float32(self.repetition_penalty)
        if self.temperature > 0:
            knobs |= {"temperature": np.float32(self.temperature), "seed": np.uint32(self.seed)}
            for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
                if getattr(self, name) != off:
                    knobs[name] = np.float32(getattr(self, name))
        return knobs


def choose(
    logits: jax.Array,
    knobs: Knobs,
    seeds: jax.Array,
    positions: jax.Array,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each sequence and its log-probability.

    Args:
      logits: float32 [B, V].
      knobs: from `Sampling.knobs`.
      seeds: uint32 [B].
      positions: int32 [B], of the chosen token in its sequence.
      seen: bool [B, V], tokens in the prompt or already generated; needed for a repetition penalty.

    Returns:
      int32 [B], and float32 [B] under the model's own distribution, before any filter, in nats.
    """
    scores = logits
    if "repetition_penalty" in knobs:
        penalty = knobs["repetition_penalty"]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if "temperature" in knobs:
        scores = restrict(scores / knobs["temperature"], knobs)
        # The argmax of scores plus Gumbel noise is a draw from their softmax.
        scores += jax.vmap(functools.partial(_gumbel, knobs["seed"], scores.shape[1:]))(seeds, positions)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _gumbel(base: jax.Array, shape: tuple[int, ...], seed: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(base), seed), position)
    return jax.random.gumbel(key, shape)


def restrict(scores: jax.Array, knobs: Knobs) -> jax.Array:
    """Scores float32 [B, V] with -inf where top-k, top-p and min-p forbid a token.

    Tokens that tie with the last allowed one are allowed too.
    """
    if "top_k" in knobs:
        scores = _keep_top(scores, jnp.ones_like(scores), knobs["top_k"])
    if "top_p" in knobs:
        scores = _keep_top(scores, jax.nn.softmax(scores, axis=-1), knobs["top_p"])
    if "min_p" in knobs:
        limit = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(knobs["min_p"])
        scores = jnp.where(scores >= limit, scores, -jnp.inf)
    return scores


def _keep_top(scores: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Keeps the fewest highest scores whose weights sum to `target` at least, or all."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats: flip the sign bit, of a negative float every bit.
    ranks = jnp.where(bits >= sign, ~bits, bits | sign)

    def refine(step, threshold):
        trial = threshold | (sign >> step.astype(jnp.uint32))
        above = jnp.sum(jnp.where(ranks >= trial, weights, 0), axis=-1, keepdims=True)
        return jnp.where(above >= target, trial, threshold)

    # The highest threshold that leaves enough, bit by bit from the top.
    threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros_like(ranks[:, :1]))
    return jnp.where(ranks >= threshold, scores, -jnp.inf)
