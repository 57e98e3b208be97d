"""Configs: every mistake is one line that names the key, the value and the way out."""

import pathlib

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, flatten, load, replace
from lemur_jax.models.presets import preset

CONFIG = """
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

def get_config(arg=""):
    config = default_config(preset("tiny"))
    config.data.sources = {"code": {"share": 10.0, "packing": "concat", "max_epochs": 1.0}}
    if arg:
        config.seed = int(arg)
    return config
"""


EXPERTS = {"model.num_experts": 4, "model.experts_per_token": 2}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


def test_overrides_take_the_type_of_the_leaf(path):
    values = ("train.steps=7", "optimizer.learning_rate=1", "data.sources.code.share=5")
    config = load(path, [f"--config.{value}" for value in values])
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.data.sources["code"].share == 5.0


def test_a_source_with_a_slash_is_overridden_by_its_name(path):
    text = pathlib.Path(path).read_text().replace('"code"', '"code/C++"')
    pathlib.Path(path).write_text(text)
    assert load(path, ["--config.data.sources['code/C++'].share=3"]).data.sources["code/C++"].share == 3.0


def test_overrides_reach_keys_that_a_file_left_out_and_fractions_where_it_has_whole_numbers(path):
    stage = 'config.data.stages = {"late": {"step": 9, "shares": {"code": 1}}}'
    text = (
        pathlib.Path(path)
        .read_text()
        .replace("10.0", "10")
        .replace("    if arg:", f"    {stage}\n    if arg:")
    )
    pathlib.Path(path).write_text(text.replace(', "max_epochs": 1.0', ""))
    keys = ("sources.code.share", "sources.code.max_epochs", "stages.late.shares.code")
    data = load(path, [f"--config.data.{key}=2.5" for key in keys]).data
    assert (data.sources["code"].share, data.sources["code"].max_epochs) == (2.5, 2.5)
    assert data.stages["late"].shares == {"code": 2.5}
    assert load(path).data.sources["code"].share == 10.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.data.sources = None", "config.data.sources is None: it must be a mapping by name"),
        ("config.data.stages = {'late': {'step': 9, 'shares': None}}", "config.data.stages.late.shares is None"),
    ],
)  # fmt: skip
def test_what_should_be_a_mapping_is_named(path, line, message):
    file = pathlib.Path(path)
    file.write_text(file.read_text().replace("    if arg:", f"    {line}\n    if arg:"))
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.rope_theta": 0.0}, "model.rope_theta is 0.0: it must be above 0"),
        ({"model.rope_factor": -2.0}, "above 0"),
        ({"model.rms_norm_eps": -1e-5}, "0 or more"),
        ({"model.query_scale": -1.0}, "0 or more"),
        ({"model.vocab_size": 10**30}, "at least 1, and below 2"),
        (
            {"model.rope_scaling": "llama3", "model.rope_low_freq_factor": 4.0},
            "model.rope_high_freq_factor is 4.0: it must be above model.rope_low_freq_factor 4.0",
        ),
        ({"adapter.alpha": 0.0}, "adapter.alpha is 0.0: it must be above 0"),
        ({"adapter.checkpoint": "peft", "init.checkpoint": "base"}, "is read only with config.adapter.rank"),
        ({"checkpoint.keep_best": "code", "checkpoint.every_steps": 0}, "above 0 with checkpoint.keep_best"),
        (
            {"spikes.factor": 2.0, "spikes.rollback_after": 2, "checkpoint.every_steps": 0},
            "config.checkpoint.every_steps above 0",
        ),
        ({"spikes.factor": 0.5}, "config.spikes.factor"),
        ({"spikes.factor": -2.0}, "config.spikes.factor"),
        ({"spikes.factor": 2.0, "spikes.window": 0}, "config.spikes.window"),
        ({"spikes.rollback_after": 2}, "config.spikes.rollback_after"),
        (
            {"eval.tasks": ("a",), "eval.groups": {"code": ("a", "x")}},
            "eval.groups.code is .* one or more of",
        ),
        ({"eval.tasks": ("a",), "eval.groups": {"code": ()}}, "eval.groups.code is .* one or more of"),
        ({"compute.gate_share": 1.0}, r"must be in \[0, 1\)"),
        (
            {"compute.gate_share": 0.5, "compute.remat": "mlp_gate"},
            "must be 0 with compute.remat 'mlp_gate', which",
        ),
        ({"compute.gate_share": 0.5, "model.mlp_bias": True}, "biases in the mlp"),
        ({"compute.gate_share": 0.5, **EXPERTS}, "set it to 0 with experts"),
        (
            {"compute.gate_share": 0.5, "adapter.rank": 4, "init.checkpoint": "base"},
            "with config.adapter.rank",
        ),
        ({"train.batch_rows": 2**31}, "at most 2"),
        ({"compute.param_dtype": "float16"}, "one of 'float32', 'bfloat16'"),
    ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        replace(RunConfig(model=preset("tiny")), options)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.train.stps=3", ["train.stps", "'3'", "train.steps"]),
        ("--config.trian.steps=3", ["trian.steps", "train.steps"]),
        ("--config.zzz=3", ["zzz", "docs/configuration.md lists all"]),
        ("--config.train.steps=many", ["train.steps", "many"]),
        ("--config.mesh.fsdp=2.5", ["mesh.fsdp", "2.5"]),
        ("--config.train=3", ["train"]),
        ("--config.log.wandb[0]=1", ["log.wandb[0]"]),
        ("--config.eval.tasks=1_000", ["eval.tasks", "1000", "a string"]),
        ("--config.eval.tasks={'code': 1}", ["eval.tasks", "{'code': 1}", "a tuple"]),
        ("--config.eval.tasks=('code','code')", ["eval.tasks", "each task once"]),
        (f"--config.seed={2**63}", ["seed", "64 bits"]),
        ("--config.optimizer.learning_rate=1e999", ["optimizer.learning_rate", "inf", "a finite number"]),
        ("--config.=3", ["--config.=3"]),
        ("--learning-rate=3", ["--learning-rate=3", "--config.section.key=value"]),
    ],
)
def test_bad_override_is_one_line_that_names_it(path, override, words):
    right = ["--config.data.sources={'code': {'share': 1.0}}", "--config.data.sources['code'].share=2.0"]
    with pytest.raises(UserError) as error:
        load(path, [*right, override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_argument_that_a_config_does_not_take_is_one_line(tmp_path):
    (tmp_path / "config.py").write_text(
        CONFIG.replace('(arg="")', "()").replace("    if arg:", "    if False:")
    )
    with pytest.raises(UserError, match=r"config.py:17: TypeError: .* takes 0 positional arguments") as error:
        load(str(tmp_path / "config.py:17"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [
        "    config.train.stepps = 3",
        "    config.trein = 3",
        "    config.train.steps = 'x'",
        "    import not_there",
        "    config.train.steps = undefined_name",
        "    {}['x']",
        "    raise RuntimeError('two\\nlines')",
        "    raise SystemExit",
    ],
)
def test_bad_config_file_is_one_line_that_names_the_line(tmp_path, body):
    (tmp_path / "config.py").write_text(CONFIG.replace("    if arg:", body + "\n    if arg:"))
    with pytest.raises(UserError, match=r"\(line 8 of .*config\.py\)$") as error:
        load(str(tmp_path / "config.py"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"), [("config.json", "is not a Python file"), ("none.py", "no config file")]
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, name, words):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / name))


def test_flatten_keeps_an_empty_mapping():
    assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}
