"""benchmarks/results.sh with a `lemur` that keeps what it is called with and writes what the real one writes."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LEMUR = """#!/bin/bash
cd "$HOME"
echo "$LEMUR_RELAUNCH $*" >>calls
while [ $# -gt 0 ]; do
  case $1 in
    --workdir) mkdir -p "$2"; for name in table.md results.json pareto.svg index.html; do echo "$2" >"$2/$name"; done ;;
    --json) echo "{}" >"$2" ;;
    --html) echo html >"$2" ;;
  esac
  shift
done
echo said
exit ${stopped:-0}
"""
PARTS = ["quickstart", "ratios", "how warm", "more text", "as much text", "HumanEval", "agents"]


@pytest.fixture
def results(tmp_path):
    """`benchmarks/results.sh`; `stop` is bash that the fake `lemur` begins with."""
    launch = tmp_path / "launch"
    launch.mkdir()
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "results.sh", tmp_path / "benchmarks")
    (launch / "environment.sh").write_text("make_environment() { :; }\n")
    (launch / "quickstart_scratch.sh").write_text(
        "echo quickstart >>calls; mkdir -p quickstart/runs/chat/checkpoints/150\n"
    )
    lemur = tmp_path / ".venv" / "bin" / "lemur"
    lemur.parent.mkdir(parents=True)

    def run(stop="", **environment):
        lemur.write_text(LEMUR.replace("while", f"{stop}\nwhile", 1))
        lemur.chmod(0o755)
        (tmp_path / "calls").write_text("")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RESULTS": "out", **environment}
        done = subprocess.run(
            ["bash", str(tmp_path / "benchmarks" / "results.sh")],
            env=environment,
            capture_output=True,
            text=True,
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    run.home = tmp_path
    return run


def test_all_parts_are_told_and_a_second_call_repeats_nothing(results):
    done, calls = results()
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("=== ")]
    assert len(told) == 8
    for number, (line, name) in enumerate(zip(told, PARTS, strict=False), start=1):
        assert line.startswith(f"=== {number}/7 {name}")
        assert "min from nothing" in line
    assert [call.split()[1] for call in calls[1:]] == ["sweep"] * 4 + ["eval"] * 2
    # A sweep that is told to stop ends the script.
    assert {call.split()[0] for call in calls[1:]} == {"1"}
    out = results.home / "out"
    assert (out / "rewarm" / "table.md").read_text() == "quickstart/results/sweep-rewarm\n"
    assert (out / "agents.json").read_text() == "{}\n"
    assert (out / "humaneval.txt").read_text() == "said\n"
    # The sweeps know themselves what is finished.
    done, calls = results()
    assert done.returncode == 0, done.stderr
    assert [call.split()[1] for call in calls] == ["sweep"] * 4
    assert done.stdout.count("finished already") == 3


def test_an_evaluation_that_was_stopped_is_not_taken_for_finished(results):
    # It has written what there was.
    done, calls = results("[[ $* != *--agents* ]] || stopped=130")
    assert done.returncode == 130
    assert "--agents" in calls[-1]
    done, calls = results()
    assert done.returncode == 0, done.stderr
    assert [call.split()[1] for call in calls] == ["sweep"] * 4 + ["eval"]
    assert "--agents" in calls[-1]


def test_a_sweep_that_was_stopped_ends_the_script(results):
    done, calls = results("[[ $* != *sweep-rewarm* ]] || exit 75")
    assert done.returncode == 75
    assert "sweep-rewarm" in calls[-1]


def test_a_trial_has_a_place_of_its_own(results):
    done, calls = results(STEPS="20", SEEDS="1", LIMIT="2")
    assert done.returncode == 0, done.stderr
    assert "--workdir quickstart/results-20-1-2/sweep-ratio --seeds 1" in calls[1]
    assert "--config.train.steps=20 --config.checkpoint.every_steps=10" in calls[1]
    assert "6 mixtures, 1 seeds, 20 updates" in done.stdout
