"""Directories that appear whole or not at all."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable, Iterator

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import is_object_store


def check_target(target: epath.Path, overwrite: bool, replaceable: Callable[[epath.Path], bool]) -> None:
    """That `target` may be written.

    Args:
      target: the directory to be.
      overwrite: whether one that exists may be replaced.
      replaceable: whether a directory is of the kind that is replaced; anything else is never deleted.

    Raises:
      UserError: it may not.
    """
    if not target.exists():
        return
    if not overwrite:
        raise UserError(
            f"{target} exists already: choose another directory, or say --overwrite to replace it"
        )
    if not target.is_dir() or not replaceable(target):
        raise UserError(
            f"{target} holds other things than this would replace: remove it yourself or choose another"
        )


@contextlib.contextmanager
def staged(target: epath.Path) -> Iterator[epath.Path]:
    """A directory to write into that becomes `target` when the block ends well, and is removed otherwise.

    Replaces what was there. Object stores (gs://) cannot rename a directory: there the block writes in
    place, and should write last the file without which no reader opens the directory.

    Raises:
      UserError: the disk is full.
    """
    try:
        with _in_place(target) if is_object_store(target) else _beside(target.resolve()) as directory:
            yield directory
    except (ValueError, OSError) as error:  # TensorStore raises the former
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise UserError(
            f"{target} could not be written: {str(error)[:200]}; make room or choose another place"
        ) from error


@contextlib.contextmanager
def _in_place(target: epath.Path) -> Iterator[epath.Path]:
    if target.exists():
        target.rmtree()
    target.mkdir(parents=True)
    try:
        yield target
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is what to tell
            target.rmtree()
        raise


@contextlib.contextmanager
def _beside(target: epath.Path) -> Iterator[epath.Path]:
    # Named after this process: another one may write the same target meanwhile, and the last to end stays.
    mine = f".{target.name}.{socket.gethostname()}."
    partial, old = (target.parent / f"{mine}{os.getpid()}.{end}" for end in ("partial", "old"))
    for leftover in _leftovers(target.parent, mine):
        leftover.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        partial.rmtree()
        raise
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.exists():
        old.rmtree()


def _leftovers(parent: epath.Path, begin: str) -> list[epath.Path]:
    """What processes that were killed on this machine have left; whether others live cannot be seen."""
    name = re.compile(re.escape(begin) + r"([1-9]\d{0,7})\.(partial|old)", re.ASCII)
    matches = [(path, name.fullmatch(path.name)) for path in parent.iterdir()] if parent.exists() else []
    return [path for path, match in matches if match and not _is_another_alive(int(match[1]))]


def _is_another_alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
