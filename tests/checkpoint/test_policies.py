"""Which checkpoints stay, what a save may be given, and saves that the storage refuses."""

import contextlib
import errno
import functools
import math
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lemur_jax.checkpoint import manager
from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.reading import steps_in
from lemur_jax.checkpoint.streaming import Streamed, write_params
from lemur_jax.common.errors import UserError
from tests.helpers.limits import files_of_at_most

METADATA = make_metadata(model={}, tokenizer_files={})
full_disk = functools.partial(files_of_at_most, 4096)


@pytest.fixture(scope="module")
def state():
    params = {"final_norm": jnp.ones(64), "w": jnp.arange(1 << 16, dtype=jnp.float32)}
    return types.SimpleNamespace(params=params, optimizer=jax.tree.map(jnp.zeros_like, params))


@pytest.fixture
def slow_storage(monkeypatch):
    """No checkpoint is finished before this event is set."""
    slow = threading.Event()

    def wait(self, directory):
        assert slow.wait(60)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "finalize", wait, raising=False)
    return slow


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("lemur_jax")]


def test_keeps_newest_every_fourth_and_the_best(state, tmp_path):
    small = {"w": state.params["final_norm"]}
    with manager.Checkpoints(tmp_path, keep=2, keep_every=4, keep_best="text") as checkpoints:
        for step, loss in enumerate([math.nan, 2.0, 1.0, 4.0, math.nan, None, 6.0, None, None], start=1):
            losses = {} if loss is None else {"code": -loss, "text": loss}
            checkpoints.save(step, small, small, METADATA, losses)
    assert steps_in(tmp_path)[1] == [3, 4, 8, 9]


def test_the_best_of_an_earlier_version_stays_until_a_better_one(state, tmp_path):
    """Its losses have no name."""
    small = {"w": state.params["final_norm"]}
    for losses in ([{"loss": 2.0}, {"loss": 1.0}, {"loss": 3.0}], [{"text": 4.0}], [{"text": 0.5}, {}]):
        with manager.Checkpoints(tmp_path, keep=1, keep_best="text") as checkpoints:
            for loss in losses:
                checkpoints.save(checkpoints.finished + 1, small, small, METADATA, loss)
                checkpoints.wait()
            kept = checkpoints.finished
        if {"text": 4.0} in losses:
            assert steps_in(tmp_path)[1] == [2, kept]
    assert steps_in(tmp_path)[1] == [5, 6]


def test_save_returns_before_the_files_are_there_and_the_arrays_may_be_overwritten(tmp_path, slow_storage):
    """The step is invisible until its files are there, and holds what was given, neither more nor less."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    leaf = jax.device_put(np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32), sharding)
    abstract = {"w": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)}
    doubled = jax.jit(lambda trees: jax.tree.map(lambda leaf: leaf * 2, trees), donate_argnums=0)
    trees = doubled({"params": {"w": leaf}, "optimizer": {"w": leaf + 1}})
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), trees)
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **trees, metadata=METADATA)
        trees = jax.block_until_ready(doubled(trees))
        assert not (tmp_path / "1").exists()
        with pytest.raises(UserError, match="no finished checkpoint"):
            steps_in(tmp_path)
        checkpoints.poll()  # does not wait
        slow_storage.set()
        checkpoints.wait()
        found = checkpoints.restore(1, abstract, abstract)
    jax.tree.map(np.testing.assert_array_equal, found, (expected["params"], expected["optimizer"]))


def test_a_save_that_waits_for_the_one_before_it_says_so(state, tmp_path, monkeypatch, slow_storage, caplog):
    monkeypatch.setattr(manager, "_LOG_SECONDS", 0.1)
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        threading.Timer(0.3, slow_storage.set).start()
        checkpoints.save(2, state.params, state.optimizer, METADATA)
    expected = f"the checkpoint of step 1 is not yet written to {tmp_path} after 0.1 s: waiting for its end"
    assert messages(caplog)[0] == expected


@contextlib.contextmanager
def no_directories():
    """The system refuses to make any, as a disk without inodes does, or storage whose permissions have ended."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        yield


@pytest.mark.parametrize("refusing", [full_disk, no_directories])
def test_refused_writes_are_reported_and_tried_again(state, tmp_path, caplog, refusing):
    with manager.Checkpoints(tmp_path, max_failures=3) as checkpoints:
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        checkpoints.wait()
        assert not checkpoints.failed
        with refusing():
            checkpoints.save(2, state.params, state.optimizer, METADATA)
            checkpoints.wait()
        assert checkpoints.failed
        (warning,) = messages(caplog)
        assert "step 2 could not be saved" in warning
        assert "failure 1 of at most 3" in warning
        assert "newest one there is of step 1" in warning
        assert steps_in(tmp_path)[1] == [1]
        checkpoints.save(2, state.params, state.optimizer, METADATA)
        assert not checkpoints.failed  # the next attempt has begun
        checkpoints.wait()
        assert not checkpoints.failed
        assert checkpoints.finished == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}  # nothing of the failed save takes space
    assert len(messages(caplog)) == 1


def test_too_many_failures_in_a_row_stop(state, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(manager, "_LAST_WRITES_SECONDS", 0.1)
    checkpoints = manager.Checkpoints(tmp_path, max_failures=2)
    with full_disk():
        checkpoints.save(1, state.params, state.optimizer, METADATA)
        checkpoints.save(2, state.params, state.optimizer, METADATA)  # reports the first
        with pytest.raises(UserError, match=r"failure 2 of at most 2 in a row.*Free space"):
            checkpoints.wait()
    assert len(messages(caplog)) == 1


def test_an_interrupted_import_does_not_go_on_to_its_end(tmp_path):
    read = []

    def piece(number):
        read.append(number)
        if len(read) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return np.ones((1, 64), np.float32)

    leaf = Streamed(shape=(100, 64), dtype=np.dtype("float32"), pieces=100, read=piece)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = threading.active_count()
    try:
        with pytest.raises(KeyboardInterrupt):
            write_params(tmp_path, {"w": leaf}, METADATA)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(read) < 50
    assert threading.active_count() <= threads
