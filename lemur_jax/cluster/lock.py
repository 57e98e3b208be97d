"""One run at a time in a workdir: a file lock on disks, a lease on object stores, which have no locks.

The lease is a file that its holder rewrites every few seconds. Clocks of machines are not compared: a file that does
not change for a while belongs to a process that was killed.
"""

import contextlib
import errno
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import filelock
from etils import epath

from lemur_jax.cluster.exit import USER_ERROR, end_process
from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import is_object_store

logger = logging.getLogger(__name__)

LOCK_FILE = "running.lock"
LEASE_FILE = "running.lease"
# A run that stops may still be saving when the next one starts.
WAIT_SECONDS = 300.0
RENEW_SECONDS = 10.0  # between two writes of the lease
EXPIRE_SECONDS = 60.0  # a lease that has not changed for this long is free; a store may be out of reach
SETTLE_SECONDS = 1.0  # in which another run that also found the lease free may write; the last one wins
RELEASE_SECONDS = 30.0  # for the last write of the lease; the store may not answer
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of `flock` on network disks


@contextlib.contextmanager
def workdir_lock(
    workdir: epath.Path, seconds: float = WAIT_SECONDS, verb: str = "lemur train"
) -> Iterator[None]:
    """A context in which no other run of the verb writes to the workdir; only the primary host enters it.

    Two runs would remove each other's unfinished checkpoints. Network disks without locks are not protected. Raises
    UserError: another run did not end in `seconds`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (lease if is_object_store(workdir) else _file_lock)(workdir, seconds, verb):
        yield


@contextlib.contextmanager
def _file_lock(workdir: epath.Path, seconds: float, verb: str) -> Iterator[None]:
    # filelock's fallback (3.32) does not keep a second run out either, and hides that there is no lock.
    lock = filelock.FileLock(os.fspath(workdir / LOCK_FILE), fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("another `%s` is writing to %s: waiting for its end", verb, workdir)
            lock.acquire(timeout=seconds)
    except filelock.Timeout as error:
        raise _refusal(f"another `{verb}`", workdir, seconds) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s is on a disk without locks: do not start a second run there", workdir)
    try:
        yield
    finally:
        lock.release()


def _refusal(other: str, workdir: epath.Path, seconds: float) -> UserError:
    return UserError(
        f"{other} has been writing to {workdir} for more than {seconds:g} s: wait until it has ended, or use another"
        " --workdir"
    )


@contextlib.contextmanager
def lease(directory: epath.Path, seconds: float, verb: str = "lemur train") -> Iterator[None]:
    """A context in which no other lease of the directory is held, on any machine.

    If another run takes over, as can happen while this process is suspended for longer than `EXPIRE_SECONDS`, this
    process ends. Raises UserError: another run that is alive did not end in `seconds`.
    """
    file, run_id = directory / LEASE_FILE, uuid.uuid4().hex
    _take(file, run_id, seconds, verb)
    stopped = threading.Event()
    thread = threading.Thread(target=_renew, args=(file, run_id, stopped), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(RELEASE_SECONDS)
        with contextlib.suppress(Exception):  # otherwise the next run waits until the lease expires
            if run_id in (_read(file) or ""):
                file.unlink()


def _take(file: epath.Path, run_id: str, seconds: float, verb: str) -> None:
    began = since = time.monotonic()
    logged, last_text = False, None
    while True:
        text, now = _read(file), time.monotonic()
        if text != last_text:
            last_text, since = text, now
        if text is None or now - since > EXPIRE_SECONDS:
            _write(file, run_id, 0)
            time.sleep(SETTLE_SECONDS)
            if run_id in (_read(file) or ""):
                return
            continue
        other = f"another `{verb}` ({_holder(text)})"
        if now - began > seconds:
            raise _refusal(other, file.parent, seconds)
        if not logged:
            logger.info(
                "%s is writing to %s: waiting for its end, or for %g s without a sign of life",
                *(other, file.parent, EXPIRE_SECONDS),
            )
            logged = True
        time.sleep(min(1.0, EXPIRE_SECONDS / 10))


def _renew(file: epath.Path, run_id: str, stopped: threading.Event) -> None:
    for beat in itertools.count(1):
        if stopped.wait(RENEW_SECONDS):
            return
        with contextlib.suppress(Exception):  # a store out of reach: saves report it
            text = _read(file)
            if text is not None and run_id not in text:
                end_process(
                    USER_ERROR,
                    f"{file.parent} has been taken over by another run ({_holder(text)}), as this one gave no sign of"
                    " life for a while; this one ends, and saves nothing more",
                )
            _write(file, run_id, beat)


def _read(file: epath.Path) -> str | None:
    try:
        return file.read_text() if file.exists() else None
    except FileNotFoundError:  # removed since
        return None


def _write(file: epath.Path, run_id: str, beat: int) -> None:
    # Always of the same length: stores that cache sizes may keep the old one for a while.
    file.write_text(f"{socket.gethostname()}, process {os.getpid()}, run {run_id}, beat {beat:010d}")


def _holder(text: str) -> str:
    return text.partition(", run ")[0]
