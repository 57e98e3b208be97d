"""Checkpoints of a run through Orbax: asynchronous, complete or invisible, self-describing, verified.

A checkpoint directory holds one folder per step with the items `params`, `optimizer` (not in an imported one) and
`metadata`: the model's shape, the run's config, the tokenizer's files, the digests of the data, and shape, dtype and
digest of every leaf. Nothing else is needed to resume, export or generate, and a checkpoint that does not match its
metadata is never used.
"""

import contextlib
import errno
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from lemur_jax.checkpoint.digest import leaf_digests, on_host
from lemur_jax.checkpoint.metadata import Damaged, Leaf, check_leaves, seal
from lemur_jax.checkpoint.reading import open_manager, restore_item, restore_metadata
from lemur_jax.cluster import coordination, hosts
from lemur_jax.cluster.watchdog import end_all_hosts
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import absolute, is_object_store

logger = logging.getLogger(__name__)

_LOG_SECONDS = 60.0  # of waiting for a save, after which it is logged
_LAST_WRITES_SECONDS = 3.0  # for threads of a failed save that still write
_REMOVAL_SECONDS = 60.0  # for what a failed save has written, to which storage may still add files
_SAVE_SECONDS = 24 * 3600  # Orbax's default of 20 minutes fails large saves to slow storage
_SET_ASIDE_SECONDS = 3600.0  # for copying a large checkpoint inside an object store
_COMMITTED = "commit_success.txt"  # Orbax's mark of a finished checkpoint where directories cannot be renamed

# Stacked matrices are stored layer by layer, so that an export reads one layer at a time.
_BY_LAYER = ocp.SaveArgs(shard_axes=(0,))

_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run; all hosts call its methods together.

    A save that fails is reported, and tried again by the caller. With several hosts it ends all processes with status
    75, as Orbax cannot abandon a save on all hosts at once.

    Args:
      path: directory, local or gs://; made if missing.
      keep: number of newest checkpoints to keep; None: all.
      keep_every: also keep steps that this divides; 0: none.
      keep_best: also keep the step with the lowest loss of this name, of those given to `save`; "": none.
      max_failures: consecutive failed saves after which `save`, `wait` and `poll` raise.
      broadcast: see `open_manager`; for restores.
    """

    def __init__(
        self,
        path: epath.PathLike,
        keep: int | None = None,
        *,
        keep_every: int = 0,
        keep_best: str = "",
        max_failures: int = 1,
        broadcast: bool = False,
    ):
        self.path = absolute(path)
        self._several_hosts = jax.process_count() > 1
        self._orbax_barrier = ocp.multihost.get_barrier_sync_fn()
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        loss = partial(_loss, keep_best)
        if keep_best:
            best = {"get_metric_fn": loss, "reverse": True, "n": 1, "keep_checkpoints_without_metrics": False}
            policies.append(checkpoint_managers.BestN(**best))
        self._options = {
            "cleanup_tmp_directories": True,  # of a run that was killed, or of a save that failed
            "preservation_policy": checkpoint_managers.AnyPreservationPolicy(policies),
            "best_fn": loss if keep_best else None,  # without it, Orbax stores no losses
            "best_mode": "min",
            # A directory that cannot be made then raises in `save` itself, and no thread waits for it.
            "async_options": ocp.AsyncOptions(
                timeout_secs=_SAVE_SECONDS,
                create_directories_asynchronously=False,
                barrier_sync_fn=self._barrier if self._several_hosts else None,
            ),
        }
        self._manager = open_manager(self.path, **self._options)
        self._broadcast = broadcast
        self._max_failures = max_failures
        self._failures = 0
        # The newest finished step, which may be damaged; 0: none.
        self.finished = self._manager.latest_step() or 0
        self._pending: int | None = None  # the step of a save that may still be running
        self._threads: set[threading.Thread] = set()  # those of this process before the last save

    @property
    def failed(self) -> bool:
        """Whether the last save has ended and failed: the next should come soon."""
        return self._failures > 0 and self._pending is None

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        metadata: Mapping[str, Any],
        losses: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving the state after `step` updates; returns when digests are computed and arrays copied to the
        host.

        The arrays may then be donated. A save that fails, now or later, is reported by a warning and does not raise
        before `max_failures` in a row. `metadata` is as `make_metadata` returns it, `losses` by name for `keep_best`.

        Raises UserError: a leaf is not finite, and nothing is saved; or as `wait`.
        """
        self.wait()
        trees = {"params": params, "optimizer": optimizer}
        leaves = {
            item: leaf_digests(tree, f"step {step} is not saved: {item}") for item, tree in trees.items()
        }
        params, optimizer = _copy_on_host(params), _copy_on_host(optimizer)
        save_args = jax.tree_util.tree_map_with_path(_save_args, params)
        self._threads = set(threading.enumerate())
        self._pending = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params, save_args=save_args),
                    optimizer=ocp.args.PyTreeSave(optimizer),
                    metadata=ocp.args.JsonSave(seal({**metadata, "step": step}, leaves)),
                ),
                metrics=dict(losses) if losses else None,
                force=True,
            )
        except Exception as error:  # full disks and refused writes come in many classes
            self._fail(step, error)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """`AsyncOptions.barrier_sync_fn`: Orbax's threads call it between the parts of a save, also after an error.

        The other hosts are at an earlier barrier then and would wait there until its time limit.
        """
        failed = threading.current_thread() is not threading.main_thread() and sys.exception()
        if failed and self._pending is not None:
            self._fail(self._pending, failed)
        self._orbax_barrier(key=key, timeout_ms=timeout_ms)

    def wait(self) -> None:
        """Waits until no save is running; UserError: too many saves have failed."""
        if self._pending is None:
            return
        message = "the checkpoint of step %d is not yet written to %s after %g s: waiting for its end"
        slow = threading.Timer(_LOG_SECONDS, logger.info, (message, self._pending, self.path, _LOG_SECONDS))
        slow.daemon = True
        slow.start()
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._failures, self.finished, self._pending = 0, self._pending, None
        except Exception as error:
            self._fail(self._pending, error)
        finally:
            slow.cancel()

    def poll(self) -> None:
        """Reports, and raises, as `wait` does, but does not wait for a save that is running."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def _fail(self, step: int, error: BaseException) -> None:
        self._failures += 1
        self._pending = None
        message = (
            f"the checkpoint of step {step} could not be saved in {self.path} (failure {self._failures} of at"
            f" most {self._max_failures} in a row): {reason_of(error)}"
        )
        if self._several_hosts:
            end_all_hosts(message)
        deadline = time.monotonic() + _LAST_WRITES_SECONDS
        for thread in set(threading.enumerate()) - self._threads:
            with contextlib.suppress(Exception):
                thread.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(Exception):
            self._manager.close()
        self._remove_unfinished()
        # Without the arrays of the failed save. It removes nothing: what it could not remove would fail the next save.
        self._manager = open_manager(self.path, **{**self._options, "cleanup_tmp_directories": False})
        message += (
            f"; the newest one there is of step {self.finished}" if self.finished else "; there is none yet"
        )
        if self._failures >= self._max_failures:
            raise UserError(f"{message}. Free space or repair the storage, then run the same command again")
        logger.warning("%s. It will be tried again", message)

    def _remove_unfinished(self) -> None:
        """Removes what a failed save has written; what cannot be removed now, the next start removes."""
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while time.monotonic() < deadline:
            try:
                for directory in filter(ocp.utils.is_tmp_checkpoint, self.path.iterdir()):
                    directory.rmtree()
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # not of writes that go on meanwhile
                    return
                time.sleep(0.1)

    def restore(self, step: int, params: Any, optimizer: Any, fresh: bool = False) -> tuple[Any, Any]:
        """Reads both trees with the shardings of the given abstract trees, and verifies them.

        With `fresh`, None is returned if the stored optimizer is another one. Raises Damaged: something is not
        what was saved; UserError: a leaf is missing, unexpected, or of another shape or dtype than given.
        """
        reader = open_manager(self.path, broadcast=self._broadcast)
        leaves = restore_metadata(reader, self.path, step)["leaves"]
        trees = {"params": params, "optimizer": optimizer}
        if difference := check_state(leaves, trees, f"checkpoint {self.path}/{step}", fresh):
            logger.warning("%s: the optimizer is reset at step %d", difference, step)
            del trees["optimizer"]
        restored = {
            item: restore_item(reader, self.path, step, item, tree, leaves[item], self._broadcast)
            for item, tree in trees.items()
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
        """(step, params, optimizer) of the newest intact checkpoint; None if there is none.

        Damaged ones are reported and renamed, so that they neither count as kept nor block their step. `check` is given
        the checkpoint's metadata first and may refuse it; steps after `at_most` are ignored; the rest is as in
        `restore`.

        Raises UserError: every checkpoint is damaged, or the newest intact one does not fit.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        steps = [step for step in steps if at_most is None or step <= at_most]
        damaged: dict[int, Damaged] = {}
        for step in steps:
            try:
                check(restore_metadata(open_manager(self.path), self.path, step))
                restored = self.restore(step, params, optimizer, fresh)
            except Damaged as error:
                damaged[step] = error
                continue
            for damaged_step, error in damaged.items():
                logger.warning(
                    "%s. Going on from step %d: %d steps are lost and will be trained again; the damaged checkpoint is"
                    " kept as %s",
                    *(error, step, damaged_step - step, self._set_aside(damaged_step)),
                )
            return step, *restored
        if damaged:
            raise UserError(
                f"no checkpoint in {self.path} is whole; {damaged[steps[0]]}. Put back a copy, or start in a"
                " new --workdir"
            )
        return None

    def _set_aside(self, step: int) -> epath.Path:
        """Renames a damaged step, so that it no longer counts as one, and returns its new path."""
        source, target = self.path / str(step), self.path / f"damaged-{step}"
        if hosts.is_primary():
            target.rmtree(missing_ok=True)
            _move(source, target)
        coordination.barrier("set aside", _SET_ASIDE_SECONDS)
        self._manager.reload()
        return target

    def close(self) -> None:
        """Waits for the save that is running, then ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __exit__(self, *_) -> None:
        self.close()


def check_state(
    leaves: Mapping[str, Mapping[str, Leaf]], wanted: Mapping[str, Any], where: str, fresh: bool
) -> str:
    """How the optimizer's state in a checkpoint differs from the wanted one; "" where it does not.

    UserError: the parameters differ, or that state, unless it is to be made `fresh`.
    """
    check_leaves(leaves.get("params"), wanted["params"], f"{where}, params")
    try:
        check_leaves(leaves.get("optimizer"), wanted["optimizer"], f"{where}, optimizer")
    except UserError as error:
        if not fresh:
            raise UserError(f"{error}; config.checkpoint.other_optimizer='fresh' resets it") from error
        return str(error)
    return ""


def _loss(name: str, metrics: Mapping[str, Any]) -> float:
    """The loss by which Orbax sorts; earlier versions stored one, without a name."""
    loss = metrics.get(name, metrics.get("loss", math.nan))
    return math.inf if math.isnan(loss) else loss


def _save_args(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
    # Norm scales are small: stored by layer and by device they would be many tiny files.
    stacked = getattr(path[0], "key", None) == "layers" and leaf.ndim > 2
    return _BY_LAYER if stacked else ocp.SaveArgs()


def _copy_on_host(tree: Any) -> Any:
    """A copy of arrays of CPU devices, which Orbax would read in place while the next update waits to write there."""
    leaves = jax.tree.leaves(tree)
    return _copy(tree) if leaves and all(map(on_host, leaves)) else tree


def _move(source: epath.Path, target: epath.Path) -> None:
    """Renames a checkpoint; object stores cannot rename directories, there it is copied and then deleted."""
    if not is_object_store(source):
        source.rename(target)
        return
    _copy_files(source, target)
    # First the marker: after a kill from here on, only the copy counts, and it is not made again.
    (source / _COMMITTED).unlink(missing_ok=True)
    source.rmtree()


def _copy_files(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    children = {child: child.is_dir() for child in source.iterdir()}
    with ThreadPoolExecutor(32) as pool:  # one stream is far slower than a store
        list(pool.map(lambda file: file.copy(target / file.name), (c for c in children if not children[c])))
    for directory in (c for c in children if children[c]):
        _copy_files(directory, target / directory.name)
