"""Orbax's manager as everything here opens it, and which of storage's errors say nothing about the files."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from lemur_jax.checkpoint.echoes import silence_echoes
from lemur_jax.checkpoint.metadata import LateJsonHandler
from lemur_jax.checkpoint.streaming import Streamed, StreamedHandler
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import is_refused_by_store

# How errors of storage begin that say nothing about the files themselves.
_PASSING = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"),
)
# Refused, timed out, too often, or the server's own trouble.
_PASSING_HTTP = re.compile(r"401|403|408|429|5\d\d")

# Orbax gives up a save after 20 minutes, in which slow storage takes some 200 GB. Hosts that have gone are seen by
# their silence.
SLOWEST_SAVE_SECONDS = 24 * 3600


def ask_nobody_about_preemption(manager: ocp.CheckpointManager) -> None:
    """Keeps Orbax from asking JAX's preemption service, for its logs alone, whether the step of a save is the last.

    The service lets all hosts stop at the number after the highest that one has asked with, and asks are compared with
    just that number. `train.interruption` counts its asks; after one with a step, the stop may never be reached.
    """
    manager.reached_preemption = lambda step: False


def open_manager(
    path: epath.Path,
    *,
    create: bool = False,
    streaming: bool = False,
    broadcast: bool = False,
    barriers: Callable[..., None] | None = None,
    **options: Any,
) -> ocp.CheckpointManager:
    """Orbax's manager of our items.

    Args:
      path: the checkpoint directory.
      create: for writing too; makes the directory.
      streaming: what is written are `Streamed` arrays.
      barriers: what hosts that write wait for each other with; None: Orbax's own.
      broadcast: arrays are read by the devices of one entry of the mesh's first axis, which send them on.
      options: of `CheckpointManagerOptions`.

    Raises:
      UserError: not now: rights, network, too many open files.
    """
    silence_echoes()
    host = (Streamed, StreamedHandler()) if streaming else (np.ndarray, type_handlers.NumpyHandler())
    handler = type_handlers.SingleReplicaArrayHandler if broadcast else type_handlers.ArrayHandler
    registry = type_handlers.create_type_handler_registry((jax.Array, handler()), host)

    def arrays() -> ocp.PyTreeCheckpointHandler:
        # Weights hardly compress, and compressing them is slower than the disk.
        return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)

    if not create:
        # Each host reads for itself: one that cannot must not be waited for inside Orbax, see `agreed`.
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"host_{jax.process_index()}",
        )
    else:
        options["async_options"] = ocp.options.AsyncOptions(
            timeout_secs=SLOWEST_SAVE_SECONDS, barrier_sync_fn=barriers
        )
    try:
        manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(create=create, enable_async_checkpointing=create, **options),
            item_handlers={"params": arrays(), "optimizer": arrays(), "metadata": LateJsonHandler()},
        )
        ask_nobody_about_preemption(manager)
        return manager
    except Exception as error:
        if not is_passing(error):
            raise
        raise UserError(
            f"{path} cannot be opened now ({reason_of(error)}); nothing is skipped or changed: start again when"
            " it can"
        ) from error


def is_passing(error: BaseException) -> bool:
    """Whether an error in reading says nothing about the files: network, rights, too many open files, a bad disk."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return (
        is_refused_by_store(error)
        or _PASSING_HTTP.fullmatch(str(getattr(error, "code", ""))) is not None
        or str(error).startswith(_PASSING)
    )
