"""Temporary directories of boxes and databases, all in one of this process, which is removed when it exits.

A process that is killed cannot do that: the next one does.
"""

import atexit
import contextlib
import fcntl
import functools
import os
import pathlib
import subprocess
import tempfile

_PREFIX = "lemur-agents-"


def make_directory(prefix: str) -> pathlib.Path:
    """A new directory that only its owner can read; remove it with `remove_tree`."""
    return pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=_home()))


def remove_tree(path: str | os.PathLike) -> None:
    """Removes a directory that untrusted code wrote in: of any depth, which `shutil.rmtree` cannot, with any modes."""
    subprocess.run(["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', os.path.abspath(path)], check=True)


@functools.cache
def _home() -> pathlib.Path:
    """The directory of this process, locked while it lives; those of processes that were killed are removed."""
    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or locked: in use
            place = _lock(left)
            if os.fstat(place).st_uid == os.getuid():
                remove_tree(left)
            os.close(place)
    # Named when it is locked, so that no other process removes it.
    new = pathlib.Path(tempfile.mkdtemp(prefix="lemur-new-"))
    new.chmod(0o711)  # boxes may run as another user
    _lock(new)  # until the process ends
    atexit.register(remove_tree, home := new.with_name(new.name.replace("lemur-new-", _PREFIX)))
    return new.rename(home)


def _lock(directory: pathlib.Path) -> int:
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(place)
        raise
    return place
