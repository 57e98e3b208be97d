"""Which checkpoints stay, and saves that the storage refuses."""

import contextlib
import errno
import gc
import os
import resource
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint import echoes, manager
from lemur_jax.checkpoint.metadata import LateJsonHandler
from lemur_jax.checkpoint.streaming import Streamed
from lemur_jax.common.errors import UserError
from tests.helpers.tiny import first_state, program_on

METADATA = manager.make_metadata(model={}, tokenizer_files={})


@pytest.fixture(scope="module")
def state():
    return first_state(program_on((1, 1, 1, 1)))


def test_keeps_newest_every_fourth_and_the_best(state, tmp_path):
    with manager.Checkpoints(tmp_path, keep=2, keep_every=4, keep_best=1) as checkpoints:
        for step, loss in enumerate([3.0, 2.0, 1.0, 4.0, 5.0, None, 6.0, None, None], start=1):
            checkpoints.save(step, state.params, state.optimizer, METADATA, loss)
    assert manager.steps_in(tmp_path)[1] == [3, 4, 8, 9]


def slow_storage(monkeypatch):
    """No checkpoint is committed before the event that it gives is set."""
    slow, finalize = threading.Event(), LateJsonHandler.finalize

    def wait(self, directory):
        assert slow.wait(60)
        finalize(self, directory)

    monkeypatch.setattr(LateJsonHandler, "finalize", wait)
    return slow


def test_save_returns_before_the_files_are_there_and_the_arrays_may_go(tmp_path, monkeypatch):
    """Storage that takes as long as it likes: the step is invisible until then, and holds what was given."""
    program = program_on((1, 4, 1, 2))
    state = first_state(program)
    expected = jax.device_get((state.params, state.optimizer))
    slow = slow_storage(monkeypatch)
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        jax.tree.map(lambda array: array.delete(), (state.params, state.optimizer))  # as donation does
        assert not slow.is_set()
        assert not (tmp_path / "1").exists()
        with pytest.raises(UserError, match="no finished checkpoint"):
            manager.steps_in(tmp_path)
        slow.set()
        checkpoints.wait()
        found = checkpoints.restore(1, program.state.params, program.state.optimizer)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def test_a_save_that_waits_for_the_one_before_it_says_so(state, tmp_path, monkeypatch):
    finalize, lines = LateJsonHandler.finalize, []

    def slowly(self, directory):
        time.sleep(0.5)
        finalize(self, directory)

    monkeypatch.setattr(LateJsonHandler, "finalize", slowly)
    with manager.Checkpoints(tmp_path, say=lines.append) as checkpoints:
        for patience in (60.0, 0.1):
            monkeypatch.setattr(manager, "_LONG_WAIT_SECONDS", patience)
            monkeypatch.setattr(manager, "_WORD_SECONDS", patience)
            for step in (1, 2):
                checkpoints.save(step + 10 * (patience < 1), state.params, state.optimizer, METADATA)
    assert [line for line in lines if line.startswith("the save of step 12 waited")]
    waiting = f"waiting for the checkpoint of step 12 to be written to {tmp_path}: "
    assert [line for line in lines if line.startswith(waiting) and line.endswith(" s so far")]
    assert not [line for line in lines if "save of step 2 " in line or "step 1 " in line]


@contextlib.contextmanager
def full_disk():
    """The system refuses to let any file grow over 4 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


@contextlib.contextmanager
def no_directories():
    """The system refuses to make any, as a disk without inodes does, or storage to which rights have ended."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        yield


def left_of_orbax():
    """Its threads that still save, a moment from now."""
    deadline = time.monotonic() + 10
    while True:
        left = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax.")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


@pytest.fixture
def unraisable(monkeypatch, caplog):
    """What reaches the terminal from C++; nothing that tests before this one left behind, there or in the log."""
    gc.collect()
    caplog.clear()
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda late: found.append(str(late.exc_value)))
    echoes._listen.cache_clear()  # wraps that hook
    return found


@pytest.mark.parametrize("refusing", [full_disk, no_directories])
def test_refused_writes_are_reported_and_tried_again(state, tmp_path, caplog, unraisable, recwarn, refusing):
    lines = []
    checkpoints = manager.Checkpoints(tmp_path, max_failures=3, say=lines.append)
    checkpoints.save(1, state.params, state.optimizer, METADATA)
    checkpoints.wait()
    assert not checkpoints.failed
    began = time.monotonic()
    with refusing():
        checkpoints.save(2, state.params, state.optimizer, METADATA)
        checkpoints.wait()
    assert checkpoints.failed
    assert (
        not left_of_orbax()
    )  # one that waits in vain would hold the arrays, and the end of the process, for 300 s
    assert time.monotonic() - began < 60
    assert "step 2 could not be saved" in lines[0]
    assert "failure 1 of at most 3" in lines[0]
    assert "newest one there is of step 1" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # nothing half written takes room
    checkpoints.save(2, state.params, state.optimizer, METADATA)
    checkpoints.wait()
    assert not checkpoints.failed
    assert checkpoints.latest_step() == 2
    assert len(lines) == 1
    checkpoints.close()
    gc.collect()
    # Tracebacks of Orbax and TensorStore would hide that line.
    assert not [record.getMessage() for record in caplog.records if record.name in ("absl", "asyncio")]
    assert "Event loop is closed" not in unraisable
    assert not [str(found.message) for found in recwarn if "never awaited" in str(found.message)]


def test_too_many_failures_in_a_row_stop(state, tmp_path):
    lines = []
    checkpoints = manager.Checkpoints(tmp_path, max_failures=2, say=lines.append)
    with full_disk():
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        checkpoints.save(2, state.params, state.optimizer, METADATA)  # reports the first
        with pytest.raises(UserError, match=r"failure 2 of at most 2 in a row.*Make room"):
            checkpoints.wait()
    assert len(lines) == 1


def test_parameters_that_cannot_be_written_leave_nothing_that_waits(tmp_path):
    """Neither an import nor the end of its process is held up."""
    began = time.monotonic()
    with no_directories(), pytest.raises(OSError, match="No space left"):
        manager.write_params(tmp_path, {"w": np.ones((64, 64), np.float32)}, METADATA)
    assert not left_of_orbax()
    assert time.monotonic() - began < 60
    manager.write_params(tmp_path, {"w": np.ones((64, 64), np.float32)}, METADATA)
    assert manager.steps_in(tmp_path)[1] == [0]


@pytest.mark.parametrize("main_thread", [True, False])
def test_an_interrupted_import_does_not_go_on_to_its_end(tmp_path, main_thread):
    """Whichever thread the system gives the signal to."""
    read = []
    thread = threading.main_thread().ident if main_thread else None

    def piece(number):
        read.append(number)
        if len(read) == 3:
            signal.pthread_kill(thread or threading.get_ident(), signal.SIGINT)
        time.sleep(0.2)
        return np.ones((1, 64), np.float32)

    leaf = Streamed(shape=(100, 64), dtype=np.dtype("float32"), pieces=100, read=piece)
    # A process of many that test ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            manager.write_params(tmp_path, {"w": leaf}, METADATA)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(read) < 50
    assert not left_of_orbax()


def test_a_clock_that_is_put_forward_by_an_hour_fails_no_save(state, tmp_path, monkeypatch):
    """Nor does a save that takes so long; by Orbax's own limit it has 20 minutes."""
    go, clock = slow_storage(monkeypatch), time.time
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        monkeypatch.setattr(time, "time", lambda: clock() + 3600)
        time.sleep(0.5)
        go.set()
        checkpoints.wait()
        assert not checkpoints.failed
    assert manager.steps_in(tmp_path)[1] == [1]


@pytest.mark.parametrize("failed", [True, False])
def test_closing_says_nothing_twice(state, tmp_path, monkeypatch, failed):
    """A thread of a failed save that raises when Orbax is closed; without a failed save it is news."""
    checkpoints = manager.Checkpoints(tmp_path, max_failures=3, say=lambda _: None)
    with full_disk() if failed else contextlib.nullcontext():
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        checkpoints.wait()

    def late():
        raise ValueError("File too large")

    monkeypatch.setattr(checkpoints._manager, "close", late)
    with contextlib.nullcontext() if failed else pytest.raises(ValueError, match="File too large"):
        checkpoints.close()
