"""When a run saves, what SIGTERM may take, and a run that goes on with another optimizer."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint import manager
from lemur_jax.checkpoint.manager import Checkpoints
from lemur_jax.checkpoint.reading import read_metadata, restore_params, steps_in
from lemur_jax.cluster.preemption import Interruption
from lemur_jax.common.errors import UserError
from lemur_jax.config import load
from lemur_jax.models import decoder
from lemur_jax.telemetry.metrics import MetricsWriter, read_metrics
from lemur_jax.train import loop, saves
from lemur_jax.train.evaluate import Evaluations
from lemur_jax.train.inputs import open_data
from lemur_jax.train.saves import Saves
from tests.helpers.limits import files_of_at_most
from tests.helpers.runs import asked_at, build_once, final_params, run_in_process, without_clock


def changed_at(workdir):
    return sorted((str(path), path.stat().st_mtime_ns) for path in workdir.rglob("*"))


def test_an_extended_run_is_the_run_that_was_planned_so(train, tmp_path):
    """Three more steps with another mixture, which the first process knew nothing of; constant learning rate.

    The first shares are the same in other numbers, as they are with more epochs.
    """
    constant = {"optimizer.final_learning_rate": 0.01, "eval.every_steps": 3}
    train(tmp_path / "run", **constant, **{"train.steps": 3})
    later = constant | {"data.stages": "{'late':{'step':3,'shares':{'text':1.0}}}"}
    later |= {"data.sources.code.share": 30.0, "data.sources.text.share": 3.0}
    before = changed_at(tmp_path / "run")
    with pytest.raises(UserError, match=r"belongs to another config: .*data.stages.late.* or --extend"):
        train(tmp_path / "run", **later)
    assert changed_at(tmp_path / "run") == before
    train(tmp_path / "run", extend=True, **later)
    train(tmp_path / "planned", **later)
    jax.tree.map(
        np.testing.assert_array_equal, *(final_params(tmp_path / name, 6) for name in ("run", "planned"))
    )
    records = read_metrics(tmp_path / "run")
    (extension,) = [record for record in records if record["kind"] == "extension"]
    assert extension["step"] == 3
    assert "train.steps: 3 -> 6" in extension["changes"]
    assert without_clock(r for r in records if r is not extension) == without_clock(
        read_metrics(tmp_path / "planned")
    )
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "already finished" in train(tmp_path / "run", **later)[0]  # it is the run's own config now
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def python_takes_sigint():
    """As in a terminal; a shell that starts pytest in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_a_second_one_aborts(train, tmp_path, monkeypatch, capfd, python_takes_sigint):
    asked = []

    def interrupt(*_):
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    options = {"checkpoint.every_steps": 0}
    monkeypatch.setattr(Interruption, "should_stop", asked_at(3, interrupt))
    lines = train(tmp_path, **options)
    assert lines[-1].startswith("Ctrl-C: step 3 is saved; the same command continues from there")
    assert "press it again to abort" in capfd.readouterr().err
    monkeypatch.setattr(Interruption, "should_stop", asked_at(2, lambda *_: (interrupt(), interrupt())))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, **options)
    assert time.monotonic() - asked[-1] < 5  # no save is due
    assert steps_in(tmp_path)[1] == [3]


def test_ctrl_c_after_the_decision_what_to_save_stops_one_step_later(
    train, tmp_path, monkeypatch, python_takes_sigint
):
    decide = Saves.due

    def interrupted(self, step, **options):
        found = decide(self, step, **options)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(Saves, "due", interrupted)
    lines = train(tmp_path, **{"checkpoint.every_steps": 0})
    assert lines[-1].startswith("Ctrl-C: step 4 is saved; the same command continues from there")
    assert steps_in(tmp_path)[1] == [4]


@pytest.mark.parametrize(("minutes", "steps"), [(1e-6, [2, 4, 6]), (1000.0, [6])])
def test_saves_by_minutes_whenever_it_logs(train, tmp_path, minutes, steps):
    train(tmp_path, **{"checkpoint.every_steps": 0, "checkpoint.every_minutes": minutes})
    assert steps_in(tmp_path)[1] == steps


def test_the_best_by_held_out_loss_is_kept_whatever_steps_are_evaluated(train, tmp_path, monkeypatch):
    (task,) = load("config.py").eval.tasks
    scored = []

    def score(self, params, step, only=None):
        scored.append(step)
        return {task: abs(step - 3)}

    monkeypatch.setattr(Evaluations, "score", score)
    options = {"eval.every_steps": 4, "checkpoint.every_steps": 1, "checkpoint.keep": 1}
    train(tmp_path, **options, **{"checkpoint.keep_best": task})
    assert steps_in(tmp_path)[1] == [3, 6]
    assert scored == [1, 2, 3, 4, 5, 6]


def test_the_best_is_found_among_losses_on_the_same_text(train, tmp_path, monkeypatch):
    """The second start compares by another task, the third by fewer rows."""
    losses = {"text": [1.0, 9.0, 9.0, 9.0, 9.0, 9.0], "code": [9.0, 2.0, 9.0, 9.0, 9.0, 6.0]}

    def score(self, params, step, only=None):
        return {task: of[step - 1] for task, of in losses.items()}

    monkeypatch.setattr(Evaluations, "score", score)
    options = {"checkpoint.every_steps": 1, "checkpoint.keep": 2, "eval.tasks": ("code", "text")}
    starts = [
        (3, {"checkpoint.keep_best": "text"}, [1, 2, 3]),
        (2, {"checkpoint.keep_best": "code"}, [2, 4, 5]),
        (2, {"checkpoint.keep_best": "code", "eval.max_rows": 3}, [5, 6]),
    ]
    for steps, changes, kept in starts:
        with monkeypatch.context() as sigterm:  # the step after which it comes is not scored
            sigterm.setattr(Interruption, "should_stop", asked_at(steps))
            train(tmp_path, **options, **changes)
        assert steps_in(tmp_path)[1] == kept


def test_a_full_disk_for_some_steps_ends_nothing(train, tmp_path, monkeypatch, caplog):
    """Neither saves nor metrics can be written from step 2 on until step 5 is reached.

    What failed saves still write, while it is removed, fails no later one.
    """
    monkeypatch.setattr(manager, "_LAST_WRITES_SECONDS", 0.1)
    write = MetricsWriter.write
    options = {"checkpoint.every_steps": 1, "checkpoint.max_failures": 5, "log.every_steps": 1}
    with contextlib.ExitStack() as disk:

        def filled(self, record):
            write(self, record)
            if record["kind"] == "train" and record["step"] == 2:
                disk.enter_context(files_of_at_most(600))
            elif record["kind"] == "train" and record["step"] == 5:
                disk.close()

        monkeypatch.setattr(MetricsWriter, "write", filled)
        lines = train(tmp_path, **options)
    assert sum("could not be saved" in line for line in caplog.messages) <= 4  # steps 1 to 4
    assert any("metrics.jsonl: File too large" in line for line in lines)
    assert any("metrics.jsonl can be written again, and no record is missing" in line for line in lines)
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == list(range(1, 7))
    assert steps_in(tmp_path)[1][-1] == 6


def test_the_last_save_is_tried_again_where_it_fails(train, tmp_path, monkeypatch):
    """No later update would save it."""
    save, refused = Checkpoints.save, []

    def refused_once(self, step, *args):
        if step < 6 or refused:
            return save(self, step, *args)
        refused.append(step)
        with files_of_at_most(600):
            save(self, step, *args)
            self.wait()

    monkeypatch.setattr(Checkpoints, "save", refused_once)
    monkeypatch.setattr(saves, "_RETRY_SECONDS", 0.1)
    train(tmp_path)
    assert refused == [6]
    assert steps_in(tmp_path)[1][-1] == 6


def test_another_optimizer_is_refused_by_leaf_unless_told_to_start_fresh(
    train, tmp_path, monkeypatch, caplog
):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    train(undisturbed)
    with monkeypatch.context() as stop:
        stop.setattr(Interruption, "should_stop", asked_at(3))
        train(run)
    other = {"optimizer.moments_dtype": "bfloat16"}
    with pytest.raises(UserError, match="belongs to another config: optimizer.moments_dtype"):
        train(run, **other)
    with pytest.raises(UserError, match=r"must be one of 'refuse', 'fresh'"):
        train(run, **{"checkpoint.other_optimizer": "zeros"})
    train(run, **other, **{"checkpoint.other_optimizer": "fresh"})
    (reset,) = [line for line in caplog.messages if "the optimizer is reset at step 3" in line]
    assert "optimizer: inner_state/1/mu/" in reset
    assert "is float32, this config wants bfloat16" in reset
    leaves = read_metadata(run)["leaves"]["optimizer"]
    assert {leaf.dtype for name, leaf in leaves.items() if "/mu/" in name} == {"bfloat16"}
    (extension,) = [record for record in read_metrics(run) if record["kind"] == "extension"]
    assert extension["changes"] == ["optimizer.moments_dtype: 'float32' -> 'bfloat16'"]
    expected, found = (
        [record["learning_rate"] for record in read_metrics(path) if record["kind"] == "train"]
        for path in (undisturbed, run)
    )
    assert found == expected  # the schedule goes on where it was
    assert len(set(found)) == 6


# Two steps, two batches of each of two tasks, and all of it once more: `reached` is called twelve times.
EVALUATED = {
    "train.steps": 4,
    "eval.tasks": ("code", "text"),
    "eval.every_steps": 2,
    "eval.max_rows": 16,
    "checkpoint.keep_best": "text",
    "checkpoint.every_steps": 2,
}


@pytest.mark.parametrize(
    ("poll", "stopped", "scored"),
    [(2, 2, []), (3, 2, []), (6, 2, ["code"]), (8, 4, ["code", "text"]), (12, 4, ["code", "text", "code"])],
)
def test_an_evaluation_that_sigterm_breaks_off_is_made_first_at_the_next_start(
    train, tmp_path, monkeypatch, undisturbed, poll, stopped, scored
):
    run = tmp_path / "run"
    for when in (poll, 1):  # at the next start again
        with monkeypatch.context() as sigterm:
            sigterm.setattr(Interruption, "should_stop", asked_at(when))
            lines = train(run, **EVALUATED)
        assert steps_in(run)[1][-1] == stopped
        assert [r["task"] for r in read_metrics(run) if r["kind"] == "eval"] == scored
    assert (
        lines[-1] == f"SIGTERM: no step was made after step {stopped}; the same command continues from there"
    )
    train(run, **EVALUATED)
    assert without_clock(read_metrics(run)) == without_clock(read_metrics(undisturbed))
    assert steps_in(run)[1][-1] == 4
    assert "already finished" in train(run, **EVALUATED)[0]


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        run_in_process(workdir, **EVALUATED)
    return workdir


def test_a_checkpoint_knows_what_its_run_began_with_and_how_many_tokens_it_saw(
    train, tmp_path, monkeypatch, undisturbed
):
    """A roll back to step 0 reads that step again; a run whose records are gone counts on."""
    base, run = tmp_path / "base", tmp_path / "run"
    options = {"init.checkpoint": base, "eval.tasks": ()}
    shutil.copytree(undisturbed, base)
    shutil.rmtree(base / "checkpoints" / "4")
    with monkeypatch.context() as sigterm:
        sigterm.setattr(Interruption, "should_stop", asked_at(3))
        train(run, **options)
    shutil.copytree(undisturbed, base, dirs_exist_ok=True)  # the base has gone on
    (run / "metrics.jsonl").unlink()
    base.rename(base := tmp_path / "moved")
    with pytest.raises(UserError, match="belongs to another config: init.checkpoint was"):
        train(run, **options | {"init.checkpoint": run})  # another model
    train(run, **options | {"init.checkpoint": base})
    assert read_metadata(run)["origins"]["init.checkpoint"]["step"] == 2
    (extension,) = [record for record in read_metrics(run) if record["kind"] == "extension"]
    assert extension["changes"] == [f"init.checkpoint: '{tmp_path / 'base'}' -> '{base}'"]
    counts = [
        {
            record["step"]: (record["tokens"], record["tokens/code"])
            for record in read_metrics(path)
            if record["kind"] == "train"
        }
        for path in (run, undisturbed)  # which has seen the same batches
    ]
    assert counts[0][4] == counts[1][4]
    config = load("config.py", [f"--config.init.checkpoint={base}"])
    with loop.open_saves(config, run, open_data(config, build_once)) as saves:
        saves.first_state()
        state, step = saves.first_state(at_most=0)
    assert step == 0
    first = restore_params(base, decoder.abstract_params(config.model), 2)
    jax.tree.map(np.testing.assert_array_equal, state.params, first)


def test_an_evaluation_of_the_first_parameters_is_made_anew(train, tmp_path, monkeypatch, undisturbed):
    run, straight = tmp_path / "run", tmp_path / "straight"
    options = EVALUATED | {"init.checkpoint": str(undisturbed)}
    with monkeypatch.context() as sigterm:
        sigterm.setattr(Interruption, "should_stop", asked_at(4))
        lines = train(run, **options)
    assert lines[-1].startswith("SIGTERM: no step was made after step 0")
    assert not list((run / "checkpoints").iterdir())
    for path in (run, straight):
        train(path, **options)
    records = without_clock(read_metrics(run))
    assert records == without_clock(read_metrics(straight))
    assert sum(record["kind"] == "balance" for record in records) == 2


def test_a_loss_that_was_known_before_sigterm_still_counts(train, tmp_path, monkeypatch):
    """The task of `keep_best` is scored, another one is not."""
    options = EVALUATED | {"checkpoint.keep_best": "code", "checkpoint.keep": 1, "eval.every_steps": 0}
    with monkeypatch.context() as sigterm:
        sigterm.setattr(Interruption, "should_stop", asked_at(6))
        train(tmp_path, **options)
    monkeypatch.setattr(Evaluations, "score", lambda self, params, step, only=None: {"code": 1e9})
    train(tmp_path, **options)
    assert steps_in(tmp_path)[1] == [2, 4]


# Every save after that of step 3 takes for ever, in C, where Python hears of no signal.
STUCK = """
import ctypes, os, sys
from lemur_jax.cli import main
from lemur_jax.train.saves import Checkpoints
save, mutex = Checkpoints.save, ctypes.create_string_buffer(64)
def stuck(self, step, *rest):
    if step <= 3:
        return save(self, step, *rest)
    self.wait()
    open(os.environ["STUCK"], "w")
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
Checkpoints.save = stuck
sys.exit(main(sys.argv[1:]))
"""


def test_after_the_grace_period_the_process_ends_and_the_newest_checkpoint_stays(project, tmp_path):
    run = tmp_path / "run"
    words = ["train", "--config", "config.py", "--workdir", str(run), "--virtual-devices", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *words, "--config.checkpoint.grace_s=1"],
        cwd=project,
        env={**os.environ, "STUCK": str(tmp_path / "stuck")},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (tmp_path / "stuck").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert time.monotonic() - asked < 60
    assert process.returncode == 1, said
    assert "not saved within config.checkpoint.grace_s = 1 s of SIGTERM" in said
    assert read_metadata(run)["step"] == 3
