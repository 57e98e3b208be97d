"""What the records say about the clock and the machine, with a clock that the test turns."""

import collections
import os
import re
import types

import numpy as np
import pytest

from lemur_jax.cluster import coordination
from lemur_jax.models.presets import preset
from lemur_jax.telemetry import goodput
from lemur_jax.telemetry.metrics import MetricsWriter
from lemur_jax.train import steplog
from lemur_jax.train.history import RunHistory
from lemur_jax.train.steplog import StepLog
from tests.helpers.runs import CLOCK_KEYS, documented

LENGTH, ROWS = 4096, 256


class Clock:
    now = 1000.0

    def perf_counter(self):
        return self.now

    def time(self):
        return 1_000_000 + self.now


class Keep(list):
    """Writer and progress."""

    write = list.append

    def __bool__(self):
        return True

    def set_postfix_str(self, _, refresh): ...
    def update(self, _): ...


def program(kind, devices):
    """Only what the log looks at."""
    device = types.SimpleNamespace(device_kind=kind)
    mesh = types.SimpleNamespace(size=devices, devices=np.array([device] * devices))
    tokens = types.SimpleNamespace(shape=(ROWS, LENGTH))
    return types.SimpleNamespace(
        compute=types.SimpleNamespace(frozen=False),
        model=preset("llama2_70b"),
        mesh=mesh,
        batch={"tokens": tokens},
    )


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(steplog, "time", clock)
    monkeypatch.setattr(goodput, "time", clock)
    return clock


@pytest.fixture
def memory(monkeypatch):
    """Two local devices; the second has more memory in use."""
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 10}, {"bytes_in_use": 6, "peak_bytes_in_use": 9}]
    devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(steplog.jax, "local_devices", lambda: devices)


def run(clock, steps=4, kind="TPU v4", devices=256, spent=None, handing=0.0, **more):
    """Steps of 10 s, 1 s of it waiting for data, after a start of 3 s and 60 s of compiling."""
    mixture = types.SimpleNamespace(
        sources=[types.SimpleNamespace(name="code")],
        batch_rows=ROWS,
        length=LENGTH,
        documents=lambda step, places: [f"code/{place}" for place in places],
    )
    writer = Keep()
    log = StepLog(
        RunHistory(writer=writer, spent=spent or {}),
        Keep(),
        mixture,
        program(kind, devices),
        clock.now - 7.0,
        {},
    )
    keys = ("loss", "learning_rate", "grad_norm", "param_norm", "update_norm")
    metrics = {key: np.float32(1.5) for key in keys}
    metrics |= {"source_loss": np.ones(1), "source_weight": np.ones(1), "source_tokens": np.array([1000])}
    metrics |= {"finite_rows": np.ones(ROWS, bool)}
    metrics |= more

    def batches():
        for step in range(steps):
            clock.now += 1.0
            yield step

    for step in log.waiting(batches()):
        clock.now += 60.0 if step == 0 else handing
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
    parts = {
        "startup": 7.0, "compile": 60.0, "data_wait": 4.0, "steps": 36.0, "eval": 5.0, "checkpoint": 2.0,
        "lost": 0.0, "down": 0.0, "other": 0.0,
    }  # fmt: skip
    assert spent == pytest.approx({
        "step": 4, "kind": "time", "checkpoint": 0, "wall_seconds": 7 + 4 * 10 + 60 + 5 + 2, "goodput": 36 / 114,
        "unix_seconds": 1_000_000 + clock.now, **{f"{part}_seconds": value for part, value in parts.items()},
    })  # fmt: skip
    assert [record["tokens/code"] for record in records] == [1000, 2000, 3000, 4000]


def test_goodput_counts_from_the_first_start(clock, memory, tmp_path):
    """Saved at step 4, killed 20 s later, started again after another 30 s."""
    first = run(clock)
    with MetricsWriter(tmp_path) as writer:
        for record in first:
            writer.write(record)
        writer.write({"step": 5, "kind": "train", "loss": 1.0})  # lost
    killed = first[-1]["unix_seconds"] + 20
    os.utime(tmp_path / "metrics.jsonl", (killed, killed))
    spent = goodput.earlier_time(tmp_path, 4, killed + 30)
    assert (spent["lost"], spent["down"], spent["wall"]) == pytest.approx((20, 30, 114 + 50))
    last = run(clock, spent=spent)[-1]
    assert last["steps_seconds"] == pytest.approx(72)
    assert last["compile_seconds"] == pytest.approx(120)
    assert (last["lost_seconds"], last["down_seconds"]) == pytest.approx((20, 30))
    assert last["goodput"] == pytest.approx(72 / last["wall_seconds"])
    assert sum(last[f"{part}_seconds"] for part in (*goodput.PARTS, "other")) == pytest.approx(
        last["wall_seconds"]
    )
    assert goodput.earlier_time(tmp_path / "absent", 0, killed) == {}


def test_every_key_is_documented_and_every_documented_key_is_written(clock, memory, monkeypatch):
    """Of records of training and time here; those of evaluation are in test_resume.py."""
    monkeypatch.setattr(coordination, "published", lambda _: {0: 1.0, 1: 2.0})
    more = {"skips_in_a_row": np.int32(1), "grad_norm_limit": np.float32(1.2), "row_loss": np.ones(ROWS)}
    more |= {f"objective/router_{name}": np.float32(1.0) for name in ("balance", "z", "max_load")}
    written = collections.defaultdict(set)
    for record in run(clock, **more):
        written[record["kind"]] |= {
            re.sub("/code$", "/SOURCE", re.sub("/[01]$", "/N", key)) for key in record
        }
    for kind in ("train", "skip", "time"):
        assert written[kind] - {"kind"} - {"step"} == documented()[kind] - {"step"}


def test_utilization_of_a_known_chip(clock, memory):
    record = run(clock)[0]
    speed = ROWS * LENGTH / 10.0  # computed tokens, not only targets
    assert record["tokens_per_second_per_chip"] == pytest.approx(speed / 256)
    assert record["mfu"] == pytest.approx(speed * 428.4e9 / (256 * 275e12), rel=1e-3)
    assert (record["hbm_bytes"], record["hbm_peak_bytes"]) == (6, 10)
    ironwood = run(clock, kind="TPU7x", devices=128)[0]
    assert ironwood["tokens_per_second_per_chip"] == pytest.approx(speed / 64)  # of two devices each


def test_nothing_is_said_of_an_unknown_chip(clock):
    record = run(clock, kind="cpu", devices=1)[0]
    assert not {"mfu", "tokens_per_second_per_chip", "hbm_bytes"} & record.keys()
    assert {"seconds", "data_wait_seconds", "tokens_per_second"} <= set(CLOCK_KEYS) & record.keys()


@pytest.mark.parametrize("handing", [0.0, 4.0])
def test_a_host_that_waits_for_room_on_its_devices_is_no_straggler(clock, monkeypatch, handing):
    told = []
    monkeypatch.setattr(coordination, "publish", lambda name, value: told.append(value))
    run(clock, handing=handing)
    assert told == [pytest.approx(10.0)] * 2  # of a step: its data, and what the host does itself


def test_reader_is_closed_when_the_loop_is_left(clock):
    closed = []

    def batches():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    mixture = types.SimpleNamespace(sources=[], batch_rows=1, length=1)
    log = StepLog(RunHistory(), Keep(), mixture, program("cpu", 1), clock.now, {})
    waiting = log.waiting(batches())
    next(waiting)
    waiting.close()
    assert closed == [True]
