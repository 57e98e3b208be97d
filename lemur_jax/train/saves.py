"""The checkpoints of one run: where it starts, when it saves, and where it goes back to."""

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from lemur_jax.checkpoint.config import CheckpointConfig
from lemur_jax.checkpoint.local import LocalCheckpoints, directory_of
from lemur_jax.checkpoint.manager import Checkpoints
from lemur_jax.cluster.hosts import any_host, is_primary, wait_for_all
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.data.loader import Loader
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import state as states
from lemur_jax.train.initial import initial_params
from lemur_jax.train.spikes import memory, rollback_target, rolled_back
from lemur_jax.train.state import TrainState
from lemur_jax.train.step import Program

# Between two attempts to save the last step.
_RETRY_SECONDS = 10.0


class Saves:
    """A context in which `WORKDIR/checkpoints` is open, and this host's local checkpoints where the run has them.

    Args:
      config: a run config.
      workdir: of the run.
      program, tokenizer: the run's.
      metadata: goes into every checkpoint (`checkpoint.manager.make_metadata`).
      say: gets what a person wants to read.

    Raises:
      UserError: `config.checkpoint` asks for what cannot be.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: epath.Path,
        program: Program,
        tokenizer: Tokenizer,
        metadata: dict[str, Any],
        say: Callable[[str], None],
    ):
        self._config = config
        self._program, self._tokenizer = program, tokenizer
        self._metadata = metadata
        self._say = say
        self._checkpoints = _open(config.checkpoint, workdir, say)
        self._local = _open_local(config.checkpoint, workdir, program, say)
        self._only_locally: int | None = None  # the step that is due locally alone
        self._saved_at = time.monotonic()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Saves":
        self._stack.enter_context(self._checkpoints)
        if self._local:
            self._stack.enter_context(self._local)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def first_state(self, at_most: int | None = None) -> tuple[TrainState, int]:
        """The state of the newest checkpoint that is whole and its step, or a fresh state and 0.

        Args:
          at_most: later checkpoints are left alone; None: there are none such.

        Raises:
          UserError: no checkpoint is whole, or they are of another model, optimizer or data.
        """
        program, fresh = self._program, self._config.checkpoint.other_optimizer == "fresh"
        wanted = (program.state.params, program.state.optimizer)
        found: tuple[int, Any, Any] | None = None
        if self._local and at_most is None:
            newest = self._checkpoints.latest_step() or 0
            found = self._local.restore_newest(*wanted, self._check_data, newer_than=newest)
            if found:
                self._say(
                    f"step {found[0]} is taken from local checkpoints; the newest in the workdir is {newest}"
                )
        if found is None:
            found = self._checkpoints.restore_newest(*wanted, self._check_data, at_most, fresh)
        if found is None:
            params = initial_params(self._config.init, self._config.seed, self._tokenizer, program)
            return states.start(params, program.optimizer, program.state), 0
        step, params, optimizer = found
        if optimizer is None:
            return states.start(params, program.optimizer, program.state, step), step
        counter = jax.device_put(jax.numpy.int32(step), program.state.step.sharding)
        return TrainState(step=counter, params=params, optimizer=optimizer), step

    def _check_data(self, stored: Mapping[str, Any]) -> None:
        theirs, ours = stored["data"], self._metadata["data"]
        if theirs != ours:
            changed = sorted(task for task in ours if theirs.get(task) != ours[task])
            raise UserError(
                f"{self._checkpoints.path} was trained on other data: the store of"
                f" {', '.join(changed) or 'a task'} has changed since; put the old stores back, or start in a"
                " new --workdir"
            )

    def due(self, step: int) -> bool:
        """Whether to save after this update, if only locally; the same on all hosts, which must all ask.

        Out of turn, too: where the last save failed or is too long ago, looked at every `log.every_steps`.
        """
        if self._due_in_workdir(step):
            return True
        if self._local and due(step, self._config.checkpoint.local_every_steps):
            self._only_locally = step
            return True
        return False

    def _due_in_workdir(self, step: int) -> bool:
        if due(step, self._config.checkpoint.every_steps):
            return True
        if not due(step, self._config.log.every_steps):
            return False
        self._checkpoints.poll()
        minutes = self._config.checkpoint.every_minutes
        late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        return any_host(late or self._checkpoints.failed)

    def needs_loss(self, step: int) -> bool:
        """Whether the save of this step is to be compared with others by its held-out loss (`keep_best`)."""
        return bool(self._config.checkpoint.keep_best) and step != self._only_locally

    def save(self, step: int, state: TrainState, losses: Mapping[str, float], to_the_end: bool) -> None:
        """Saves in the background; locally alone where no more was due.

        Args:
          losses: held-out losses at this step by task, as far as there are any.
          to_the_end: wait until all is written and repeat it while it fails; too many failures raise.
        """
        if self._local and step == self._only_locally:
            self._local.save(step, state.params, state.optimizer, self._metadata)
            return
        best = losses.get(self._config.checkpoint.keep_best)
        self._checkpoints.save(step, state.params, state.optimizer, self._metadata, best)
        self._saved_at = time.monotonic()
        if not to_the_end:
            return
        self._checkpoints.wait()
        while self._checkpoints.failed:
            time.sleep(_RETRY_SECONDS)
            self._checkpoints.save(step, state.params, state.optimizer, self._metadata, best)
            self._checkpoints.wait()
        if self._local:
            self._local.discard()

    def roll_back(self, state: TrainState, loader: Loader) -> tuple[TrainState, int]:
        """The state with the parameters of the last regular checkpoint before the skips, and its step.

        Where that checkpoint is not there, a save having failed, its parameters are made again from an older
        one. `state` is used up.

        Raises:
          UserError: the run was rolled back too often.
        """
        rule = memory(state.optimizer)
        assert rule is not None
        done, in_a_row = int(state.step), int(rule.in_a_row)
        rollbacks, before = int(rule.rollbacks), int(rule.rolled_back_at)
        if rollbacks >= self._config.spikes.max_rollbacks:
            raise UserError(
                f"step {done}: {in_a_row} updates in a row were skipped, and the run was rolled back"
                f" {rollbacks} times already (config.spikes.max_rollbacks); look at the documents of the skips in"
                " metrics.jsonl, or lower config.optimizer.learning_rate, in a new --workdir"
            )
        target = rollback_target(done, in_a_row, self._config.checkpoint.every_steps, before)
        self._checkpoints.wait()
        counters = state.optimizer._replace(inner_state=None)
        for leaf in jax.tree.leaves((state.params, rule)):
            leaf.delete()  # two states may be more than the devices hold
        good, at = self.first_state(at_most=target)
        if at < before:
            raise UserError(
                f"step {done}: cannot roll back to step {target}: no whole checkpoint from step {before} on is"
                " left"
            )
        for step in range(at, target):
            good, _ = self._program.step(good, loader.batch(step))
        return rolled_back(counters, good, state.step, rollbacks + 1), target


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many updates (0: never) is done after this one."""
    return every > 0 and step % every == 0


def _open(options: CheckpointConfig, workdir: epath.Path, say: Callable[[str], None]) -> Checkpoints:
    return Checkpoints(
        workdir / "checkpoints",
        keep=options.keep,
        keep_every=options.keep_every,
        keep_best=1 if options.keep_best else 0,
        max_failures=options.max_failures,
        broadcast=options.broadcast,
        say=say,
    )


def _open_local(
    options: CheckpointConfig, workdir: epath.Path, program: Program, say: Callable[[str], None]
) -> LocalCheckpoints | None:
    if not options.local_directory:
        return None
    return LocalCheckpoints(directory_of(options.local_directory, _run_id(workdir)), program.mesh, say)


def _run_id(workdir: epath.Path) -> str:
    """A name of this run and no other: in a workdir that was emptied, the old run's state is not to be found."""
    path = workdir / "run_id"
    if is_primary() and not path.exists():
        temporary = workdir / "run_id.tmp"
        temporary.write_text(secrets.token_hex(8))
        temporary.replace(path)
    wait_for_all("run id")
    return path.read_text()
