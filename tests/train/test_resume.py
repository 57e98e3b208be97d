"""A run killed with SIGKILL and started again ends with the bits of the run that was left alone.

Real processes, real signals: the whole of `lemur train` is under test, not a simulation of it.
"""

import json
import logging
import signal
import time

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.reading import read_metadata, steps_in
from lemur_jax.common.errors import UserError
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.runs import (
    STEPS,
    documented,
    final_params,
    finish,
    kill_somewhere,
    random_documents,
    start,
    without_clock,
    write_store,
)


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"}


def damage_newest(checkpoints):
    """Flips a bit; returns what the next start says."""
    previous, newest = steps_in(checkpoints)[1][-2:]
    data = max((checkpoints / str(newest) / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    return (
        f"Going on from step {previous}: {newest - previous} steps are lost",
        f"resuming at step {previous}",
    )


@pytest.mark.parametrize("checkpoints", [0, 3])
def test_killed_run_reaches_the_same_bits(project, undisturbed, checkpoints, tmp_path):
    """Killed before the first checkpoint, and later, where the newest one is damaged too."""
    kill_somewhere(project, tmp_path / "run", checkpoints)
    expected = damage_newest(tmp_path / "run" / "checkpoints") if checkpoints else ()
    out = finish(project, tmp_path / "run")
    assert all(words in out for words in expected)
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(undisturbed))
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, STEPS]
    assert without_clock(records) == without_clock(read_metrics(undisturbed))


def test_killed_run_continues_on_other_devices(project, undisturbed, tmp_path):
    kill_somewhere(project, tmp_path / "run", 2)
    out = finish(project, tmp_path / "run", devices=4)
    assert "resuming at step" in out
    expected = losses(undisturbed)
    found = losses(tmp_path / "run")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_records_are_as_documented_in_their_order(undisturbed):
    records = read_metrics(undisturbed)
    evaluated = {key for record in records if record["kind"] == "eval" for key in record}
    assert evaluated == documented()["eval"] - {"change"} | {"step", "kind", "task"}
    train, times = ([r for r in records if r["kind"] == kind] for kind in ("train", "time"))
    assert {key for record in times for key in record} == documented()["time"] | {"step", "kind"}
    assert times[0]["step"] == 0
    assert 0 < times[-1]["goodput"] < 1
    assert train[-1]["tokens"] == train[-1]["tokens/code"] + train[-1]["tokens/text"]


def test_self_describing(undisturbed):
    metadata = read_metadata(undisturbed)
    assert metadata["config"] == json.loads((undisturbed / "config.json").read_text())
    assert set(metadata["data"]) == {"code", "text"}
    assert "tokenizer.model" in metadata["tokenizer"]


def test_any_step_of_a_run_is_exported(undisturbed, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lemur_jax")
    for name, step in (("before", STEPS - 3), ("newest", None)):
        export_hf(undisturbed, tmp_path / name, step=step, verify=True)
    assert "| Checkpoint step | 21 |" in (tmp_path / "before" / "README.md").read_text()
    assert sum(line.startswith("logits (float32) equal transformers'") for line in caplog.messages) == 2
    before, newest = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "newest"))
    assert before != newest


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(train, tmp_path):
    """A learning rate that overflows after a few good steps."""
    options = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0, "optimizer.warmup_steps": 20}
    with pytest.raises(UserError, match=r"loss is.* code/code-") as stopped:
        train(tmp_path, **options, **{"train.steps": STEPS, "checkpoint.every_steps": 1})
    step = read_metadata(tmp_path)["step"]
    assert f"step {step + 1}:" in str(stopped.value)  # every step before was saved, this one was not


def test_store_that_changed_since_is_refused(project, train, undisturbed, tmp_path):
    copy = tmp_path / "stores"
    tokenizer = Tokenizer.load(project / "tokenizer")
    for store in ("code/train", "text/train", "text/validation"):
        write_store(copy / store, tokenizer, random_documents(store, seed=99))
    same = {"train.steps": STEPS, "eval.every_steps": 10, "checkpoint.keep": 2}
    with pytest.raises(UserError, match=r"was trained on other data.*code"):
        train(undisturbed, **same, **{"data.stores": copy})


def test_sigterm_saves_and_exits_0_and_the_bits_are_the_same(project, undisturbed, tmp_path):
    process = start(project, tmp_path / "run")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list((tmp_path / "run").glob("checkpoints/3")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    stopped = read_metadata(tmp_path / "run")["step"]
    assert f"SIGTERM: step {stopped} is saved" in out
    assert 3 <= stopped < STEPS
    assert f"resuming at step {stopped}" in finish(project, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(undisturbed))
