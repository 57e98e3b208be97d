"""The table of bits per byte against changes worked out by hand."""

import json

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.report import bits_per_byte_table
from lemur_jax.report.runs import read_runs
from lemur_jax.telemetry.metrics import METRICS_FILE, MetricsWriter

EXPECTED = """\
Held-out bits per byte after each stage (lower is better); change against first and previous stage

               python_docs                python_stdlib                python_chat
stage      bits    first    prev.      bits    first    prev.      bits    first    prev.
base     2.0000        -        -    4.0000        -        -         -        -        -
lemur    2.1000    +5.0%    +5.0%    3.0000   -25.0%   -25.0%         -        -        -
chat     2.0000    +0.0%    -4.8%    3.3000   -17.5%   +10.0%    1.2500        -        -"""


def rewrite(workdir, change):
    """Passes every record through `change`; None drops it."""
    path = workdir / METRICS_FILE
    records = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records if record))


def test_the_last_evaluation_of_each_stage_and_its_changes(stages):
    assert bits_per_byte_table(stages) == EXPECTED
    lines = bits_per_byte_table([f"{stages[1]}/"]).splitlines()  # one run has nothing to compare with
    assert lines[-1].split() == ["lemur", "2.1000", "-", "-", "3.0000", "-", "-"]


def test_the_model_that_the_first_run_started_from_is_a_stage(stages):
    with MetricsWriter(stages[0]) as writer:
        writer.write({"step": 0, "kind": "eval", "task": "python_docs", "loss": 1.0, "bits_per_byte": 2.5})
    lines = bits_per_byte_table(stages).splitlines()
    assert lines[4].split() == ["start", "2.5000", *"--------"]
    assert lines[5].split()[:5] == ["base", "2.0000", "-20.0%", "-20.0%", "4.0000"]


def test_the_balance_of_a_stage_that_was_scored_at_its_start(stages):
    with MetricsWriter(stages[1]) as writer:
        for step, score in ((20, 0.3), (40, 0.0123)):
            writer.write({"step": step, "kind": "balance", "balance": score, "change/code": -0.02})
    lines = bits_per_byte_table(stages).splitlines()
    assert lines[3].endswith("balance")
    assert [line.split()[-1] for line in lines[4:]] == ["-", "+1.2%", "-"]


def test_a_step_recorded_twice_counts_once_and_the_later_record_wins(stages):
    with MetricsWriter(stages[0]) as writer:
        record = {"step": 20, "kind": "eval", "task": "python_docs", "loss": 1.0, "bits_per_byte": 9.0}
        writer.write(record)  # an older step, written late: not the last evaluation
        writer.write({**record, "step": 40, "bits_per_byte": 2.5})
    run = read_runs(stages)[0]
    assert [entry["step"] for entry in run.evals["python_docs"]] == [20, 40]
    assert run.last_eval("python_docs")["bits_per_byte"] == 2.5


def test_stages_scored_on_different_texts_are_told(stages):
    def shorter(record):
        return record | {"bytes": 500} if record.get("task") == "python_docs" else record

    rewrite(stages[1], shorter)
    note = bits_per_byte_table(stages).splitlines()[-1]
    assert note.startswith(
        "python_docs: its changes also compare different texts; bytes scored: base 999, lemur 500"
    )


def test_other_records_and_evaluations_that_are_not_finite_do_not_count(stages):
    with MetricsWriter(stages[0]) as writer:
        for record in (
            {"kind": "host", "step": 99},
            {"kind": "train"},
            {"step": 99},
            {"kind": "eval", "step": 99},
        ):
            writer.write(record)
    with MetricsWriter(stages[2]) as writer:
        record = {"step": 50, "kind": "eval", "task": "python_docs", "loss": 1.0}
        writer.write(record | {"bits_per_byte": float("nan")})
    assert bits_per_byte_table(stages) == EXPECTED
    assert read_runs(stages)[0].last_step == 40


def test_runs_of_one_name_are_told_apart(tmp_path, stages):
    paths = [tmp_path / name / "base" for name in ("one", "two")]
    for stage, path in zip(stages, paths, strict=False):
        path.parent.mkdir()
        stage.rename(path)
    assert [run.name for run in read_runs([*paths, stages[2]])][:2] == ["one/base", "two/base"]
    again = read_runs([stages[2], stages[2]])
    assert again[0].name != again[1].name


def test_mistakes_are_one_line_that_names_the_run(tmp_path, stages):
    with pytest.raises(UserError, match=r"no metrics.jsonl in .*/absent"):
        bits_per_byte_table([stages[0], tmp_path / "absent"])
    rewrite(stages[0], lambda record: record if record["kind"] == "train" else None)
    with pytest.raises(UserError, match=r"no held-out evaluation in .*/base: name tasks"):
        bits_per_byte_table([stages[0]])
    (stages[1] / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl in .*/lemur holds no record yet"):
        bits_per_byte_table(stages)
    (stages[2] / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"/chat/config.json is not JSON"):
        bits_per_byte_table([stages[2]])
