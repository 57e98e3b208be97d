"""The checkpoints of one run: where it starts, when it saves, and what it rolls back to."""

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lemur_jax.checkpoint.config import CheckpointConfig
from lemur_jax.checkpoint.manager import Checkpoints
from lemur_jax.cluster.hosts import any_host
from lemur_jax.common.errors import Diverged, UserError
from lemur_jax.data.loader import Loader
from lemur_jax.train import state as states
from lemur_jax.train.initial import InitialParams
from lemur_jax.train.spikes import rollback_state, rollback_target, spike_state
from lemur_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# Between two attempts to save the last step.
_RETRY_SECONDS = 10.0


class Saves(contextlib.AbstractContextManager):
    """A context in which `WORKDIR/checkpoints` is open.

    `metadata` goes into every checkpoint, with the `Origins` of the run and its target tokens so far; `initial` gives
    the first parameters and those that are frozen; `last` is the last update; with `rollouts` of `lemur rl`,
    checkpoints hold the episodes that it has sampled ahead. `held_out` names the text of each scored task: losses on
    other texts, as after a change of `eval.max_rows`, are not compared.
    """

    def __init__(
        self,
        options: CheckpointConfig,
        workdir: epath.Path,
        metadata: dict[str, Any],
        initial: InitialParams,
        *,
        last: int,
        held_out: Mapping[str, str],
        rollouts: Any = None,
    ):
        self._options, self._program = options, initial.program
        self._metadata = {**metadata, "origins": {}}
        self.tokens: Mapping[str, int] = {}  # what `save` got with the checkpoint that `first_state` read
        self._initial, self._last, self._rollouts = initial, last, rollouts
        self._held_out = held_out
        self._checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=options.keep,
            keep_every=options.keep_every,
            keep_best=held_out.get(options.keep_best, ""),
            max_failures=options.max_failures,
            broadcast=options.broadcast,
        )
        self._early = False  # a save failed or is late: the next is made out of turn
        self._saved_at = time.monotonic()

    def __exit__(self, *_) -> None:
        self._checkpoints.close()

    def finished(self) -> int:
        """The newest step whose checkpoint is complete, 0 without one; waits, as `save` does."""
        self._checkpoints.wait()
        return self._checkpoints.finished

    def first_state(self, at_most: int | None = None, frozen: Any = None) -> tuple[TrainState, int]:
        """The state and the step of the newest intact checkpoint, or a fresh state and 0.

        Checkpoints after `at_most` are ignored; `frozen` are the frozen parameters, if they are loaded already.
        Raises UserError if no checkpoint is intact, or they are of another model, optimizer or data.
        """
        program, fresh = self._program, self._options.other_optimizer == "fresh"
        abstract = (program.state.params, program.state.optimizer)
        stored: Mapping[str, Any] = {}

        def check(metadata: Mapping[str, Any]) -> None:
            nonlocal stored
            check_data(self._checkpoints.path, self._metadata["data"], metadata)
            stored = metadata

        restored = self._checkpoints.restore_newest(*abstract, check, at_most, fresh)
        step, params, optimizer = restored or (0, None, None)
        if self._rollouts:
            self._rollouts.restore(stored.get("episodes"))
        self.tokens, origins = stored.get("tokens", {}), self._metadata["origins"]
        origins |= stored.get("origins", {})
        if params is None:
            params = self._initial.params(origins)
        if frozen is None:
            frozen = self._initial.frozen(origins)
        if optimizer is None:
            return states.start(params, program.optimizer, program.state, step, frozen), step
        counter = jax.device_put(np.int32(step), program.state.step.sharding)
        return TrainState(step=counter, params=params, optimizer=optimizer, frozen=frozen), step

    def poll(self) -> None:
        """Finds out whether a save has failed or is late, so that the next is made early; all hosts call it."""
        self._checkpoints.poll()
        minutes = self._options.every_minutes
        late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        with jax.transfer_guard("allow"):  # of several hosts' flags
            self._early = any_host(late or self._checkpoints.failed)

    def due(self, step: int, *, force: bool = False) -> bool:
        """Whether to save after an update; the same on all hosts. `force`: at any step."""
        return force or self._early or step == self._last or due(step, self._options.every_steps)

    def save(
        self, step: int, state: TrainState, losses: Mapping[str, float], tokens: Mapping[str, int], stop: bool
    ) -> None:
        """Saves the state after `step` updates in the background.

        It stores `losses`, the held-out losses by task, if any, and `tokens`, the target tokens so far by their key in
        a record.

        If no update follows, after the last step or with `stop`, it returns when everything is written, and retries
        until that succeeds. Raises UserError if too many saves failed, or a leaf is not finite.
        """
        with jax.transfer_guard("allow"):  # Orbax copies to the host
            scored = {self._held_out[task]: losses[task] for task in losses}
            metadata = {**self._metadata, "tokens": tokens}
            if self._rollouts:
                metadata["episodes"] = self._rollouts.pending()
            self._checkpoints.save(step, state.params, state.optimizer, metadata, scored)
            self._saved_at, self._early = time.monotonic(), False
            if not stop and step != self._last:
                return
            self._checkpoints.wait()
            while self._checkpoints.failed:
                time.sleep(_RETRY_SECONDS)
                self._checkpoints.save(step, state.params, state.optimizer, metadata, scored)
                self._checkpoints.wait()

    def roll_back(self, state: TrainState, loader: Loader, most: int) -> tuple[TrainState, int]:
        """The state with the parameters of the last regular checkpoint before the skips, and its step.

        If that checkpoint is missing because a save failed, its parameters are computed again from an older one.
        `state` must not be used afterwards. Raises UserError: the run was rolled back more than `most` times.
        """
        rule = spike_state(state.optimizer)
        assert rule is not None
        counters = (state.step, rule.in_a_row, rule.rollbacks, rule.rolled_back_at)
        done, in_a_row, rollbacks, last_rollback = map(int, jax.device_get(counters))
        if rollbacks >= most:
            raise Diverged(
                f"step {done}: {in_a_row} updates in a row were skipped, and the run was rolled back"
                f" {rollbacks} times already (config.spikes.max_rollbacks); look at the documents of the skips in"
                " metrics.jsonl, or lower config.optimizer.learning_rate, in a new --workdir"
            )
        target = rollback_target(done, in_a_row, self._options.every_steps, last_rollback)
        rollouts = self._rollouts
        if rollouts:
            rollouts.restore(None)  # waits
        self._checkpoints.wait()
        schedule = state.optimizer._replace(inner_state=None)
        for leaf in jax.tree.leaves((state.params, rule)):
            leaf.delete()  # two states may be more than the devices hold
        with jax.transfer_guard("allow"):
            older, at = self.first_state(at_most=target, frozen=state.frozen)
        if at < last_rollback:
            raise UserError(
                f"step {done}: cannot roll back to step {target}: no whole checkpoint from step {last_rollback} on is"
                " left"
            )
        if at < target:
            logger.warning(
                "step %d: updates %d to %d are made again, as no later checkpoint is left", done, at, target
            )
        for step in range(at, target):
            older, _ = (
                rollouts.update(step, older) if rollouts else self._program.step(older, loader.batch(step))
            )
        if rollouts:
            rollouts.restore(None)  # the next update samples with what was restored
        return rollback_state(schedule, older, state.step, done, rollbacks + 1), target


def check_data(path: epath.Path, ours: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """UserError: a checkpoint in `path`, whose metadata is `stored`, is of data with other digests than `ours`."""
    stored_data = stored["data"]
    # Sources that were added since have had no share until here (`train.workdir.check_changes`).
    if changed := sorted(task for task in stored_data if stored_data[task] != ours.get(task)):
        raise UserError(
            f"{path} was trained on other data: {', '.join(changed)} changed since; put back what was there, or start"
            " in a new --workdir"
        )


def due(step: int, every: int) -> bool:
    """Whether something with this period in updates (0: never) is due after this update."""
    return every > 0 and step % every == 0
