"""One run at a time in a workdir. Directories of a disk stand for those of an object store."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest
from etils import epath

from lemur_jax.cluster import lock
from lemur_jax.cluster.lock import LEASE_FILE, lease, workdir_lock
from lemur_jax.common.errors import UserError
from tests.helpers.processes import hold_workdir

SHORT = {"RENEW_SECONDS": 0.2, "EXPIRE_SECONDS": 2.0, "SETTLE_SECONDS": 0.2}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, seconds in SHORT.items():
        monkeypatch.setattr(lock, name, seconds)


def hold(directory, ready, release):
    vars(lock).update(SHORT)
    with lease(epath.Path(directory), 60):
        ready.set()
        release.wait()


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lease of the directory, until its event is set."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start():
        ready, release = context.Event(), context.Event()
        process = context.Process(target=hold, args=(str(tmp_path), ready, release))
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process, release

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.process
def test_another_lease_is_waited_for_and_never_disturbed(holder, tmp_path, caplog):
    first, release = holder()
    refused = pytest.raises(
        UserError, match=f"process {first.pid}\\) has been writing to .* for more than 3 s"
    )
    with refused, lease(epath.Path(tmp_path), 3):  # longer than the lease of a killed one
        raise AssertionError
    assert first.is_alive()
    caplog.clear()
    threading.Timer(0.5, release.set).start()
    with lease(epath.Path(tmp_path), 60):
        first.join(30)
        assert first.exitcode == 0
        assert f"process {first.pid}) is writing to {tmp_path}" in caplog.messages[0]
        assert len(caplog.messages) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_the_lease_of_a_stopped_or_killed_run_expires(holder, tmp_path):
    """One that wakes up again ends by its exit status 2, and does not remove the file of the other."""
    first, _ = holder()
    os.kill(first.pid, signal.SIGSTOP)
    began = time.monotonic()
    with lease(epath.Path(tmp_path), 60):
        assert time.monotonic() - began >= lock.EXPIRE_SECONDS
        os.kill(first.pid, signal.SIGCONT)
        first.join(60)
        assert first.exitcode == 2
        assert (tmp_path / LEASE_FILE).exists()


def test_of_two_that_find_the_place_free_the_last_writer_has_it(tmp_path, monkeypatch, caplog):
    pauses, pause = [], time.sleep

    def settle(seconds):
        if not pauses:
            (tmp_path / LEASE_FILE).write_text("other, process 7, run x, beat 0")
        pauses.append(seconds)
        pause(min(seconds, 0.05))

    monkeypatch.setattr(lock.time, "sleep", settle)
    monkeypatch.setattr(lock, "EXPIRE_SECONDS", 0.5)
    with lease(epath.Path(tmp_path), 60):
        assert "another `lemur train` (other, process 7)" in caplog.messages[0]


def test_a_store_out_of_reach_ends_nothing(tmp_path, monkeypatch):
    ended, tried = [], threading.Event()

    def refuse(*_):
        tried.set()
        raise OSError("no network")

    monkeypatch.setattr(lock, "end_process", lambda *arguments: ended.append(arguments))
    with lease(epath.Path(tmp_path), 0):
        monkeypatch.setattr(lock, "_read", refuse)
        assert tried.wait(30)
    assert not ended


def test_on_a_disk_a_second_run_waits_and_a_killed_one_leaves_the_workdir_free(tmp_path, caplog):
    workdir = epath.Path(tmp_path / "run")
    first = hold_workdir(workdir)
    refused = pytest.raises(
        UserError, match="another `lemur train` has been writing to .* for more than 0.1 s"
    )
    with refused, workdir_lock(workdir, seconds=0.1):
        raise AssertionError
    assert caplog.messages == [f"another `lemur train` is writing to {workdir}: waiting for its end"]
    threading.Timer(0.2, first.kill).start()
    with workdir_lock(workdir):
        assert first.wait() == -signal.SIGKILL


def test_on_a_disk_without_locks_each_run_is_warned(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        if operation & fcntl.LOCK_EX:
            raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdir_lock(epath.Path(tmp_path)), workdir_lock(epath.Path(tmp_path)):
        pass
    assert caplog.messages == [f"{tmp_path} is on a disk without locks: do not start a second run there"] * 2
