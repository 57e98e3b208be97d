"""Which runs a sweep has, and the commands that train them one by one."""

import shlex

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import from_json, load
from lemur_jax.sweep.runs import plan_runs, run_configs
from tests.helpers.sweeps import config_of


def shares_of(run):
    pairs = [item.removeprefix("--config.data.sources.").split(".share=") for item in run.overrides]
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}


def test_every_ratio_setting_and_seed():
    varied = [("optimizer.learning_rate", ["1e-3", "3e-3"]), ("optimizer.warmup_steps", ["0", "10"])]
    runs = plan_runs(config_of(), ["1:0", "10:1"], 3, varied)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * 3
    assert [run.seed for run in runs[:4]] == [42, 43, 44, 42]
    assert len({run.variant for run in runs}) == 8
    assert runs[0].variant == "1:0, learning_rate 1e-3, warmup_steps 0"
    assert "--config.optimizer.warmup_steps=10" in runs[-1].overrides


@pytest.mark.parametrize(("sources", "shares"), [("", (10.0, 1.0)), ("code,web", (1.0, 10.0))])
def test_a_ratio_follows_the_order_of_the_tasks_and_not_of_the_alphabet(sources, shares):
    (run,) = plan_runs(config_of(("web", "code"), code=1.0, web=1.0), ["10:1"], 1, sources=sources)
    assert shares_of(run) == dict(zip(("web", "code"), shares, strict=True))


def test_a_part_of_several_sources_keeps_its_own_shares():
    config = config_of(python=3.0, java=1.0, web=2.0)
    (run,) = plan_runs(config, ["10:1"], 1, sources="python&java,web")
    assert shares_of(run) == {"python": 7.5, "java": 2.5, "web": 1.0}
    empty = config_of(python=0.0, java=0.0, web=2.0)
    (run,) = plan_runs(empty, ["10:1"], 1, sources="python&java,web")
    assert shares_of(run) == {"python": 5.0, "java": 5.0, "web": 1.0}
    (run,) = plan_runs(config, [], 1, sources="python&java,web")
    assert run.ratio == "4:2"


def test_languages_of_one_corpus_are_a_part(project, monkeypatch):
    monkeypatch.chdir(project)
    config = load("config.py:languages")
    (run,) = plan_runs(config, ["10:1"], 1, sources="code/C++&code/Java,web")
    sources = run_configs("config.py:languages", [], [run])[run].data.sources
    assert [sources[name].share for name in ("code/C++", "code/Java", "web")] == [7.5, 2.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": ["1"]}, "'1' has 1 parts, the sources have 2: code, text"),
        ({"ratios": ["0:0"]}, "cannot read the ratio '0:0'"),
        ({"ratios": ["-1:1"]}, "cannot read the ratio '-1:1'"),
        ({"ratios": ["1:x"]}, "cannot read the ratio '1:x'"),
        ({"ratios": ["1:1", "1:1"]}, "a run twice"),
        ({"ratios": ["3:1", "1:1", "6:2"]}, "a run twice"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"seeds": 10**12}, "has 1,000,000,000,000 runs, above 1,000"),
        ({"sources": "code"}, "must name each of code, text once"),
        ({"varied": [("init.checkpoint", ["a", "b"])]}, "vary config.init.checkpoint: all runs .* one base"),
        ({"varied": [("data.sequence_length", ["64", "32"])]}, "compared with one base"),
        ({"varied": [("train.steps", ["1"]), ("train.steps", ["2"])]}, "name all its values in one --vary"),
        ({"varied": [("seed", ["1", "2"])]}, "cannot vary config.seed: --seeds and --ratios"),
    ],
)
def test_bad_input(changes, message):
    options = {"ratios": ["1:1"], "seeds": 1} | changes
    with pytest.raises(UserError, match=message):
        plan_runs(config_of(), **options)


def test_the_order_of_sources_must_be_known():
    with pytest.raises(UserError, match="the ratios have no order: --sources must name"):
        plan_runs(config_of(tasks=("code",)), ["1:1"], 1)


@pytest.fixture
def printed(project, monkeypatch, capsys):
    """`printed(words)`: the words of each command that `lemur sweep --print` writes, and what it says of a mistake."""
    monkeypatch.chdir(project)

    def run(words):
        status = main(["sweep", "--config", "config.py", "--workdir", "out", "--print", *words])
        out, error = capsys.readouterr()
        assert (status, bool(error)) in ((0, False), (2, True))
        return [shlex.split(line) for line in out.splitlines()], error

    return run


def test_printed_commands_train_the_same_runs(printed):
    commands, _ = printed(["--seeds", "2", "--config.train.steps=9", "--ratios", "1:0, 3:1"])
    assert len(commands) == 4
    lemur, verb, flag, path, _, workdir, *overrides = commands[-1]
    assert (lemur, verb, flag, workdir) == ("lemur", "train", "--config", "out/runs/3-1_seed-43")
    config = load(path, overrides)
    assert (config.seed, config.train.steps) == (43, 9)
    assert (config.data.sources["code"].share, config.data.sources["text"].share) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("varied", "values"),
    [
        # A warmup of 10 updates is refused for the 6 of the config, which the first value takes the place of.
        ("train.steps=12,14", ["12", "14"]),
        ("compute.attention_blocks=(0,512), (1024,0)", ["(0,512)", "(1024,0)"]),
        *((f"train.steps{wrong}", "cannot read --vary 'train.steps") for wrong in ("", "=", "=12,,14")),
        (
            "optimizer.learning_rate=1e-3,2e-3,0.001",
            "1:1, learning_rate 1e-3 and 1:1, learning_rate 0.001 are",
        ),
        ("train.step=12,14", "unknown config key train.step"),
        ("train.steps=12,x", "--config.train.steps=x"),
    ],
)
def test_varied_values(printed, varied, values):
    warmup = ["--config.optimizer.warmup_steps=10"] if "steps=" in varied else []
    commands, error = printed(["--ratios", "1:1", "--seeds", "1", *warmup, "--vary", varied])
    if error:
        assert values in error
        assert not commands
    else:
        key = varied.partition("=")[0]
        assert [words[-2] for words in commands] == [f"--config.{key}={value}" for value in values]


def test_sources_with_epochs_have_no_shares_to_vary():
    source = {"share": 0.0, "packing": "concat", "max_epochs": 0.0, "epochs": 2.0}
    config = config_of().to_json()
    config["data"]["sources"] = dict.fromkeys(("code", "text"), source)
    with pytest.raises(UserError, match="have `epochs`: a sweep varies shares"):
        plan_runs(from_json(config), ["1:1"], 1)
