"""The metrics file through kills, resumes, full disks and object stores."""

import json
import math
import random

import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.telemetry import metrics
from lemur_jax.telemetry.metrics import METRICS_FILE, MetricsWriter, read_metrics
from tests.helpers.limits import files_of_at_most


def train(step: int, **fields):
    return {"step": step, "kind": "train", "loss": 1 / step, **fields}


@pytest.fixture(params=["file", "object store"])
def storage(request, monkeypatch):
    """Runs a test as on a disk, and as where nothing can be appended."""
    if request.param == "object store":
        monkeypatch.setattr(metrics, "is_object_store", lambda path: True)
    return request.param


def test_records_come_back(tmp_path):
    workdir = tmp_path / "new" / "run"
    numbers = {"loss": jnp.float32(2.5), "tokens": np.int64(2**40), "loss/a": np.float64(0.1)}
    numbers |= {"grad_norm": jnp.inf, "z": np.float32("-inf"), "lost": math.nan}
    with MetricsWriter(workdir) as writer:
        writer.write({"step": 1, "kind": "train", **numbers})
        writer.write({"step": 1, "kind": "eval", "task": "prosa_é", "loss": 3, "done": True, "note": None})
        assert len(read_metrics(workdir)) == 2  # visible before anything is closed
    missing = {"grad_norm": None, "z": None, "lost": None}
    assert read_metrics(str(workdir)) == [
        {"step": 1, "kind": "train", "loss": 2.5, "tokens": 2**40, "loss/a": 0.1, **missing},
        {"step": 1, "kind": "eval", "task": "prosa_é", "loss": 3, "done": True, "note": None},
    ]


def test_a_resume_neither_doubles_nor_misses_a_step(tmp_path, storage):
    """Kill after any step, resume from any earlier checkpoint: the file is as if nothing had happened."""
    whole = tmp_path / "whole"
    with MetricsWriter(whole) as writer:
        for step in range(1, 21):
            writer.write(train(step))
            writer.write({"step": step, "kind": "eval", "task": "a", "loss": 0.5})
    broken = tmp_path / "broken"
    rng = random.Random(0)
    step = checkpoint = 0
    while step < 20:
        writer = MetricsWriter(broken)  # never closed: a kill closes nothing
        writer.truncate_after(checkpoint)
        step = checkpoint
        for _ in range(rng.randint(1, 6)):
            if step == 20:
                break
            step += 1
            writer.write(train(step))
            writer.write({"step": step, "kind": "eval", "task": "a", "loss": 0.5})
            if step % 2 == 0:
                writer.sync()
                checkpoint = step
    writer.close()
    assert (broken / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()
    assert [path.name for path in broken.iterdir()] == [METRICS_FILE]


def test_an_object_store_sees_whole_objects_at_each_sync(tmp_path, storage):
    writer = MetricsWriter(tmp_path)
    assert read_metrics(tmp_path) == []
    writer.write(train(1))
    writer.sync()
    writer.write(train(2))
    assert len(read_metrics(tmp_path)) == (2 if storage == "file" else 1)
    writer.close()
    assert len(read_metrics(tmp_path)) == 2


def test_a_torn_line_is_left_out_and_cut_off(tmp_path):
    whole = b"".join(json.dumps(train(step, task="é")).encode() + b"\n" for step in (1, 2, 3))
    path = tmp_path / METRICS_FILE
    start = whole.rindex(b"\n", 0, -1) + 1
    for size in range(start, len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = 3 if size >= len(whole) - 1 else 2
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3][:complete]
        with MetricsWriter(tmp_path) as writer:
            writer.write(train(complete + 1))
        assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, complete + 2))


def test_damage_in_the_middle_is_left_out_with_a_warning(tmp_path, caplog):
    damage = [b"\0\0\0", b"[1]", b"\xff", b"", b'{"step": "x"}', b'{"kind": "train"}', b"[" * 20_000]
    typed = ('"loss": "low"', '"loss": 1e999', f'"loss": {"9" * 400}', '"loss": [1.0]', '"versions": "jax"')
    typed += ('"host": 3', '"kind": 3', '"task": null', '"versions": [1]')
    damage += [b'{"step": 1, %s}' % field.encode() for field in typed] + [b'{"step": true}']
    lines = [json.dumps(train(1)).encode(), *damage, json.dumps(train(2)).encode()]
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join(lines) + b"\n")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert "16 unreadable lines were skipped" in caplog.text
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(5)
    assert [record["step"] for record in map(json.loads, (tmp_path / METRICS_FILE).open())] == [1, 2]


def test_missing_or_unwritable_places_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl in .*nowhere: give the --workdir"):
        read_metrics(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"no metrics.jsonl in .*file"):
        read_metrics(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/metrics.jsonl"):
        MetricsWriter(tmp_path / "file")


def test_a_full_disk_is_told_once_and_costs_no_record(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        writer.write(train(1))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with files_of_at_most(size + 5):  # tears the next line
            writer.write(train(2))
            writer.write(train(3))
            writer.sync()
            (line,) = caplog.messages
            assert "cannot write" in line
            assert "metrics.jsonl: File too large. Records wait" in line
            assert [record["step"] for record in read_metrics(tmp_path)] == [1]
        writer.write(train(4))
        assert len(caplog.messages) == 2
        assert "can be written again, and no record is missing" in caplog.messages[1]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_what_cannot_be_written_to_the_end_is_an_error_and_hides_no_other(tmp_path):
    writer = MetricsWriter(tmp_path)
    with files_of_at_most(0):
        writer.write(train(1))
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):
            writer.close()
        other = MetricsWriter(tmp_path)
        other.write(train(1))
        with pytest.raises(KeyError, match="first"), other:
            raise KeyError("first")
