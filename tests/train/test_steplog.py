"""What the records say about the clock and the machine, with a clock that the test turns."""

import types

import numpy as np
import pytest

from lemur_jax.models.presets import preset
from lemur_jax.train import steplog
from lemur_jax.train.steplog import CLOCK_KEYS, StepLog

LENGTH, ROWS = 4096, 256


class Clock:
    now = 1000.0

    def perf_counter(self):
        return self.now


class Keep(list):
    """Writer and progress."""

    write = list.append

    def __bool__(self):
        return True

    def set(self, **_): ...
    def update(self, _): ...


def program(kind, devices):
    """Only what the log looks at."""
    device = types.SimpleNamespace(device_kind=kind)
    mesh = types.SimpleNamespace(size=devices, devices=np.array([device] * devices))
    tokens = types.SimpleNamespace(shape=(ROWS, LENGTH))
    return types.SimpleNamespace(model=preset("llama2_70b"), mesh=mesh, batch={"tokens": tokens})


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(steplog, "time", clock)
    return clock


@pytest.fixture
def memory(monkeypatch):
    """Two local devices, of which the second is fuller."""
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 10}, {"bytes_in_use": 6, "peak_bytes_in_use": 9}]
    devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(steplog.jax, "local_devices", lambda: devices)


def run(clock, steps=4, kind="TPU v4", devices=256):
    """Steps of 10 s of which 1 s waits for data, after 3 s of start and 60 s of compiling."""
    mixture = types.SimpleNamespace(
        sources=[types.SimpleNamespace(name="code")], batch_rows=ROWS, length=LENGTH
    )
    writer = Keep()
    log = StepLog(writer, Keep(), mixture, tokens=0, program=program(kind, devices), began=clock.now - 7.0)
    keys = ("loss", "learning_rate", "grad_norm", "param_norm", "update_norm")
    metrics = {key: np.float32(1.5) for key in keys}
    metrics |= {"target_tokens": np.float32(1000), "finite_rows": np.ones(ROWS, bool)}
    metrics |= {"source_loss": np.ones(1), "source_weight": np.ones(1)}

    def batches():
        for step in range(steps):
            clock.now += 1.0
            yield step

    for step in log.waiting(batches()):
        clock.now += 60.0 if step == 0 else 0.0
        log.add(step + 1, metrics)
        clock.now += 9.0
        if step == 1:
            log.flush()
            with log.paused("eval"):
                clock.now += 5.0
            with log.paused("checkpoint"):
                clock.now += 2.0
    log.flush()
    log.write_time(steps)
    return writer


def test_seconds_go_where_they_went(clock, memory):
    *records, spent = run(clock)
    assert [record["seconds"] for record in records] == pytest.approx([10.0] * 4)
    assert [record["data_wait_seconds"] for record in records] == pytest.approx([1.0] * 4)
    assert spent == pytest.approx({
        "step": 4, "kind": "time", "wall_seconds": 7 + 4 * 10 + 60 + 5 + 2, "startup_seconds": 7.0,
        "compile_seconds": 60.0, "data_wait_seconds": 4.0, "steps_seconds": 36.0, "eval_seconds": 5.0,
        "checkpoint_seconds": 2.0, "goodput": 36 / 114,
    })  # fmt: skip


def test_utilization_of_a_known_chip(clock, memory):
    record = run(clock)[0]
    speed = ROWS * LENGTH / 10.0  # computed tokens, not only targets
    assert record["tokens_per_second_per_chip"] == pytest.approx(speed / 256)
    assert record["mfu"] == pytest.approx(speed * 428.4e9 / (256 * 275e12), rel=1e-3)
    assert (record["hbm_bytes"], record["hbm_peak_bytes"]) == (6, 10)


def test_two_devices_of_a_chip_are_one_chip(clock, memory):
    ironwood = run(clock, kind="TPU7x", devices=128)[0]
    assert ironwood["tokens_per_second_per_chip"] == pytest.approx(ROWS * LENGTH / 10.0 / 64)


def test_nothing_is_said_of_an_unknown_chip(clock):
    record = run(clock, kind="cpu", devices=1)[0]
    assert not {"mfu", "tokens_per_second_per_chip", "hbm_bytes"} & record.keys()
    assert {"seconds", "data_wait_seconds", "tokens_per_second"} <= set(CLOCK_KEYS) & record.keys()


def test_reader_is_closed_when_the_loop_is_left(clock):
    closed = []

    def batches():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    mixture = types.SimpleNamespace(sources=[], batch_rows=1, length=1)
    waiting = StepLog(None, Keep(), mixture, tokens=0).waiting(batches())
    next(waiting)
    waiting.close()
    assert closed == [True]
