"""Event files as TensorBoard reads them: framed records of its own protocol buffers."""

import builtins
import struct
import sys
import types

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.telemetry.metrics import MetricsWriter

pytest.importorskip("tensorboardX")


def events(workdir):
    """All events of a directory in the order of their files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def scalars(found):
    return {(event.step, value.tag): value.simple_value for event in found for value in event.summary.value}


def test_every_number_of_a_record_is_a_scalar(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.truncate_after(0)
        writer.write({"step": 3, "kind": "train", "loss": 2.5, "loss/code": 1.25, "grad_norm": float("nan")})
        writer.write({"step": 3, "kind": "eval", "task": "docs", "bits_per_byte": 0.5})
    assert scalars(events(tmp_path)) == {
        (3, "train/loss"): 2.5,
        (3, "train/loss/code"): 1.25,
        (3, "eval/docs/bits_per_byte"): 0.5,
    }


def test_resumed_run_hides_the_steps_that_it_repeats(tmp_path):
    for first, last in ((0, 4), (2, 6)):
        with MetricsWriter(tmp_path, tensorboard=True) as writer:
            writer.truncate_after(first)
            for step in range(first + 1, last + 1):
                writer.write({"step": step, "kind": "train", "loss": 1.0})
    # A session start at step 3 is how a writer tells TensorBoard to drop what came before from there on.
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 3


def test_tensorboard_itself_shows_each_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    """Saved at step 2, killed after step 4, resumed, killed and resumed again."""
    # With a module of this name TensorBoard reads without TensorFlow, whose import takes seconds.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for number, (first, last) in enumerate([(0, 4), (2, 5), (4, 6)]):
        with MetricsWriter(tmp_path, tensorboard=True) as writer:
            writer.truncate_after(first)
            for step in range(first + 1, last + 1):
                writer.write({"step": step, "kind": "train", "loss": 10.0 * number + step})
    shown = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert shown.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [
        (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 25.0), (6, 26.0),
    ]  # fmt: skip


def test_missing_library_is_one_line(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    writer = MetricsWriter(tmp_path, tensorboard=True)
    with pytest.raises(UserError, match=r"pip install 'lemur_jax\[tensorboard\]'"):
        writer.truncate_after(0)
