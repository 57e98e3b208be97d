"""One run at a time where there are no locks. Directories of a disk stand for those of an object store."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from etils import epath

from lemur_jax.cluster import lease as leases
from lemur_jax.cluster.lease import FILE, lease
from lemur_jax.common.errors import UserError

SHORT = {"beat_seconds": 0.2, "silence_seconds": 5.0}


def hold(directory, seconds, ready=None):
    with lease(epath.Path(directory), print, 60, **SHORT):
        if ready is not None:
            ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the directory."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start(seconds):
        ready = context.Event()
        process = context.Process(target=hold, args=(str(tmp_path), seconds, ready))
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_another_run_is_waited_for(holder, tmp_path):
    first, said = holder(10), []  # longer than the silence of a killed one
    with lease(epath.Path(tmp_path), said.append, 60, **SHORT):
        first.join(30)
        assert first.exitcode == 0
        assert f"process {first.pid}) writes to {tmp_path}" in said[0]
        assert len(said) == 1
    assert not list(tmp_path.iterdir())
    with lease(epath.Path(tmp_path), said.append, 0, **SHORT):
        assert len(said) == 1


def test_one_that_goes_on_is_not_disturbed(holder, tmp_path):
    first = holder(600)
    refused = pytest.raises(UserError, match=f"process {first.pid}\\) writes to .* since more than 7 s")
    with refused, lease(epath.Path(tmp_path), lambda line: None, 7, **SHORT):
        raise AssertionError
    assert first.is_alive()


def test_one_that_was_killed_is_waited_for_no_longer_than_its_silence(holder, tmp_path):
    first = holder(600)
    first.kill()
    first.join()
    began = time.monotonic()
    with lease(epath.Path(tmp_path), lambda line: None, 60, **SHORT):
        assert time.monotonic() - began >= SHORT["silence_seconds"]


def test_one_that_slept_meanwhile_ends(holder, tmp_path):
    """By its exit status 2, and does not take away the file of the other."""
    first, lost = holder(600), []
    os.kill(first.pid, signal.SIGSTOP)
    with lease(epath.Path(tmp_path), lambda line: None, 60, **SHORT, lost=lost.append):
        os.kill(first.pid, signal.SIGCONT)
        first.join(60)
        assert first.exitcode == 2
        assert (tmp_path / FILE).exists()
    assert not lost


def test_of_two_that_find_the_place_free_the_last_one_has_it(tmp_path, monkeypatch):
    other = json.dumps({"host": "other", "process": 7, "run": "x", "beat": "0"})
    pauses, pause = [], time.sleep

    def settle(seconds):
        if not pauses:
            (tmp_path / FILE).write_text(other)
        pauses.append(seconds)
        pause(min(seconds, 0.05))

    monkeypatch.setattr(leases.time, "sleep", settle)
    said = []
    with lease(epath.Path(tmp_path), said.append, 60, beat_seconds=9, silence_seconds=0.5):
        assert "another `lemur train` (other, process 7)" in said[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_a_file_that_says_nothing_is_waited_for_too(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    said = []
    with lease(epath.Path(tmp_path), said.append, 60, beat_seconds=9, silence_seconds=0.3):
        assert "(of unknown name)" in said[0]


def test_a_store_out_of_reach_ends_nothing(tmp_path, monkeypatch):
    lost, tried = [], threading.Event()

    def refuse(*_):
        tried.set()
        raise OSError("no network")

    with lease(epath.Path(tmp_path), print, 0, beat_seconds=0.05, silence_seconds=1, lost=lost.append):
        monkeypatch.setattr(leases, "_read", refuse)
        assert tried.wait(30)
    assert not lost
