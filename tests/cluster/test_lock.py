"""One run at a time in a workdir. Directories of a disk stand for those of an object store."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from etils import epath

from lemur_jax.cluster import lock
from lemur_jax.cluster.lock import LEASE_FILE, LeaseTimes, lease, workdir_lock
from lemur_jax.common.errors import UserError
from tests.helpers.processes import hold_workdir

SHORT = LeaseTimes(renew=0.2, expire=2.0, settle=0.2)


def hold(directory, ready, release):
    with lease(epath.Path(directory), 60, SHORT):
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


def test_another_lease_is_waited_for_and_never_disturbed(holder, tmp_path, caplog):
    first, release = holder()
    refused = pytest.raises(
        UserError, match=f"process {first.pid}\\) has been writing to .* for more than 3 s"
    )
    with refused, lease(epath.Path(tmp_path), 3, SHORT):  # longer than the lease of a killed one
        raise AssertionError
    assert first.is_alive()
    caplog.clear()
    threading.Timer(0.5, release.set).start()
    with lease(epath.Path(tmp_path), 60, SHORT):
        first.join(30)
        assert first.exitcode == 0
        assert f"process {first.pid}) is writing to {tmp_path}" in caplog.messages[0]
        assert len(caplog.messages) == 1
    assert not list(tmp_path.iterdir())


def test_the_lease_of_a_stopped_or_killed_run_expires(holder, tmp_path):
    """One that wakes up again ends by its exit status 2, and does not remove the file of the other."""
    first, _ = holder()
    lost = []
    os.kill(first.pid, signal.SIGSTOP)
    began = time.monotonic()
    with lease(epath.Path(tmp_path), 60, SHORT, lost=lost.append):
        assert time.monotonic() - began >= SHORT.expire
        os.kill(first.pid, signal.SIGCONT)
        first.join(60)
        assert first.exitcode == 2
        assert (tmp_path / LEASE_FILE).exists()
    assert not lost


def test_of_two_that_find_the_place_free_the_last_writer_has_it(tmp_path, monkeypatch, caplog):
    other = json.dumps({"host": "other", "process": 7, "run": "x", "beat": "0"})
    pauses, pause = [], time.sleep

    def settle(seconds):
        if not pauses:
            (tmp_path / LEASE_FILE).write_text(other)
        pauses.append(seconds)
        pause(min(seconds, 0.05))

    monkeypatch.setattr(lock.time, "sleep", settle)
    with lease(epath.Path(tmp_path), 60, LeaseTimes(renew=9, expire=0.5)):
        assert "another `lemur train` (other, process 7)" in caplog.messages[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_an_unreadable_lease_expires_too(tmp_path, text, caplog):
    (tmp_path / LEASE_FILE).write_text(text)
    with lease(epath.Path(tmp_path), 60, LeaseTimes(renew=9, expire=0.3, settle=0.05)):
        assert "(of unknown name)" in caplog.messages[0]


def test_a_store_out_of_reach_ends_nothing(tmp_path, monkeypatch):
    lost, tried = [], threading.Event()

    def refuse(*_):
        tried.set()
        raise OSError("no network")

    with lease(epath.Path(tmp_path), 0, LeaseTimes(renew=0.05, expire=1, settle=0.05), lost=lost.append):
        monkeypatch.setattr(lock, "_read", refuse)
        assert tried.wait(30)
    assert not lost


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
