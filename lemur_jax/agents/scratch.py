"""Temporary directories of sandboxes and databases, all in one directory of this process, removed when it exits.

If the process is killed, the next one removes the directory.
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
    """Removes a directory that untrusted code wrote in: of any depth (`shutil.rmtree` fails) and with any modes."""
    subprocess.run(["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', os.path.abspath(path)], check=True)


@functools.cache
def _home() -> pathlib.Path:
    """The directory of this process, locked while it lives; those of processes that were killed are removed."""
    for leftover in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or locked: in use
            descriptor = _lock(leftover)
            if os.fstat(descriptor).st_uid == os.getuid():
                remove_tree(leftover)
            os.close(descriptor)
    # Renamed only when it is locked, so that no other process removes it.
    new = pathlib.Path(tempfile.mkdtemp(prefix="lemur-new-"))
    new.chmod(0o711)  # sandboxes may run as another user
    _lock(new)  # until the process ends
    atexit.register(remove_tree, home := new.with_name(new.name.replace("lemur-new-", _PREFIX)))
    return new.rename(home)


def _lock(directory: pathlib.Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
