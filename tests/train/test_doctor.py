"""`lemur doctor` on a run that is ready, and with one thing wrong at a time."""

import json
import sys
import types

import pytest

from lemur_jax.cluster import coordination
from lemur_jax.common.errors import UserError
from lemur_jax.config import load
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import train_sentencepiece
from lemur_jax.train import doctor as module
from lemur_jax.train.doctor import doctor
from lemur_jax.train.workdir import claim
from tests.helpers.hosts import Project
from tests.helpers.runs import run_in_process, write_model

GOOD = module.Finding(check="free disk", good=True, detail="")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("doctor"))


@pytest.fixture
def examine(project, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(project.root)

    def run(*overrides, workdir=tmp_path / "run", extend=False):
        caplog.clear()
        verdict = []
        try:
            doctor(load("config.py", overrides), workdir, extend=extend)
        except UserError as error:
            verdict.append(str(error))
        return "\n".join([*(record.getMessage() for record in caplog.records), *verdict])

    return run


def test_ready_run_and_a_workdir_left_as_it_was(examine, tmp_path, monkeypatch):
    said = examine()
    assert said.endswith("verdict: 1 host ready")
    assert "FAIL" not in said
    for words in ("jax 0.", "8 × cpu", "fsdp 8", "written and read", "GB free", "all-reduce of 1 MiB"):
        assert words in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    examine()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "config.log.wandb needs wandb" in examine("--config.log.wandb=True")


@pytest.mark.parametrize(
    ("overrides", "check", "detail"),
    [
        (["--config.mesh.fsdp=3"], "mesh", "does not multiply"),
        (["--config.train.batch_rows=12"], "mesh", "must be a multiple of 8"),
        (["--config.train.microbatches=3"], "mesh", "batch_rows 8 must be a multiple of 24"),
        (["--config.compute.attention=splash"], "mesh", "'splash' needs a TPU, not cpu"),
        (["--config.compute.attention=cudnn"], "mesh", "'cudnn' needs a GPU, not cpu"),
        (["--config.data.stores=nowhere"], "token stores", "nowhere"),
        (["--config.tokenizer.path=nowhere"], "token stores", "nowhere"),
        (["--config.checkpoint.keep=1000000000"], "free disk", "GB needed"),
        (["--config.init.checkpoint=nowhere"], "first parameters", "no checkpoint directory at nowhere"),
        (["--config.model.vocab_size=200"], "token stores", "it must be at least as large"),
        (["--config.preference.loss=simpo"], "token stores", "code has no preferences"),
    ],
)
def test_one_thing_wrong(examine, overrides, check, detail):
    said = examine(*overrides)
    (line,) = [line for line in said.splitlines() if line.startswith("FAIL")]
    assert check in line
    assert detail in line
    assert said.endswith(f"verdict: not ready, because of {check}")


def test_first_parameters_are_looked_at_until_the_run_has_its_own(examine, project, tmp_path, monkeypatch):
    files = Tokenizer.load(project.root / "tokenizer").files()
    write_model(tmp_path / "init", load("config.py").model, files)
    option = f"--config.init.checkpoint={tmp_path / 'init'}"
    assert "init: fit the model and the tokenizer" in examine(option)
    assert "has model.num_hidden_layers 2, the config 3" in examine(
        option, "--config.model.num_hidden_layers=3"
    )
    assert "set config.init.new_rows='mean'" in examine(option, "--config.model.vocab_size=520")
    teacher = f"--config.distill.teacher={tmp_path / 'init'}"
    assert "config.distill.teacher" in examine(teacher, "--config.model.vocab_size=520")
    adapter = (option, "--config.adapter.rank=2")
    assert "FAIL" not in examine(*adapter)
    peft = "--config.adapter.checkpoint=nowhere"
    assert "nowhere has no adapter_model.safetensors" in examine(*adapter, peft)
    # Every start reads the base of an adapter again, but not what the run has saved.
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    said = examine(option, "--config.model.num_hidden_layers=3")
    assert "first parameters   not needed: the run has checkpoints" in said
    assert "FAIL" not in examine(*adapter, peft)
    assert "no checkpoint directory at gone" in examine("--config.init.checkpoint=gone", *adapter[1:])
    stored = {"origins": {"init.checkpoint": {"step": 0, "digest": "of other weights"}}}
    monkeypatch.setattr(module, "newest_metadata", lambda directory: stored)
    assert "init was made again since this run began" in examine(*adapter)


def test_a_workdir_of_another_config_is_not_ready(examine, tmp_path):
    claim(load("config.py").to_json(), tmp_path / "run")
    assert examine("--config.log.every_steps=3").endswith("verdict: 1 host ready")
    assert "FAIL  config" in (said := examine("--config.seed=7"))
    assert "seed was 42 there and is 7 now" in said
    assert "ok    newest checkpoint  not looked at" in said


def test_what_would_be_refused_at_the_newest_checkpoint_is_not_ready(examine, tmp_path):
    run_in_process(tmp_path / "run")  # of six steps
    options = ("--config.train.steps=6", "--config.eval.every_steps=0")
    assert "newest checkpoint  step 6 fits the config and the data" in examine(*options)
    for option, reason in (
        ("train.steps=3", "but 6 updates are made"),
        ("data.sources.code.share=3.0", "cannot change data.sources.code.share"),
        ("optimizer.name=muon", "config.checkpoint.other_optimizer='fresh' resets it"),
    ):
        assert reason in (said := examine(*options, f"--config.{option}", extend=True))
        assert "FAIL  newest checkpoint" in said
    fresh = ("--config.optimizer.name=muon", "--config.checkpoint.other_optimizer=fresh")
    assert "FAIL" not in examine(*options, *fresh)


def test_frozen_weights_take_no_room_of_checkpoints(examine, project, tmp_path, monkeypatch):
    files = Tokenizer.load(project.root / "tokenizer").files()
    write_model(tmp_path / "init", load("config.py").model, files)
    needed = []
    monkeypatch.setattr(module, "_free_disk", lambda _, size, keep: needed.append(size) or GOOD)
    examine(f"--config.init.checkpoint={tmp_path / 'init'}", "--config.adapter.rank=1")
    examine()
    adapter, whole = needed
    assert adapter < whole / 20


def test_rows_of_another_tokenizer_are_refused(examine, project, tmp_path):
    """As many ids, and other texts; the first rows alone may be kept."""
    words = [f"other_{i} + {i} = thing_{i % 7}" for i in range(400)]
    other = train_sentencepiece(words, tmp_path / "other", vocab_size=300)
    ours = Tokenizer.load(project.root / "tokenizer")
    first = next(index for index in range(300) if other.token(index) != ours.token(index))
    write_model(tmp_path / "init", load("config.py").model, other.files())
    option = f"--config.init.checkpoint={tmp_path / 'init'}"
    said = examine(option)
    assert f"was trained with another tokenizer: id {first} is {other.token(first)!r} there" in said
    assert "verdict: not ready, because of first parameters" in said
    kept = (option, f"--config.init.drop_rows_above={first}")
    assert "set config.init.new_rows='mean'" in examine(*kept)
    assert "fit the model" in examine(*kept, "--config.init.new_rows=mean")


def test_workdir_that_cannot_be_written(examine, tmp_path):
    (tmp_path / "file").write_text("")
    assert "because of workdir" in examine(workdir=tmp_path / "file" / "run")


def test_wrong_sum_is_a_broken_interconnect(examine, monkeypatch):
    jnp = types.SimpleNamespace(**{**vars(module.jnp), "sum": lambda x, axis: x[0]})
    monkeypatch.setattr(module, "jnp", jnp)
    assert "because of collectives" in examine()


def test_host_with_other_versions_is_named(examine, monkeypatch):
    """The other host's findings, as they would come through the service."""

    def exchange(name, value, seconds):
        if name == "clock":
            return [value, str(float(value) + 60)]
        if name != "findings":
            return [value, value]
        _, findings = json.loads(value)
        other = [{**one, "detail": one["detail"].replace("jax 0.", "jax 9.")} for one in findings]
        return [value, json.dumps(["other", other])]

    monkeypatch.setattr(coordination, "exchange", exchange)
    said = examine()
    assert "FAIL  versions           host 1 (other): python" in said
    assert "because of versions, clock" in said
