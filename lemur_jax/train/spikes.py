"""Loss spikes: updates that are skipped by rule, and undone after several in a row; off by default.

The rule looks at the global norm of the gradient before clipping: not finite, or above `factor` × the
median of the last `window` norms that were accepted. All that it remembers is part of the optimizer's
state and so of every checkpoint: what is skipped is a function of the run alone, on any number of hosts,
and not of where it was killed.

A skipped update leaves parameters and moments as they are; the step, the data and the learning rate's
schedule go on. A rollback takes parameters, moments and memory from the last regular checkpoint before
the skips; step, data and schedule go on here too: the batches in between are not trained on again, as in
Chowdhery et al. 2022, section 5.1.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lemur_jax.train.state import TrainState


class SpikeState(NamedTuple):
    """State of `skip_spikes`."""

    inner: Any  # of the transformation inside
    norms: Any  # float32 [window], accepted gradient norms; the oldest is overwritten
    accepted: Any  # int32 [], number of accepted norms
    limit: Any  # float32 [], the norm above which the last update was to be skipped; 0: no limit yet
    in_a_row: Any  # int32 [], skips up to now without an accepted update between them
    rollbacks: Any  # int32 [], number of rollbacks
    rolled_back_at: Any  # int32 [], the step of the last one; 0: never


def skip_spikes(
    inner: optax.GradientTransformation, factor: float, window: int
) -> optax.GradientTransformation:
    """`inner`, but an update whose gradient norm is above `factor` × the running median changes nothing.

    The median is over `window` accepted norms; before there are that many, only a norm that is not finite is a spike.
    """

    def init(params: Any) -> SpikeState:
        zero = jnp.int32(0)
        return SpikeState(
            inner=inner.init(params),
            norms=jnp.zeros(window, jnp.float32),
            accepted=zero,
            limit=jnp.float32(0),
            in_a_row=zero,
            rollbacks=zero,
            rolled_back_at=zero,
        )

    def update(gradient: Any, state: SpikeState, params: Any = None) -> tuple[Any, SpikeState]:
        norm = optax.tree.norm(gradient).astype(jnp.float32)
        limit = jnp.where(state.accepted >= window, factor * jnp.median(state.norms), 0.0)
        skip = ~jnp.isfinite(norm) | ((limit > 0) & (norm > limit))
        changes, new_inner = inner.update(gradient, state.inner, params)
        return jax.tree.map(lambda change: jnp.where(skip, 0, change), changes), SpikeState(
            inner=jax.tree.map(lambda new, old: jnp.where(skip, old, new), new_inner, state.inner),
            norms=jnp.where(skip, state.norms, state.norms.at[state.accepted % window].set(norm)),
            accepted=state.accepted + ~skip,
            limit=limit,
            in_a_row=jnp.where(skip, state.in_a_row + 1, 0),
            rollbacks=state.rollbacks,
            rolled_back_at=state.rolled_back_at,
        )

    return optax.GradientTransformation(init, update)


def spike_state(optimizer_state: Any) -> SpikeState | None:
    """The rule's part of an optimizer state; None where the rule is off."""
    inner = optimizer_state.inner_state
    return inner if isinstance(inner, SpikeState) else None


def rollback_target(step: int, in_a_row: int, every_steps: int, rolled_back_at: int) -> int:
    """The step to whose parameters to go back: of the last regular checkpoint before the first skip.

    Checkpoints out of turn do not count: whether they are there depends on signals and clocks. Of `step` updates the
    last `in_a_row` are skipped. The run was saved at `rolled_back_at`, and does not go back further.
    """
    accepted = step - in_a_row
    regular = accepted - accepted % every_steps if every_steps else 0
    return max(regular, rolled_back_at)


def rollback_state(counters: Any, good: TrainState, step: jax.Array, done: int, rollbacks: int) -> TrainState:
    """The state of `step` with the parameters, moments and remembered norms of `good`.

    `counters` is the optimizer's state at `step`, for the schedule's counters; `done` is the value of `step`;
    `rollbacks` counts this one too.
    """

    def scalar(value: int, like: jax.Array) -> jax.Array:
        return jax.device_put(np.int32(value), like.sharding)

    rule = good.optimizer.inner_state
    restored = rule._replace(
        in_a_row=scalar(0, rule.in_a_row),
        rollbacks=scalar(rollbacks, rule.rollbacks),
        rolled_back_at=scalar(done, rule.rolled_back_at),
    )
    return dataclasses.replace(good, step=step, optimizer=counters._replace(inner_state=restored))
