"""Whose workdir it is, and with which status its run ends."""

import contextlib
import json
import sys

import pytest

from lemur_jax import cli
from lemur_jax.cluster.exit import TRY_AGAIN
from lemur_jax.common.errors import UserError
from lemur_jax.config import load, replace
from lemur_jax.data.config import SourceConfig, StageConfig
from lemur_jax.train import loop
from lemur_jax.train.unused import unused_options
from lemur_jax.train.workdir import check_changes, claim, config_changes
from tests.helpers.limits import files_of_at_most
from tests.helpers.tiny import tiny_config


def test_other_hosts_never_see_half_a_config(tmp_path):
    """The file is renamed into place: a reader sees a whole file or none."""
    claim(tiny_config().to_json(), tmp_path)
    before = (tmp_path / "config.json").stat().st_ino
    claim(tiny_config().to_json(), tmp_path)
    assert (tmp_path / "config.json").stat().st_ino != before
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):  # a full disk
        claim(tiny_config().to_json(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


SOURCES = {"code": SourceConfig(share=1.0), "text": SourceConfig(share=1.0)}
LATE = {"late": StageConfig(step=4, shares={"text": 1.0})}


@pytest.mark.parametrize(
    ("options", "extend", "message"),
    [
        ({"hosts.lost_seconds": 7, "train.microbatches": 2}, False, ""),
        ({"data.modules": ("more_tasks",)}, False, ""),  # whose sources have the share 0 until a stage
        ({"data.stores": "moved/stores", "tokenizer.path": "moved/tokenizer"}, False, ""),  # with what is in it
        ({"compute.param_dtype": "bfloat16"}, True, "config: compute.param_dtype was 'float32' .*; use the old"),
        ({"train.steps": 3}, True, "config.train.steps is 3, but 4 updates are made"),
        ({"rl.max_logprob_gap": 0.1, "rl.data": "moved", "rl.eval_every_steps": 3}, False, ""),
        ({"rl.data": "moved", "rl.group_size": 3}, True, "config: rl.group_size was 8 .*; use the old"),
        ({"seed": 7, "train.steps": 20}, False, "seed was 42 .* train.steps was 10 .* or another --workdir$"),
        ({"seed": 7, "train.steps": 20}, True, "config: seed was 42 there and is 7 now; use the old"),
        ({"train.steps": 20, "optimizer.b1": 0.5}, False, "optimizer.b1 was .* train.steps was .* or --extend"),
        ({"train.steps": 20, "optimizer.learning_rate": 0.5, "data.stages": LATE}, True, ""),
        ({"data.sources": SOURCES | {"new": SourceConfig(share=0.0)}}, True, ""),
        ({"data.sources": SOURCES | {"new": SourceConfig(share=1.0)}}, True, "cannot change data.sources.new.share"),
        ({"data.sources.code.share": 2.0}, True, "cannot change data.sources.code.share from 1.0 to 2.0"),
        ({"data.sources.code.share": 2.0, "data.sources.text.share": 2.0}, True, ""),
        # As 0.1 and 0.3 times the tokens may be rounded.
        ({"data.sources.code.share": 0.1 + 0.2, "data.sources.text.share": 0.3}, True, ""),
        ({"data.stages.early.step": 8}, True, "cannot change data.stages.early.step: the stage begins before"),
        ({"data.stages.early.shares": {"text": 2.0}}, True, "cannot change data.stages.early.shares.text: the"),
    ],
)  # fmt: skip
def test_what_may_change_between_a_run_and_its_resumption(tmp_path, options, extend, message):
    first = tiny_config(
        {"data.sources": SOURCES, "data.stages": {"early": StageConfig(step=2, shares={"text": 1.0})}}
    )
    claim(first.to_json(), tmp_path)
    if isinstance(stages := options.get("data.stages"), dict):
        options = options | {"data.stages": {**first.data.stages, **stages}}
    values = replace(first, options).to_json()
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_changes(config_changes(values, tmp_path, extend=extend), values, 4)
    if message.startswith("cannot change"):  # before the first checkpoint it may
        check_changes(config_changes(values, tmp_path, extend=True), values, 0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"preference.loss": "kto"}, "train.microbatches"),
        ({"preference.loss": "orpo"}, "train.microbatches"),
        ({"model.num_experts": 4, "model.experts_per_token": 2}, "train.microbatches"),
        ({"spikes.factor": 2.0, "spikes.rollback_after": 2}, "checkpoint.every_steps"),
    ],
)
def test_what_has_an_effect_with_some_options_changes_only_with_extend(tmp_path, options, key):
    """Where a mean is of one microbatch, and where a rollback goes to a regular checkpoint."""
    first = tiny_config({"data.sources": SOURCES, **options})
    claim(first.to_json(), tmp_path)
    values = replace(first, {key: 2}).to_json()
    with pytest.raises(UserError, match=rf"{key} was \d+ there and is 2 now; .*, or --extend"):
        config_changes(values, tmp_path)
    assert list(config_changes(values, tmp_path, extend=True)) == [key]


def test_a_change_of_precision_is_recorded(tmp_path):
    first = tiny_config({"data.sources": SOURCES})
    claim(first.to_json(), tmp_path)
    values = replace(first, {"compute.dtype": "bfloat16", "compute.remat": "none", "mesh.data": 2}).to_json()
    assert config_changes(values, tmp_path) == {"compute.dtype": ("float32", "bfloat16")}


def test_without_a_config_of_its_own_a_workdir_has_that_of_its_checkpoints(train, tmp_path):
    train(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "7").mkdir()  # damaged: its metadata is missing
    with pytest.raises(UserError, match=r"belongs to another config: seed was 42 there and is 7 now"):
        train(tmp_path, seed=7)
    assert "already finished at step 6" in train(tmp_path)[-1]
    assert (tmp_path / "config.json").exists()
    # A disk that is not mounted, for example: the run must not begin again over the records of weeks.
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"metrics.jsonl says that step 3 was saved: put them back, or remove"
    ):
        train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_hosts_of_other_code_are_refused_before_anything_is_made(train, tmp_path, monkeypatch):
    def differ(name, value):
        raise UserError(f"{name} differs between hosts: {value()}")

    monkeypatch.setattr(loop, "agree", differ)
    with pytest.raises(UserError, match=r"the code of lemur_jax, or the version of .* differs"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_before_a_state_is_read(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.log.wandb needs wandb: pip install 'lemur_jax\[wandb\]'"):
        train(tmp_path / "run", **{"log.wandb": True})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, ""),
        ({"adapter.alpha": 8.0}, "adapter.alpha (adapter.rank is 0)"),
        ({"adapter.alpha": 8.0, "adapter.rank": 2, "init.checkpoint": "base"}, ""),
        ({"distill.top_k": 8}, "distill.top_k (distill.teacher is '')"),
        ({"optimizer.z_loss": 1e-4, "distill.teacher": "t"}, "optimizer.z_loss (distill.teacher is 't')"),
        ({"preference.margin": 1.0, "preference.loss": "dpo"}, "preference.margin (preference.loss is 'dpo')"),
        ({"preference.margin": 1.0, "preference.loss": "simpo", "optimizer.b1": 0.8, "optimizer.name": "muon"}, ""),
        ({"optimizer.b1": 0.8, "optimizer.name": "adafactor"}, "optimizer.b1 (optimizer.name is 'adafactor')"),
        ({"eval.max_rows": 9}, "eval.max_rows (eval.tasks is [])"),
    ],
)  # fmt: skip
def test_options_without_effect_are_named(options, unused):
    assert ", ".join(unused_options(tiny_config(options).to_json())) == unused


def test_a_config_of_an_older_version_has_the_defaults_of_new_keys(tmp_path):
    values = tiny_config({"data.sources": SOURCES}).to_json()
    older = json.loads(json.dumps(values))
    del older["spikes"], older["train"]["microbatches"], older["data"]["sources"]["code"]["packing"]
    del older["adapter"], older["model"]["rope_short_factor"]  # whose defaults are tuples
    claim(older, tmp_path)
    assert config_changes(values, tmp_path) == {}


@pytest.mark.parametrize("text", ['{"seed": ', "[1]", '{"model_type": "llama"}'])
def test_a_damaged_config_of_a_workdir_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match=r"config.json is not .*: (restore or remove it|use another --workdir)$"
    ):
        config_changes(tiny_config().to_json(), tmp_path)


def test_a_mistake_in_the_first_parameters_can_be_mended_in_the_same_workdir(
    project, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(project)
    words = ["train", "--config", "config.py", "--workdir", str(tmp_path / "run"), "--config.train.steps=2"]
    assert cli.main([*words, "--config.init.checkpoint=nowhere"]) == 2
    assert "no checkpoint directory at nowhere" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert cli.main([*words, "--config.init.checkpoint=nowhere"]) == 2
    assert "belongs to another config: init.checkpoint was ''" in capsys.readouterr().err


def test_a_run_that_was_waited_for_has_the_workdir(train, tmp_path, monkeypatch):
    """It claimed the workdir after this one had looked."""

    @contextlib.contextmanager
    def held(workdir):
        claim(load("config.py", ["--config.seed=7"]).to_json(), workdir)
        yield

    monkeypatch.setattr(loop, "workdir_lock", held)
    with pytest.raises(UserError, match="belongs to another config: seed was 7 there"):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("relaunch", "stopped", "status"), [("1", False, 0), ("1", True, TRY_AGAIN), ("", True, 0)], ids=str
)
def test_launchers_see_whether_a_run_was_stopped(project, tmp_path, monkeypatch, relaunch, stopped, status):
    monkeypatch.chdir(project)
    monkeypatch.setenv("LEMUR_RELAUNCH", relaunch)
    monkeypatch.setattr(loop, "train", lambda *_, **__: stopped)
    assert cli.main(["train", "--config", "config.py", "--workdir", str(tmp_path)]) == status
