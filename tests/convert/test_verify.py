"""Verification finds what it should: one bit in a tensor, one key in a config."""

import json
import re
import sys

import pytest

from lemur_jax.checkpoint.manager import read_metadata
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert import export_hf as export_module
from lemur_jax.convert import safetensors_writer, verify
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.import_hf import import_hf
from lemur_jax.models.config import LlamaConfig


@pytest.fixture
def checkpoint(make_model, tmp_path):
    import_hf(make_model().path, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_export(checkpoint, tmp_path, dtype):
    lines = []
    export_hf(
        checkpoint, tmp_path / "out", dtype=dtype, max_shard_bytes=20_000, verify=True, say=lines.append
    )
    assert lines[0].startswith("verified: 30 tensors")
    assert "equal transformers' on 512 tokens: max |Δ| " in lines[1]
    largest, divergence = (float(number) for number in re.findall(r"\d\S*e[-+]\d+", lines[1]))
    assert largest < 1e-4
    assert abs(divergence) < 1e-8


def test_one_bit_is_found_and_named(checkpoint, tmp_path, monkeypatch, capsys):
    """A disk that gives back another bit than it was given."""
    write_index = safetensors_writer.write_index

    def flip(directory, shards, total):
        write_index(directory, shards, total)
        file = directory / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1  # lm_head.weight is the last tensor
        file.write_bytes(content)

    monkeypatch.setattr(export_module, "write_index", flip)
    assert main(["export-hf", str(checkpoint), str(tmp_path / "out"), "--verify"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "tensor lm_head.weight differs from the checkpoint in 1 of 3072 values, first at [95, 29]" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_a_config_that_says_another_model_is_found(checkpoint, tmp_path):
    """Tensors are as they should be; the angles that transformers computes are not."""
    export_hf(checkpoint, tmp_path / "out", dtype="float32")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 20_000.0}))
    config = LlamaConfig.from_dict(read_metadata(checkpoint)["model"])
    with pytest.raises(UserError, match=r"logits differ from transformers' on 512 tokens: max \|Δ\|"):
        verify.compare_logits(tmp_path / "out", config, None)


def test_where_logits_cannot_be_compared(checkpoint, tmp_path, monkeypatch):
    config = LlamaConfig.from_dict(read_metadata(checkpoint)["model"])
    export_hf(checkpoint, tmp_path / "out")
    huge = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 10**9})
    monkeypatch.setattr(verify.layout, "weights", lambda config: [type("W", (), {"shape": (10**12,)})])
    assert "takes 10000 GB of memory" in verify.compare_logits(tmp_path / "out", huge, None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "not installed" in verify.compare_logits(tmp_path / "out", config, None)
