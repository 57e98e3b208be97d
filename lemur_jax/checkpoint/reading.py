"""Reading checkpoints: nothing is taken from one that does not agree with what was saved."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from lemur_jax.checkpoint import digest
from lemur_jax.checkpoint.leaves import Leaf, check_wanted, describe, named
from lemur_jax.checkpoint.metadata import Damaged, RestoreLateJson, unseal
from lemur_jax.checkpoint.opening import is_passing, open_manager
from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import absolute


def steps_in(path: epath.PathLike) -> tuple[epath.Path, list[int]]:
    """The checkpoint directory meant by `path` and its finished steps, oldest first.

    Args:
      path: a checkpoint directory, or a workdir that holds one.

    Raises:
      UserError: there is no such directory, or no step in it.
    """
    directory = absolute(path)
    # First, as it raises where a store cannot be reached; `is_dir` says no.
    there = directory.exists()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    if not there or not directory.is_dir():
        raise UserError(f"no checkpoint directory at {path}")
    steps = sorted(open_manager(directory).all_steps())
    if not steps:
        of_step = f": name {directory.parent} and --step {directory.name}" if directory.name.isdigit() else ""
        raise UserError(f"no finished checkpoint in {directory}{of_step}")
    return directory, steps


def _open(path: epath.PathLike, step: int | None) -> tuple[ocp.CheckpointManager, epath.Path, int]:
    """A reader, its directory and the step meant by `step` (None: the newest)."""
    directory, steps = steps_in(path)
    if step is not None and step not in steps:
        raise UserError(
            f"no checkpoint of step {step} in {directory}; there are {', '.join(map(str, steps))}"
        )
    return open_manager(directory), directory, steps[-1] if step is None else step


def read_metadata(path: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The `metadata` item and the key `step`, of the newest checkpoint or of `step`.

    Raises:
      Damaged: the metadata is not what was saved.
      UserError: no checkpoint there, or one of another format.
    """
    manager, directory, step = _open(path, step)
    with naming_others(directory, step):
        return {**metadata_of(manager, directory, step), "step": step}


@contextlib.contextmanager
def naming_others(path: epath.PathLike, step: int) -> Iterator[None]:
    """Tells whoever asked for a damaged step, or for the newest, what else there is."""
    try:
        yield
    except Damaged as error:
        others = [other for other in steps_in(path)[1] if other != step]
        if not others:
            raise
        raise Damaged(f"{error}; there are also steps {', '.join(map(str, others))} (--step)") from error


def metadata_of(manager: ocp.CheckpointManager, directory: epath.Path, step: int) -> dict[str, Any]:
    def read() -> Any:
        item = ocp.args.Composite(metadata=RestoreLateJson())
        return unseal(manager.restore(step, args=item)["metadata"], f"checkpoint {directory}/{step}")

    return agreed(read, f"checkpoint {directory}/{step}, metadata")


def restore_params(path: epath.PathLike, abstract: Any, step: int | None = None) -> Any:
    """Parameters alone, onto the shardings (and into the dtypes) of an abstract tree, verified.

    One leaf after the other: the dtype that is stored exists beside the wanted one for a leaf at a time.

    Raises:
      Damaged: something is not what was saved.
      UserError: no checkpoint there; a leaf is missing, unexpected or of another shape.
    """
    manager, directory, step = _open(path, step)
    with naming_others(directory, step):
        return _restore_params(manager, directory, step, abstract)


def _restore_params(manager: ocp.CheckpointManager, directory: epath.Path, step: int, abstract: Any) -> Any:
    leaves = metadata_of(manager, directory, step)["leaves"]["params"]
    check_wanted(leaves, abstract, f"checkpoint {directory}/{step}, params", dtypes=False)

    def restore(path: tuple[Any, ...], wanted: Any) -> Any:
        name = "/".join(str(key.key) for key in path)
        stored = jax.ShapeDtypeStruct(wanted.shape, leaves[name].dtype, sharding=wanted.sharding)
        tree: Any = stored
        for key in reversed(path):
            tree = {key.key: tree}
        restored = restore_item(manager, directory, step, "params", tree, {name: leaves[name]})
        leaf = jax.tree.leaves(restored)[0]
        return leaf if leaf.dtype == wanted.dtype else leaf.astype(wanted.dtype)

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
    """The leaves of `wanted`, equal to what was saved; `broadcast`: by a manager that was opened so."""
    where = f"checkpoint {directory}/{step}, {item}"
    arguments = ocp.args.PyTreeRestore(
        item=wanted, restore_args=jax.tree.map(restore_args, wanted), partial_restore=True
    )
    restored = agreed(
        lambda: manager.restore(step, args=ocp.args.Composite(**{item: arguments}))[item], where, broadcast
    )
    check_same(restored, leaves, where)
    return restored


def check_same(restored: Any, leaves: Mapping[str, Leaf], where: str) -> None:
    """That restored arrays are those that were saved.

    Raises:
      Damaged: one is not, or has a value that is not finite.
    """
    for name, found in measured(restored, where, Damaged)().items():
        if found != leaves[name]:
            raise Damaged(
                f"{where} is damaged: {name} is not what was saved (digest {found.digest:08x},"
                f" saved {leaves[name].digest:08x})"
            )


def restore_args(leaf: Any) -> Any:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # The handler that reads everywhere takes these as well.
    return type_handlers.SingleReplicaArrayRestoreArgs(
        sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )


def agreed(read: Callable[[], Any], where: str, broadcast: bool = False) -> Any:
    """What `read` returns.

    Raises:
      Damaged: by an error that a file not as it was written leads to, on any host.
      UserError: the storage cannot be read now, or what `read` raises itself.
    """
    failure: Exception | None = None
    result = None
    try:
        result = read()
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # says something about this machine, not about the files
    except Exception as error:  # Orbax raises no narrower class for data that is missing
        if isinstance(error, UserError) and not isinstance(error, Damaged):
            raise
        failure = error
    if failure is not None and is_passing(failure):
        raise UserError(
            f"{where} cannot be read now ({reason_of(failure)}); nothing is skipped or changed: start again when"
            " it can"
        ) from failure
    if broadcast and failure is not None:
        # The other slices wait for the values that this one cannot read, and can agree to nothing.
        raise UserError(
            f"{where} cannot be read ({reason_of(failure)}): start again with config.checkpoint.broadcast=False,"
            " which skips a damaged checkpoint"
        ) from failure
    if not broadcast and hosts.any_host(failure is not None):
        reason = "another host could not read it" if failure is None else reason_of(failure)
        raise Damaged(f"{where} is damaged: {reason}") from failure
    return result


def measured(tree: Any, where: str, error: type[UserError] = UserError) -> Callable[[], dict[str, Leaf]]:
    """Shape, dtype and digest of every leaf.

    Args:
      tree: of arrays; may be donated at once if they are on accelerators.
      where: for the message.
      error: what is raised.

    Returns:
      What gives them, or raises the error where a leaf is not finite; see `digest.start`.
    """
    arrays = named(tree)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}
    digests_of = digest.start(arrays)

    def result() -> dict[str, Leaf]:
        digests, bad = digests_of()
        if bad:
            raise error(f"{where}: {bad[0]} has values that are not finite ({len(bad)} such leaves in all)")
        return {name: describe(shapes[name], value) for name, value in digests.items()}

    return result
