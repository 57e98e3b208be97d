"""Every config beside the code loads, is a possible model, and holds the recipe's numbers."""

import dataclasses
import pathlib
import runpy

import jax
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import default_config, load
from lemur_jax.convert.source import ModelSource
from lemur_jax.models.decoder import num_params
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.train import initial
from lemur_jax.train.step import build

CONFIGS = sorted(
    path for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if "tasks" not in path.name
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_a_program(path, monkeypatch):
    def tiny(_):
        return default_config(preset("tiny", max_position_embeddings=512))

    monkeypatch.setattr("lemur_jax.config_from_checkpoint", tiny)  # its model is downloaded
    one_device = path.stem.startswith(("smollm2", "llama3_lora", "quickstart_dpo"))  # and here are eight
    rows = ["--config.train.batch_rows=8", "--config.train.microbatches=1"] if one_device else []
    mesh = (
        ["--config.mesh.fsdp=-1"] if path.stem in ("lemur_70b_chat", "lemur_7b_chat", "adapt_chat") else []
    )  # of 64 chips
    config = load(str(path), [*rows, *mesh])
    program = build(config, make_mesh(config.mesh), len(config.data.sources))
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(program.state))
    text = path.read_text()
    verb = "rl" if path.stem.endswith("_rl") else "train"
    assert f"lemur {verb} --config configs/{path.name}" in text  # the exact command


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("adapt_pretrain", ("qwen2.5_coder_7b", "qwen3_8b", "llama3.1_8b")),
        ("adapt_chat", ("qwen2.5_coder_7b", "qwen3_8b", "llama3.1_8b")),
        ("long_context", ("32k", "128k", "yarn32k", "yarn128k")),
    ],
)
def test_models_and_lengths_of_a_config(file, arguments):
    for argument in arguments:
        config = load(f"{CONFIGS[0].parent / file}.py:{argument}")
        assert config.data.sequence_length <= config.model.max_position_embeddings
        if file != "adapt_chat":
            assert config.train.batch_rows * config.data.sequence_length == 4_194_304
        if "yarn" in argument:
            assert config.model.max_position_embeddings == 4096 * config.model.rope_factor
    with pytest.raises(UserError, match="nothing"):
        load(f"{CONFIGS[0].parent / file}.py:nothing")


def test_rows_grow_from_the_models_that_their_config_names(monkeypatch):
    path = CONFIGS[0].parent / "long_context.py"
    llama = preset("llama2_7b")
    extended = load(f"{path}:yarn32k").model
    starts = {"32k": llama, "yarn32k": llama, "yarn128k": extended, "128k": preset("llama3.1_8b")}
    for argument, model in starts.items():
        config = load(f"{path}:{argument}")
        source = ModelSource(model=model, tokenizer_files={}, restore=lambda *_: None, digest=str)
        monkeypatch.setattr(initial, "open_again", lambda *_, source=source: (source, {"digest": ""}))
        assert initial.open_initial(config.init, None, config.model, {}) is source
        if argument != "128k":
            fixed = dataclasses.replace(config.init, change_rope=False)
            with pytest.raises(UserError, match=r"must be the same model, or set config\.init\.change_rope"):
                initial.open_initial(fixed, None, config.model, {})
        with pytest.raises(UserError, match="must be the same model$"):
            initial.open_initial(
                config.init, None, dataclasses.replace(config.model, num_hidden_layers=3), {}
            )


def test_pretraining_has_the_recipes_numbers():
    config = load(str(CONFIGS[0].parent / "lemur_70b_pretrain.py"))
    assert config.train.batch_rows * config.data.sequence_length == 4_194_304
    assert config.train.steps * 4_194_304 == pytest.approx(90e9, rel=1e-4)
    shares = {name: source.share for name, source in config.data.sources.items()}
    assert len(shares) == 16
    assert (shares["stack_python"], shares["dm_mathematics"]) == (72.73, 0.41)  # Table 8
    table = runpy.run_path(str(CONFIGS[0].parent / "lemur_70b_pretrain.py"))
    for share, billions, epochs in {**table["CODE"], **table["TEXT"]}.values():
        assert share / 100 * 90 == pytest.approx(billions, abs=0.01)
        assert epochs <= 2.98
    code = sum(
        share for name, share in shares.items() if name.startswith("stack_") and name != "stackexchange"
    )
    assert code / (sum(shares.values()) - code) == pytest.approx(10, rel=0.01)
    assert config.optimizer.warmup_steps == 2000
    assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate) == (4e-5, 4e-6)
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.optimizer.clip_norm, config.seed) == (1.0, 42)
    assert config.model.vocab_size == 32_024


def test_chat_goes_from_32024_over_32000_to_32005():
    config = load(str(CONFIGS[0].parent / "lemur_70b_chat.py"))
    assert (config.init.drop_rows_above, config.init.new_rows, config.model.vocab_size) == (
        32_000,
        "mean",
        32_005,
    )
    assert len(config.tokenizer.add_tokens) == 5
    assert num_params(config.model) > 68e9
