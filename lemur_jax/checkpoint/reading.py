"""Reading checkpoints: data that differs from what was saved is never used."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from lemur_jax.checkpoint.digest import leaf_digests
from lemur_jax.checkpoint.metadata import Damaged, Leaf, check_leaves, unseal
from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import absolute, is_refused_by_store, store_url

# Prefixes of storage errors that say nothing about the files themselves.
_TRANSIENT = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"),
)
# Refused, timed out, too many requests, or a fault of the server.
_TRANSIENT_HTTP = re.compile(r"401|403|408|429|5\d\d")


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not poll JAX's preemption service.

    It would only log the answer, and its step numbers would interfere with those of `cluster/preemption.py`.
    """

    def reached_preemption(self, step: int) -> bool:
        """Always False."""
        del step
        return False


def open_manager(path: epath.Path, *, broadcast: bool = False, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager of our items; without `options`, each host reads on its own.

    With `broadcast`, arrays are read by the devices of one entry of the mesh's first axis, and sent to the others.
    Raises UserError: storage cannot be read now: rights, network, too many open files.
    """
    handler = type_handlers.SingleReplicaArrayHandler if broadcast else type_handlers.ArrayHandler
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, handler()), (np.ndarray, type_handlers.NumpyHandler())
    )
    # Weights hardly compress, and compression is slower than the disk.
    arrays = {
        item: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        for item in ("params", "optimizer")
    }
    if not options:
        # Inside Orbax the other hosts would wait for one that cannot read, see `read_on_all_hosts`.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host_{me}"
        )
        options = {
            "create": False,
            "enable_async_checkpointing": False,
            "multiprocessing_options": alone,
        }
    try:
        return Manager(
            path,
            options=ocp.CheckpointManagerOptions(**options),
            item_handlers={**arrays, "metadata": ocp.JsonCheckpointHandler()},
        )
    except Exception as error:
        if not is_transient(error):
            raise
        raise UserError(
            f"{path} cannot be opened now ({reason_of(error)}); nothing is skipped or changed: start again when"
            " it can"
        ) from error


def is_transient(error: BaseException) -> bool:
    """Whether an error in reading says nothing about the files: network, rights, too many open files, a bad disk."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return (
        is_refused_by_store(error)
        or _TRANSIENT_HTTP.fullmatch(str(getattr(error, "code", ""))) is not None
        or str(error).startswith(_TRANSIENT)
    )


def steps_in(path: epath.PathLike) -> tuple[epath.Path, list[int]]:
    """The checkpoint directory meant by `path`, itself or a workdir that holds it, and its finished steps, oldest
    first.

    Raises UserError if there is no such directory, or no step in it.
    """
    directory = absolute(path)
    # First: `exists` raises where a store cannot be reached, `is_dir` returns False.
    exists = directory.exists()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    if not exists or not directory.is_dir():
        raise UserError(f"no checkpoint directory at {path}")
    steps = sorted(open_manager(directory).all_steps())
    if not steps:
        hint = f": name {directory.parent} and --step {directory.name}" if directory.name.isdigit() else ""
        if any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin")):
            hint = ": it holds Hugging Face weights, which lemur import-hf makes a checkpoint of"
        raise UserError(f"no finished checkpoint in {directory}{hint}")
    return directory, steps


def _open(path: epath.PathLike, step: int | None) -> tuple[ocp.CheckpointManager, epath.Path, int]:
    """A manager, its directory and the step meant by `step` (None: the newest)."""
    directory, steps = steps_in(path)
    if step is not None and step not in steps:
        raise UserError(
            f"no checkpoint of step {step} in {directory}; there are {', '.join(map(str, steps))}"
        )
    return open_manager(directory), directory, steps[-1] if step is None else step


def read_metadata(path: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The `metadata` item and the key `step`, of the newest checkpoint or of `step`.

    Raises Damaged: the metadata is not what was saved; UserError: no checkpoint there, or one of another format.
    """
    manager, directory, step = _open(path, step)
    with suggest_other_steps(directory, step):
        return {**restore_metadata(manager, directory, step), "step": step}


def newest_metadata(path: epath.PathLike) -> dict[str, Any]:
    """`read_metadata` of the newest step whose metadata is intact, read by each host alone; empty without one."""
    with hosts.alone(), contextlib.suppress(UserError):  # there is none
        directory, steps = steps_in(path)
        for step in reversed(steps):
            with contextlib.suppress(Damaged):
                return read_metadata(directory, step)
    return {}


@contextlib.contextmanager
def suggest_other_steps(path: epath.PathLike, step: int) -> Iterator[None]:
    """A context that adds the other steps there are to the error of a damaged one."""
    try:
        yield
    except Damaged as error:
        others = [other for other in steps_in(path)[1] if other != step]
        if not others:
            raise
        raise Damaged(f"{error}; there are also steps {', '.join(map(str, others))} (--step)") from error


def restore_metadata(manager: ocp.CheckpointManager, directory: epath.Path, step: int) -> dict[str, Any]:
    """The unsealed `metadata` item; all hosts must call it. UserError: it is damaged, or of another step."""

    def read() -> Any:
        item = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = unseal(manager.restore(step, args=item)["metadata"], f"checkpoint {directory}/{step}")
        if (saved := metadata.get("step", step)) != step:  # imports and earlier versions have none
            raise UserError(
                f"checkpoint {directory}/{step} is that of step {saved}: rename the directory back"
            )
        return metadata

    return read_on_all_hosts(read, f"checkpoint {directory}/{step}, metadata")


def restore_params(
    path: epath.PathLike,
    abstract: Any,
    step: int | None = None,
    each: Callable[[str, jax.Array], Any] = lambda name, leaf: leaf,
) -> Any:
    """Parameters alone, verified, with the shardings and dtypes of an abstract tree.

    One leaf at a time: only a single leaf is in memory in both the stored and the requested dtype. `each` is applied to
    each leaf, with its path, as soon as it is read. Raises Damaged: something is not what was saved; UserError: no
    checkpoint there; a leaf is missing, unexpected or of another shape.
    """
    manager, directory, step = _open(path, step)
    with suggest_other_steps(directory, step):
        leaves = restore_metadata(manager, directory, step)["leaves"]["params"]
        check_leaves(leaves, abstract, f"checkpoint {directory}/{step}, params", dtypes=False)

        def restore(path: tuple[Any, ...], target: Any) -> Any:
            name = "/".join(str(key.key) for key in path)
            tree: Any = jax.ShapeDtypeStruct(target.shape, leaves[name].dtype, sharding=target.sharding)
            for key in reversed(path):
                tree = {key.key: tree}
            restored = restore_item(manager, directory, step, "params", tree, {name: leaves[name]})
            leaf = jax.tree.leaves(restored)[0]
            return each(name, leaf if leaf.dtype == target.dtype else leaf.astype(target.dtype))

        return jax.tree_util.tree_map_with_path(restore, abstract)


def restore_item(
    manager: ocp.CheckpointManager,
    directory: epath.Path,
    step: int,
    item: str,
    wanted: Any,
    leaves: Mapping[str, Leaf],
    broadcast: bool = False,
) -> Any:
    """The leaves of `wanted`, verified against `leaves`; `broadcast` as in `open_manager` of this manager.

    Raises Damaged: a leaf is not what was saved, or has a value that is not finite.
    """
    where = f"checkpoint {directory}/{step}, {item}"
    arguments = ocp.args.PyTreeRestore(
        item=wanted, restore_args=jax.tree.map(_restore_args, wanted), partial_restore=True
    )
    restored = read_on_all_hosts(
        lambda: manager.restore(step, args=ocp.args.Composite(**{item: arguments}))[item], where, broadcast
    )
    for name, leaf in leaf_digests(restored, where, Damaged).items():
        if leaf != leaves[name]:
            raise Damaged(
                f"{where} is damaged: {name} is not what was saved (digest {leaf.digest:08x},"
                f" saved {leaves[name].digest:08x})"
            )
    return restored


def _restore_args(leaf: Any) -> Any:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # The handler that reads on every host takes these as well.
    return type_handlers.SingleReplicaArrayRestoreArgs(
        sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )


def read_on_all_hosts(read: Callable[[], Any], where: str, broadcast: bool = False) -> Any:
    """What `read` returns, if it succeeds on every host; all must call it.

    Raises Damaged: a file is not what was written, on any host; UserError: storage cannot be read now, or what `read`
    raises itself.
    """
    failure: Exception | None = None
    result = None
    try:
        result = read()
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # a fault of this machine, not of the files
    except Exception as error:  # Orbax raises no narrower class for missing data
        if isinstance(error, UserError) and not isinstance(error, Damaged):
            raise
        failure = error
    if failure is not None and is_transient(failure):
        raise UserError(
            f"{where} cannot be read now ({reason_of(failure)}); nothing is skipped or changed: start again when"
            " it can"
        ) from failure
    if broadcast and failure is not None:
        # The other slices wait for the values that this one cannot read, and cannot agree on anything.
        raise UserError(
            f"{where} cannot be read ({reason_of(failure)}): start again with config.checkpoint.broadcast=False,"
            " which skips a damaged checkpoint"
        ) from failure
    if not broadcast and hosts.any_host(failure is not None):
        reason = "another host could not read it" if failure is None else reason_of(failure)
        raise Damaged(f"{where} is damaged: {reason}") from failure
    return result


def open_arrays(
    path: epath.PathLike, step: int, names: Iterable[str], item: str = "params"
) -> dict[str, ts.TensorStore]:
    """The arrays of one step's item ("params" or "optimizer") by name, to be read slice by slice; reads their shapes
    only.

    Orbax restores whole arrays, conversion of a 70B model needs one layer at a time. Orbax writes each array as a zarr
    array in an OCDBT store, which TensorStore opens. Raises UserError: an array cannot be opened.
    """
    location = steps_in(path)[0] / str(step) / item
    try:
        futures = {}
        for name in names:
            store = {"driver": "ocdbt", "base": store_url(location), "path": name.replace("/", ".") + "/"}
            futures[name] = ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True)
        return {name: future.result() for name, future in futures.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"the arrays in {location} cannot be opened: {reason_of(error)}") from error


def chunk_slices(array: ts.TensorStore) -> list[Any]:
    """Slices of axis 0 that hold whole chunks, which are decoded at once; `[...]` for a scalar."""
    if not array.shape:
        return [...]
    rows = int((array.chunk_layout.read_chunk.shape or (1,))[0] or 1)
    return [slice(start, min(start + rows, array.shape[0])) for start in range(0, array.shape[0], rows)]


def read_slices(array: ts.TensorStore, slices: Sequence[Any], name: str) -> Iterator[Any]:
    """Slices of an array as NumPy arrays; the next one is read while the caller uses one.

    Raises UserError: the file behind it is damaged.
    """
    try:
        future = array[slices[0]].read()
        for index in range(len(slices)):
            block = future.result()
            if index + 1 < len(slices):
                future = array[slices[index + 1]].read()
            yield block
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {reason_of(error)}") from error
