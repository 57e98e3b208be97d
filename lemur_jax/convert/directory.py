"""Directories that are written atomically."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import is_object_store


def check_target(target: epath.Path, overwrite: bool, replaceable: Callable[[epath.Path], bool]) -> None:
    """Raises UserError if `target` exists, unless `overwrite` is set and `replaceable` accepts the directory."""
    if not target.exists():
        if os.path.islink(target):
            raise UserError(f"{target} is a link to a place that does not exist: remove it or choose another")
        return
    if not overwrite:
        raise UserError(
            f"{target} exists already: choose another directory, or add --overwrite to replace it"
        )
    if not target.is_dir() or not replaceable(target):
        raise UserError(
            f"{target} has other files than this would replace: remove it yourself or choose another"
        )


@contextlib.contextmanager
def atomic_directory(target: epath.Path) -> Iterator[epath.Path]:
    """A directory to write into that becomes `target` when the block succeeds, and is removed otherwise.

    Replaces an existing target. Object stores (gs://) cannot rename a directory: there the block writes in place, and
    should write last the file without which no reader opens the directory. Raises UserError if another process writes
    the same target.
    """
    with _in_place(target) if is_object_store(target) else _in_sibling(target.resolve()) as directory:
        yield directory


@contextlib.contextmanager
def _in_place(target: epath.Path) -> Iterator[epath.Path]:
    if target.exists():
        target.rmtree()
    target.mkdir(parents=True)
    try:
        yield target
    except BaseException:
        target.rmtree()
        raise


@contextlib.contextmanager
def _in_sibling(target: epath.Path) -> Iterator[epath.Path]:
    partial, old = (target.parent / f".{target.name}.{suffix}" for suffix in ("partial", "old"))
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # held until the process ends, however it ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {target}: wait for it, or choose another place"
            ) from None
        except OSError:  # some network file systems have no locks of directories
            pass
        for child in partial.iterdir():  # of a process that was killed
            child.rmtree() if child.is_dir() else child.unlink()
        try:
            yield partial
        except BaseException:
            partial.rmtree()
            raise
        if old.exists():
            old.rmtree()
        if target.exists():
            target.rename(old)
        partial.rename(target)
        if old.exists():
            old.rmtree()
    finally:
        os.close(lock)
