"""What TensorBoard's own reader finds in the files that a run leaves, and what W&B is given."""

import contextlib
import hashlib
import shutil
import sys
import types
from unittest.mock import create_autospec

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.telemetry.config import LogConfig
from lemur_jax.telemetry.metrics import MetricsWriter
from lemur_jax.telemetry.trackers import TensorBoard, WeightsAndBiases, check_trackers


def write_records(workdir, **trackers):
    with MetricsWriter(workdir, **trackers) as writer:
        writer.truncate_after(0)
        writer.write({"step": 3, "kind": "train", "loss": 2.5, "loss/code": 1.25, "grad_norm": float("nan")})
        writer.write({"step": 3, "kind": "eval", "task": "docs", "bits_per_byte": 0.5})
        writer.write({"step": 4, "kind": "skip", "grad_norm": 9.0, "documents": ["code/a"]})


def test_tensorboard_itself_shows_each_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    """Saved at step 2, killed after step 4, resumed, killed and resumed again."""
    # With a module of this name TensorBoard reads without TensorFlow, whose import takes seconds.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_records(tmp_path / "other", tensorboard=True)
    found = reader.EventAccumulator(str(tmp_path / "other" / "tensorboard")).Reload()
    read = {
        name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
    assert read == {
        "train/loss": [(3, 2.5)],
        "train/loss/code": [(3, 1.25)],
        "eval/docs/bits_per_byte": [(3, 0.5)],
        "skip/grad_norm": [(4, 9.0)],
    }
    for number, (first, last) in enumerate([(0, 4), (2, 5), (4, 6)]):
        with MetricsWriter(tmp_path, tensorboard=True) as writer:
            writer.truncate_after(first)
            for step in range(first + 1, last + 1):
                writer.write({"step": step, "kind": "train", "loss": 10.0 * number + step})
    shown = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [
        (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 25.0), (6, 26.0),
    ]  # fmt: skip


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    run = create_autospec(wandb.Run, instance=True)  # refuses what W&B's functions do not take
    init = create_autospec(wandb.init, return_value=run)
    monkeypatch.setattr(wandb, "init", init)
    write_records(tmp_path / "my-run", wandb=True)
    assert init.call_args.kwargs["dir"] == str(tmp_path / "my-run")
    run.define_metric.assert_called_once_with("*", step_metric="step")
    assert [call.args[0] for call in run.log.call_args_list] == [
        {"step": 3, "train/loss": 2.5, "train/loss/code": 1.25},
        {"step": 3, "eval/docs/bits_per_byte": 0.5},
        {"step": 4, "skip/grad_norm": 9.0},
    ]
    run.finish.assert_called_once_with()


def test_on_gs_tensorboard_names_what_it_needs_more(monkeypatch):
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    monkeypatch.setattr(record_writer, "GCS_ENABLED", False)
    monkeypatch.delattr(record_writer.GCSRecordWriter, "__del__")
    with pytest.raises(
        UserError,
        match=r"on gs:// needs google-cloud-storage \(`google-cloud-storage` must be .*: install it",
    ):
        TensorBoard("gs://bucket/run", -1)


def test_a_run_that_resumes_is_the_same_and_one_that_begins_another(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    init = create_autospec(wandb.init)
    monkeypatch.setattr(wandb, "init", init)
    run = tmp_path / "run"

    def start(workdir, fresh):
        WeightsAndBiases(workdir, fresh)
        return init.call_args.kwargs["id"]

    run.mkdir()
    old, first = start(run, False), start(run, True)
    assert old == hashlib.sha256(str(run).encode()).hexdigest()[:16]  # of earlier versions
    assert start(run, False) == first != old
    copy = shutil.copytree(run, tmp_path / "copy")
    monkeypatch.chdir(copy)
    assert start(".", False) == start(copy, False) != first
    assert start(run, True) != first
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_NAME", "my name")
    assert start(run, False) == "mine"
    assert [call.kwargs["name"] for call in init.call_args_list[-3:]] == ["copy", "run", "my name"]


@pytest.mark.parametrize(("package", "tracker"), [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_without_the_package_one_line_says_what_to_install(monkeypatch, package, tracker):
    monkeypatch.setitem(sys.modules, package, None)  # cannot be imported
    check_trackers(LogConfig())
    with pytest.raises(UserError, match=rf"pip install 'lemur_jax\[{tracker}\]'"):
        check_trackers(LogConfig(**{tracker: True}))


@pytest.mark.parametrize(("mode", "message"), [("online", "No API key"), ("offline", ""), ("on", "mode")])
def test_without_an_api_key_wandb_is_refused_before_anything_is_read(monkeypatch, tmp_path, mode, message):
    pytest.importorskip("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("HOME", str(tmp_path))  # without a .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    line = rf"log.wandb: W&B does not start \(.*{message}.*; set WANDB_API_KEY, or WANDB_MODE=offline"
    with pytest.raises(UserError, match=line) if message else contextlib.nullcontext():
        check_trackers(LogConfig(wandb=True))
