"""Directories that appear whole or not at all."""

import contextlib
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
    """
    if is_object_store(target):
        if target.exists():
            target.rmtree()
        target.mkdir(parents=True)
        try:
            yield target
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what to tell
                target.rmtree()
            raise
        return
    target = target.resolve()
    partial = target.parent / f".{target.name}.partial"
    old = target.parent / f".{target.name}.old"
    for leftover in (partial, old):  # of a run that was killed
        if leftover.exists():
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
