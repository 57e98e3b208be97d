"""Emergency checkpoints on each host's own disk, by Orbax's peer-to-peer manager.

Every process saves its own shards on a disk (or RAM disk) beside it, which is fast and may be done often. After a
restart each takes them back from there; a host whose disk is new gets them over the network from one that held the
same shards, in another row of the mesh's first axis. They serve the mesh and the hosts that wrote them, and what is
restored is verified like any checkpoint. All others are those of `checkpoint.manager`.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint._src.futures import future, synchronization
from orbax.checkpoint.experimental.emergency.p2p import args as p2p_args
from orbax.checkpoint.experimental.emergency.p2p import checkpoint_manager as p2p
from orbax.checkpoint.experimental.emergency.p2p import constants, options
from orbax.checkpoint.experimental.emergency.path import sync_global_data

from lemur_jax.checkpoint.echoes import silence_echoes
from lemur_jax.checkpoint.leaves import check_wanted
from lemur_jax.checkpoint.metadata import Damaged, seal, unseal
from lemur_jax.checkpoint.opening import SLOWEST_SAVE_SECONDS, ask_nobody_about_preemption
from lemur_jax.checkpoint.reading import (
    agreed,
    check_same,
    measured,
    restore_args,
)
from lemur_jax.checkpoint.remains import let_go, remove_half_written
from lemur_jax.checkpoint.snapshot import snapshot
from lemur_jax.checkpoint.together import SaveBarriers, why
from lemur_jax.cluster.hosts import any_host
from lemur_jax.common.errors import UserError, reason_of

# A host that is killed may not have the newest yet: then all have the one before.
_KEPT = 2
# What a save fails by.
_ERRORS = (OSError, ValueError, RuntimeError)


class LocalCheckpoints:
    """The local checkpoints of one run; every process makes one and calls its methods together with all others.

    Args:
      path: a directory of this run on this host's own disk; made if missing.
      mesh: of the arrays that are saved.
      say: gets a line for every failure.

    Raises:
      UserError: the directory cannot be made on some host, or a host finds no address for its peers.
    """

    def __init__(self, path: epath.PathLike, mesh: Mesh, say: Callable[[str], None] = print):
        silence_echoes()
        self.path = epath.Path(path).resolve()
        self._say = say
        self._mesh = {"axes": dict(mesh.shape), "hosts": jax.process_count()}
        failure: OSError | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.iterdir():  # of a run that was killed
                if not leftover.name.isdigit():
                    leftover.rmtree()
            self._remove_unreadable()
        except OSError as error:
            failure = error
        if any_host(failure is not None):
            raise UserError(
                f"config.checkpoint.local_directory: {self.path} is not to be used on some host"
                f" ({failure or 'another one'})"
            ) from failure
        keep = options.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=_KEPT)
        shared = future.AwaitableSignalsContract.awaitable_signals_contract_prefix
        try:
            self._manager = p2p.CheckpointManager(
                _by_process(mesh), None, self.path, options=options.CheckpointManagerOptions(local=keep)
            )
        except OSError as error:
            raise UserError(
                f"config.checkpoint.local_directory: this host finds no address for its peers: {error}"
            ) from error
        finally:
            # Renamed by it for all managers of this process: hosts would not hear any more that the directories of the
            # workdir are made, and write before they are.
            future.AwaitableSignalsContract.awaitable_signals_contract_prefix = shared
        self._barriers = SaveBarriers()
        self._saving: ocp.CheckpointManager = self._manager._local_manager._manager
        _configure(self._saving, self._barriers)

    def save(self, step: int, params: Any, optimizer: Any, metadata: Mapping[str, Any]) -> None:
        """Starts saving; returns once the digests are there and the arrays are copied to the host, and may be donated.

        A save that fails is reported and does not raise: there are the other checkpoints.

        Args:
          step: updates done.
          params: the parameters.
          optimizer: the optimizer's state.
          metadata: as `make_metadata` gives it.

        Raises:
          UserError: a leaf is not finite.
        """
        self._wait()  # for the save before, which lets go of its copy
        params, optimizer = snapshot((params, optimizer))
        state = {"params": params, "optimizer": optimizer}
        measures = {item: measured(tree, f"step {step} is not saved: {item}") for item, tree in state.items()}
        leaves = {item: result() for item, result in measures.items()}
        # The tokenizer is in the workdir's checkpoints and never changes.
        described = seal({**metadata, "tokenizer": {}, "mesh": self._mesh}, leaves)
        if any_host(_bytes_here(state) * 1.05 > self._room()):
            self._say(f"WARNING: step {step} is not saved in {self.path}: on some host there is no room")
            return
        self._barriers.begin()
        try:
            self._manager.save(
                step,
                args=p2p_args.Composite(state=ocp.args.PyTreeSave(state)),
                force=True,
                custom_metadata=described,
            )
            self._barriers.begun()
        except _ERRORS as error:
            known = self._barriers.fail(error)
            self._give_up(error)
            if not known:
                raise UserError(
                    f"step {step} cannot be saved in {self.path} ({reason_of(error)}), and other hosts wait for this"
                    " one: run the same command again"
                ) from error

    def _room(self) -> int:
        """Bytes that are free; none where the disk is gone."""
        try:
            return shutil.disk_usage(self.path).free
        except OSError:
            return 0

    def _wait(self) -> None:
        """Until no save is going on."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except _ERRORS as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """What a failed save has left takes room that the next may need."""
        let_go(error, self._saving)
        remove_half_written(self.path, self._barriers.save)
        self._manager.reload()  # what was to make room for it is still there
        self._say(f"WARNING: a local checkpoint in {self.path} failed: {why(error)}")

    def restore_newest(
        self,
        params: Any,
        optimizer: Any,
        check: Callable[[Mapping[str, Any]], None],
        newer_than: int,
    ) -> tuple[int, Any, Any] | None:
        """(step, params, optimizer) of the newest one that all shards are there of and that is whole, or None.

        Damaged ones are named and removed.

        Args:
          params: abstract tree with shardings.
          optimizer: likewise.
          check: is given the metadata first and may refuse it.
          newer_than: one of this step, or an older one, is not wanted.

        Raises:
          UserError: the newest does not fit.
        """
        wanted = {"params": params, "optimizer": optimizer}
        while (step := self._manager.latest_step()) is not None and step > newer_than:
            where = f"local checkpoint {self.path}/{step}"
            try:
                metadata = self._metadata(step, where)
                if metadata["mesh"] != self._mesh:
                    self._say(f"{where} is of another mesh or of other hosts: it is not used")
                    return None
                check(metadata)
                for item, tree in wanted.items():
                    check_wanted(metadata["leaves"][item], tree, f"{where}, {item}")
                state = self._read(step, wanted, where)
                for item, tree in state.items():
                    check_same(tree, metadata["leaves"][item], f"{where}, {item}")
                return step, state["params"], state["optimizer"]
            except Damaged as error:  # by digests of whole arrays, the same on all hosts
                self._say(f"WARNING: {error}; it is removed")
                (self.path / str(step)).rmtree(missing_ok=True)
                self._manager.reload()
        return None

    def _read(self, step: int, wanted: Any, where: str) -> Any:
        stored = self.path / str(step) / constants.STATE_SUBDIR
        mine = stored / f"{constants.PROCESS_SUBDIR_PREFIX}{jax.process_index()}"
        if any_host(not mine.exists()):
            try:
                arguments = p2p_args.Composite(state=ocp.args.PyTreeRestore(wanted))
                return self._manager.restore(step, arguments)["state"]
            except OSError as error:  # on this host alone, perhaps: nothing can be agreed on
                raise UserError(
                    f"{where} cannot be fetched from another host: remove {self.path} here, then start again"
                    f" ({error})"
                ) from error
        # Each for itself: Orbax's manager would wait for a host that cannot read.
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, multiprocessing_options=alone)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=jax.tree.map(restore_args, wanted))
        return agreed(lambda: handler.restore(stored, args=arguments), where)

    def _metadata(self, step: int, where: str) -> dict[str, Any]:
        """What some host knows of a step: one whose disk is new holds nothing."""
        mine = _described(self.path / str(step)) if (self.path / str(step)).exists() else None
        known = [found["metadata"] for found in sync_global_data({"metadata": mine}) if found["metadata"]]
        if not known:
            raise Damaged(f"{where} is damaged: no host knows what it is")
        return unseal(known[0], where)

    def _remove_unreadable(self) -> None:
        """Removes what cannot be read here: inside Orbax the other hosts would wait for this one."""
        for directory in self.path.iterdir():
            try:
                unseal(_described(directory), str(directory))
                base = f"file://{directory / constants.STATE_SUBDIR}/"
                store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
                for key in store.list().result():
                    store.read(key).result()
            except (OSError, ValueError, KeyError, TypeError, UserError) as error:
                self._say(
                    f"WARNING: local checkpoint {directory} cannot be read and is removed: {reason_of(error)}"
                )
                directory.rmtree()

    def discard(self) -> None:
        """Removes them all: a newer checkpoint is where all hosts can read it."""
        self._wait()
        for directory in self.path.iterdir():
            # Orbax removes old ones in a thread of its own.
            with contextlib.suppress(OSError):
                directory.rmtree(missing_ok=True)
        self._manager.reload()

    def __enter__(self) -> "LocalCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self._wait()
        self._manager.close()


def _configure(manager: ocp.CheckpointManager, barriers: SaveBarriers) -> None:
    """What the peer-to-peer manager has no options for."""
    ask_nobody_about_preemption(manager)
    manager._save_progress_tracker._async_options = ocp.options.AsyncOptions(
        timeout_secs=SLOWEST_SAVE_SECONDS, barrier_sync_fn=barriers
    )
    writes = manager._checkpointer._async_manager
    writes._timeout_secs = SLOWEST_SAVE_SECONDS
    writes._sync_fn = lambda key, timeout_ms: barriers(key=key, timeout_ms=timeout_ms)
    begin = manager._checkpointer.synchronize_next_awaitable_signal_operation_id
    numbers = synchronization.OperationIdGenerator

    def begin_own() -> None:
        """Each host makes its directories for itself, and signals so to itself: by a number of its own."""
        begin()
        numbers._operation_id = f"{numbers._operation_id}.{jax.process_index()}"

    manager._checkpointer.synchronize_next_awaitable_signal_operation_id = begin_own


def directory_of(path: str, run: str) -> epath.Path:
    """The directory of one run in `path`, in which the environment's variables are replaced, as each host has them."""
    return epath.Path(os.path.expandvars(path)).expanduser() / run


def _described(directory: epath.Path) -> Any:
    """The sealed metadata of a step."""
    return json.loads((directory / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def _by_process(mesh: Mesh) -> Mesh:
    """The mesh with a first axis whose entries are processes of their own; of one entry where they are not."""
    rows = [{device.process_index for device in row.flat} for row in mesh.devices]
    if sum(map(len, rows)) == len(set.union(*rows)):
        return mesh
    return Mesh(mesh.devices[np.newaxis], ("replica", *mesh.axis_names))


def _bytes_here(tree: Any) -> int:
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
