"""`lemur sweep` whole: trained, interrupted, gone on with, merged, and written down."""

import json

import pytest
from etils import epath

from lemur_jax.cli import main
from lemur_jax.config import from_json
from lemur_jax.models.presets import preset
from lemur_jax.sweep import merging, runner
from lemur_jax.sweep.results import Results
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.train import step
from lemur_jax.train.workdir import claim

WORDS = "sweep --config config.py --workdir out --ratios 1:0,0:1 --seeds 2 --merge linear:0.5,arithmetic:0.5"


@pytest.fixture(scope="module")
def swept(project):
    """The directory of a sweep that was interrupted before its third run, and what was said after that."""
    said, built = [], []
    train, build = runner.train, step.build

    def until_the_third(config, workdir, **options):
        if len(said) == 2:
            raise KeyboardInterrupt
        said.append(workdir)
        return train(config, workdir, **options)

    def counted(*args):
        built.append(args)
        return build(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr(runner, "train", until_the_third)
        patch.setattr(step, "build", counted)
        assert main(WORDS.split()) == 130
        assert len(built) == 1
        patch.setattr(runner, "train", train)
        before = {path: path.stat().st_mtime_ns for path in (project / "out/runs").glob("*/metrics.jsonl")}
        assert len(before) == 2
        assert main(WORDS.split()) == 0
        assert len(built) == 2
    return project / "out", before


@pytest.fixture(autouse=True)
def in_the_project(project, monkeypatch):
    monkeypatch.chdir(project)


def test_what_was_finished_is_left_alone(swept):
    _, before = swept
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_the_results(swept):
    out, _ = swept
    found = json.loads((out / "results.json").read_text())
    variants = {one["name"]: one for one in found["variants"]}
    names = {"1:0", "0:1", "1:0, linear 0.5", "0:1, linear 0.5", "1:0 + 0:1, arithmetic 0.5"}
    assert set(variants) == names
    base = found["base"]
    for one in variants.values():
        assert one["seeds"] == [42, 43]
        assert one["bits"]["code"][0] != one["bits"]["code"][1]
    assert max(variants["1:0"]["bits"]["code"]) < base["code"]
    assert max(variants["0:1"]["bits"]["text"]) < base["text"]
    # A run that never saw the code is worse at it than one that saw nothing else.
    assert min(variants["0:1"]["bits"]["code"]) > max(variants["1:0"]["bits"]["code"])
    assert found["tokens"] == 6 * 8 * 64
    assert (out / "table.md").read_text().count("\n| 1:0 ") == 2
    assert "lemur sweep --config config.py" in (out / "index.html").read_text()


def test_merges_are_of_the_runs_that_are_there_and_of_their_base(swept, monkeypatch, capsys):
    """A run that was made again is merged again; a base that has gone on since is told."""
    merge = swept[0] / "merged/linear-0.5_1-0_seed-42/metrics.jsonl"
    before = merge.read_text()
    merge.write_text(before.replace('"weights": "', '"weights": "of other runs '))
    assert main(WORDS.split()) == 0
    assert merge.read_text() == before
    merge.unlink()
    evaluate = merging.evaluate
    monkeypatch.setattr(merging, "evaluate", lambda *args: evaluate(*args) | {"bits_per_byte": 2.75})
    assert main(WORDS.split()) == 2
    assert "base has 2.7500 bits per byte of code before training" in capsys.readouterr().err


def test_a_run_is_the_run_that_train_makes_of_the_printed_command(swept, capsys):
    assert main([*WORDS.split(), "--print"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].replace("out/runs/", "alone/").split()
    assert main(words[1:]) == 0
    last = [
        [r["loss"] for r in read_metrics(path) if r["kind"] == "train"]
        for path in (words[5], "out/runs/0-1_seed-43")
    ]
    assert last[0] == last[1]


def test_a_sigterm_ends_the_sweep_and_not_the_run_alone(project, monkeypatch, capsys):
    calls = []

    def signalled(*args, **_):
        calls.append(args)
        return len(calls) == 2

    monkeypatch.setattr(runner, "train", signalled)
    assert main(WORDS.replace("out", "stopped").split()) == 0
    assert len(calls) == 2
    # A script that is to stop with it asks for another status.
    monkeypatch.setenv("LEMUR_RELAUNCH", "1")
    calls.clear()
    assert main(WORDS.replace("out", "stopped").split()) == 75
    assert "stopped; the same command continues from there" in capsys.readouterr().out
    assert not (project / "stopped/results.json").exists()


def test_a_run_that_diverges_does_not_keep_the_others_from_being_trained(project, capsys):
    words = "sweep --config config.py --workdir rates --ratios 1:1 --seeds 1"
    words += " --config.optimizer.final_learning_rate=1e-3 --vary"
    assert main([*words.split(), "optimizer.learning_rate=1e30,1e-2"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 runs diverged" in said
    assert "1:1, learning_rate 1e30, seed 42: step 2: " in said
    last = read_metrics(project / "rates/runs/1-1_optimizer.learning_rate-1e-2_seed-42")[-1]
    assert (last["step"], (project / "rates/results.json").exists()) == (6, False)
    assert main([*words.split(), "optimizer.learning_rate=1e-2"]) == 0
    assert (project / "rates/results.json").exists()


def test_with_one_group_no_plot_is_named(monkeypatch, capsys):
    for base, plot in (({"code": 1.0}, ""), ({"code": 1.0, "text": 1.0}, "pareto.svg, ")):
        found = Results(base=base, variants=(), steps=1, tokens=1)
        monkeypatch.setattr(runner, "sweep", lambda *_, found=found: found)
        monkeypatch.setattr("lemur_jax.sweep.results.markdown_table", lambda _: "")
        assert main(WORDS.split()) == 0
        assert f"wrote out/index.html, table.md, {plot}results.json" in capsys.readouterr().out


def test_a_wrong_base_may_be_corrected_in_the_same_workdir(monkeypatch, capsys):
    words = WORDS.replace("out", "corrected").split()
    assert main([*words, "--config.init.checkpoint=nowhere"]) == 2
    assert "no checkpoint directory at nowhere" in capsys.readouterr().err
    monkeypatch.setattr(runner, "train", lambda *_, **__: True)
    assert main(words) == 0


def test_a_later_run_of_another_config_is_told_before_the_first_is_trained(monkeypatch, capsys):
    words = WORDS.replace("out", "mixed").split()
    claim(from_json({"model": preset("tiny").to_dict()}).to_json(), epath.Path("mixed/runs/0-1_seed-43"))
    monkeypatch.setattr(runner, "train", None)
    assert main(words) == 2
    assert "mixed/runs/0-1_seed-43 belongs to another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.init.checkpoint="], "compares runs from one base"),
        (["--config.eval.tasks=()", "--sources", "code,text"], "name tasks in config.eval.tasks"),
        (["--config.data.sources.text.max_epochs=0.1"], "0:1: source text: the run needs"),
        (["--print", "--merge", "linear"], "cannot read --merge 'linear'"),
        (["--vary", "=3"], "cannot read --vary '=3'"),
        (["--vary", "train.steps=3,4", "--config.train.steps=7"], "no effect beside --vary train.steps"),
        (["--config.train.steps=7"], "belongs to another config: train.steps was 6"),
        (["--config.adapter.rank=2"], "--merge is of whole models, and config.adapter.rank is 2"),
        (
            ["--config.data.stages={'a':{'step':4,'shares':{'text':1.0}}}"],
            "--merge arithmetic adds up runs of",
        ),
    ],
)
def test_bad_input_is_told_before_the_first_step(swept, capsys, words, message):
    assert main([*WORDS.split(), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
