"""Checkpoints through Orbax: asynchronous, committed or invisible, self-describing, verified.

A checkpoint directory holds one folder a step, each with the items `params`, `optimizer` (not in an
imported one) and `metadata`: the model's shape, the run's config, the tokenizer's files, the digests of
the data, and shape, dtype and digest of every leaf. Nothing else is needed to resume, export or generate,
and nothing is taken from a checkpoint that does not agree with it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from lemur_jax.checkpoint.echoes import silence_echoes
from lemur_jax.checkpoint.leaves import check_wanted, describe, named
from lemur_jax.checkpoint.metadata import Damaged, SaveLateJson, make_metadata, seal, tokenizer_files
from lemur_jax.checkpoint.opening import open_manager
from lemur_jax.checkpoint.reading import (
    measured,
    metadata_of,
    naming_others,
    read_metadata,
    restore_item,
    restore_params,
    steps_in,
)
from lemur_jax.checkpoint.remains import let_go, newest_save, release, remove_half_written
from lemur_jax.checkpoint.snapshot import snapshot
from lemur_jax.checkpoint.streaming import BY_LAYER, Streamed, streamed, until
from lemur_jax.checkpoint.together import SaveBarriers, why
from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import absolute, is_object_store
from lemur_jax.telemetry.progress import duration

__all__ = (
    "Checkpoints",
    "Damaged",
    "make_metadata",
    "naming_others",
    "read_metadata",
    "restore_params",
    "steps_in",
    "tokenizer_files",
    "write_params",
)


# So long may a save wait for the one before it without a word.
_LONG_WAIT_SECONDS = 1.0
# And so long before it is said that it still waits.
_WORD_SECONDS = 60.0
_LOOK_SECONDS = 0.05  # between two looks whether an import is written
# Copying a large checkpoint inside an object store.
_SET_ASIDE_SECONDS = 3600.0
# Orbax's mark of a finished checkpoint where directories cannot be renamed.
_COMMITTED = "commit_success.txt"


class Checkpoints:
    """The checkpoints of one run.

    Args:
      path: directory, local or gs://; made if missing.
      keep: newest checkpoints that are kept; None: all.
      keep_every: besides, checkpoints of steps that this divides; 0: none.
      keep_best: besides, so many with the lowest loss given to `save`.
      max_failures: saves that may fail in a row before `save`, `wait` and `poll` raise.
      broadcast: see `open_manager`; for restores.
      say: gets a line for every failure.
    """

    def __init__(
        self,
        path: epath.PathLike,
        keep: int | None = None,
        *,
        keep_every: int = 0,
        keep_best: int = 0,
        max_failures: int = 1,
        broadcast: bool = False,
        say: Callable[[str], None] = print,
    ):
        silence_echoes()
        self.path = absolute(path)
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        if keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        self._barriers = SaveBarriers()
        self._manager = open_manager(
            self.path,
            create=True,
            barriers=self._barriers,
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_loss if keep_best else None,  # without it, Orbax does not store the loss
            best_mode="min",
        )
        self._broadcast = broadcast
        self._max_failures = max_failures
        self._failures = 0
        self._pending: int | None = None  # the step whose save is not known to have ended
        self._say = say

    def latest_step(self) -> int | None:
        """The newest committed step, None without one; it may be damaged."""
        return self._manager.latest_step()

    @property
    def failed(self) -> bool:
        """Whether the last save that ended has failed: the next should not wait for its turn."""
        return self._failures > 0

    def save(
        self, step: int, params: Any, optimizer: Any, metadata: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Starts saving; returns once the arrays are copied to the host, and may be donated.

        Digests are computed beside the write. A save that fails, now or later, is reported and does not raise before
        `max_failures` in a row.

        Args:
          step: updates done.
          params: the parameters.
          optimizer: the optimizer's state.
          metadata: as `make_metadata` gives it.
          loss: held-out loss, by which `keep_best` chooses.

        Raises:
          UserError: as `wait` does.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > _LONG_WAIT_SECONDS:
            self._say(
                f"the save of step {step} waited {waited:.0f} s for the one before it: the storage is slower than"
                " config.checkpoint.every_steps or every_minutes asks for"
            )
        params, optimizer = snapshot((params, optimizer))
        trees = {"params": params, "optimizer": optimizer}
        measures = {item: measured(tree, f"step {step} is not saved: {item}") for item, tree in trees.items()}

        def sealed() -> dict[str, Any]:
            return seal(metadata, {item: result() for item, result in measures.items()})

        # A tree mapped by path: stacked matrices are cut by layer, so that an export is bounded.
        save_args = jax.tree_util.tree_map_with_path(_save_args, params)
        self._barriers.begin()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params, save_args=save_args),
                    optimizer=ocp.args.PyTreeSave(optimizer),
                    metadata=SaveLateJson(sealed, on_every_host=True),
                ),
                metrics=None if loss is None else {"loss": loss},
                force=True,
            )
            self._barriers.begun()
            self._pending = step
        except Exception as error:  # full disks and refused writes come in many classes
            known = self._barriers.fail(error)
            self._count_failure(step, error, fatal=not known)

    def wait(self) -> None:
        """Until no save is going on.

        Raises:
          UserError: a leaf was not finite and the checkpoint is not there, or too many saves failed.
        """
        if self._pending is None:
            return
        try:
            with self._told_again_and_again(self._pending):
                self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._failures, self._pending = 0, None
        except UserError as error:  # of the values themselves, on all hosts
            self._forget_failed(error)
            raise
        except Exception as error:
            self._count_failure(self._pending, error)

    @contextlib.contextmanager
    def _told_again_and_again(self, step: int) -> Iterator[None]:
        """Storage that hangs is not waited for in silence."""
        done = threading.Event()

        def tell() -> None:
            began = time.monotonic()
            while not done.wait(_WORD_SECONDS):
                waited = duration(time.monotonic() - began)
                self._say(
                    f"waiting for the checkpoint of step {step} to be written to {self.path}: {waited} so far"
                )

        thread = threading.Thread(target=tell, name="checkpoint-words", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def poll(self) -> None:
        """Reports, and raises, as `wait` does, but does not wait for a save that goes on."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def _count_failure(self, step: int, error: Exception, fatal: bool = False) -> None:
        self._failures += 1
        self._forget_failed(error)
        kept = self._manager.latest_step()
        reason = why(error)
        message = (
            f"the checkpoint of step {step} could not be saved in {self.path} (failure {self._failures} of at"
            f" most {self._max_failures} in a row): {reason}; the newest one there is of step {kept}"
        )
        if fatal:
            raise UserError(f"{message}. Other hosts wait for this one: run the same command again")
        if self._failures >= self._max_failures:
            raise UserError(f"{message}. Make room or mend the storage, then run the same command again")
        self._say(f"WARNING: {message}. It will be tried again")

    def _forget_failed(self, error: BaseException | None) -> None:
        """What a failed save has left takes room that the next attempt may need, and the step is not there."""
        self._pending = None
        let_go(error, self._manager)
        if hosts.is_primary():
            remove_half_written(self.path, self._barriers.save)
        self._manager.reload()

    def restore(self, step: int, params: Any, optimizer: Any, fresh: bool = False) -> tuple[Any, Any]:
        """Reads both trees onto the shardings of the given abstract trees, and verifies them.

        Args:
          fresh: where the stored optimizer is another one, None is returned for it.

        Raises:
          Damaged: something is not what was saved.
          UserError: a leaf is missing, unexpected, or of another shape or dtype than wanted.
        """
        reader = open_manager(self.path, broadcast=self._broadcast)
        metadata = metadata_of(reader, self.path, step)
        wanted = {"params": params, "optimizer": optimizer}
        where = f"checkpoint {self.path}/{step}"
        check_wanted(metadata["leaves"].get("params"), params, f"{where}, params")
        try:
            check_wanted(metadata["leaves"].get("optimizer"), optimizer, f"{where}, optimizer")
        except UserError as error:
            if not fresh:
                raise UserError(f"{error}; config.checkpoint.other_optimizer='fresh' starts anew") from error
            self._say(f"WARNING: {error}: the optimizer starts anew at step {step}")
            del wanted["optimizer"]
        restored = {
            item: restore_item(reader, self.path, step, item, tree, metadata["leaves"][item], self._broadcast)
            for item, tree in wanted.items()
        }
        return restored["params"], restored.get("optimizer")

    def restore_newest(
        self,
        params: Any,
        optimizer: Any,
        check: Callable[[Mapping[str, Any]], None],
        at_most: int | None = None,
        fresh: bool = False,
    ) -> tuple[int, Any, Any] | None:
        """(step, params, optimizer) of the newest checkpoint that is whole; None where there is none.

        Damaged ones are named and set aside, so that they neither count as kept nor block their step.

        Args:
          params: abstract tree with shardings.
          optimizer: likewise.
          check: is given the checkpoint's metadata first and may refuse it.
          at_most: checkpoints of later steps are left alone; None: there are none such.
          fresh: as in `restore`.

        Raises:
          UserError: every checkpoint is damaged, or the newest whole one does not fit.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        steps = [step for step in steps if at_most is None or step <= at_most]
        damaged: dict[int, Damaged] = {}
        for step in steps:
            try:
                check(metadata_of(open_manager(self.path), self.path, step))
                restored = self.restore(step, params, optimizer, fresh)
            except Damaged as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                aside = self._set_aside(bad)
                self._say(
                    f"WARNING: {error}. Going on from step {step}: {bad - step} steps are lost and will be"
                    f" trained again; the damaged checkpoint is {aside}"
                )
            return step, *restored
        if damaged:
            raise UserError(
                f"no checkpoint in {self.path} is whole; {damaged[steps[0]]}. Put back a copy, or start in a"
                " new --workdir"
            )
        return None

    def _set_aside(self, step: int) -> str:
        """Takes a damaged step out of the sequence; says what became of it."""
        source, aside = self.path / str(step), self.path / f"damaged-{step}"
        if hosts.is_primary():
            aside.rmtree(missing_ok=True)
            _move(source, aside)
        hosts.wait_for_all("set aside", _SET_ASIDE_SECONDS)
        self._manager.reload()
        return f"kept as {aside}"

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            # Threads of a save that has failed may raise once more what is reported already.
            with contextlib.suppress(Exception) if self.failed else contextlib.nullcontext():
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _move(source: epath.Path, target: epath.Path) -> None:
    """Renames a checkpoint; object stores rename no directories, there it is copied and then deleted."""
    if not is_object_store(source):
        source.rename(target)
        return
    _copy(source, target)
    # First what makes it a checkpoint: killed from here on, the copy is the only one and is not made anew.
    (source / _COMMITTED).unlink(missing_ok=True)
    source.rmtree()


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    children = {child: child.is_dir() for child in source.iterdir()}
    with ThreadPoolExecutor(32) as pool:  # one stream is far slower than a store
        list(pool.map(lambda file: file.copy(target / file.name), (c for c in children if not children[c])))
    for directory in (c for c in children if children[c]):
        _copy(directory, target / directory.name)


def _loss(metrics: Mapping[str, Any]) -> float:
    return metrics["loss"]


def _save_args(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
    # Norm scales are small: cut by layer and by device they would be crumbs.
    stacked = getattr(path[0], "key", None) == "layers" and leaf.ndim > 2
    return BY_LAYER if stacked else ocp.SaveArgs()


def write_params(path: epath.PathLike, params: Any, metadata: Mapping[str, Any], step: int = 0) -> None:
    """A checkpoint of parameters alone, as an import makes it.

    Args:
      path: checkpoint directory to make.
      params: tree of `Streamed` leaves, written piece by piece, or of arrays.
      metadata: as `make_metadata` gives it.
      step: of the checkpoint.
    """
    silence_echoes()
    stopped = threading.Event()
    params = jax.tree.map(
        lambda leaf: until(stopped, leaf if isinstance(leaf, Streamed) else streamed(np.asarray(leaf))),
        params,
    )
    save_args = jax.tree.map(lambda leaf: BY_LAYER if leaf.pieces > 1 else ocp.SaveArgs(), params)

    def sealed() -> dict[str, Any]:
        leaves = {name: describe(leaf, leaf.digest.value) for name, leaf in named(params).items()}
        return seal(metadata, {"params": leaves})

    with open_manager(absolute(path), create=True, streaming=True) as manager:
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params, save_args=save_args), metadata=SaveLateJson(sealed)
        )
        try:
            manager.save(step, args=items)
            while manager.is_saving_in_progress():
                # Orbax's wait would not hear of a signal that the system gives to another thread.
                time.sleep(_LOOK_SECONDS)
            manager.wait_until_finished()
        except BaseException:  # Ctrl-C, too, after which nobody wants to wait for the rest
            stopped.set()
            release(newest_save())
            with contextlib.suppress(Exception):
                manager.wait_until_finished()
            raise
