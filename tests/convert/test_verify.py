"""Verification finds what it should: one bit in a tensor, one key in a config."""

import json
import logging
import re
import sys

import numpy as np
import pytest

from lemur_jax.checkpoint.reading import read_metadata
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert import export_hf as export_module
from lemur_jax.convert import safetensors, verify
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.models.config import DecoderConfig


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_export(checkpoint, tmp_path, dtype, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lemur_jax")
    monkeypatch.setattr(export_module, "MAX_SHARD_BYTES", 20_000)
    export_hf(checkpoint, tmp_path / "out", dtype=dtype, verify=True)
    lines = [record.getMessage() for record in caplog.records if record.name == "lemur_jax.convert.export_hf"]
    assert lines[0].startswith("verified: 30 tensors")
    assert "equal transformers' on 512 tokens: max |Δ| " in lines[1]
    largest, divergence = (float(number) for number in re.findall(r"\d\S*e[-+]\d+", lines[1]))
    assert largest < 1e-4
    assert abs(divergence) < 1e-8


def test_one_bit_is_found_and_named(checkpoint, tmp_path, monkeypatch, capsys):
    """A disk that gives back another bit than it was given."""
    write_weights = safetensors.write_weights

    def flip(directory, *arguments):
        write_weights(directory, *arguments)
        file = directory / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1  # lm_head.weight is the last tensor
        file.write_bytes(content)

    monkeypatch.setattr(export_module, "write_weights", flip)
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
    config = DecoderConfig.from_dict(read_metadata(checkpoint)["model"])
    with pytest.raises(
        UserError, match=r"logits differ from transformers' on 512 tokens: max \|Δ\|"
    ) as error:
        verify.compare_logits(tmp_path / "out", config, None)
    assert float(re.search(r"KL (\S+) nats", str(error.value))[1]) > 1e-6


def test_divergence():
    """Against probabilities written out: those of the softmax of logarithms, shifted at will."""
    p = np.array([[[1, 3], [1, 1]]], np.float64) / [[[4], [2]]]
    q = np.array([[[1, 1], [1, 9]]], np.float64) / [[[2], [10]]]
    expected = (1 / 4 * np.log(1 / 2) + 3 / 4 * np.log(3 / 2) + 1 / 2 * np.log(5) + 1 / 2 * np.log(5 / 9)) / 2
    shift = np.array([[[50.0], [-7.0]]])
    logits_p, logits_q = (np.log(p) + shift).astype(np.float32), (np.log(q) - shift).astype(np.float32)
    assert verify._divergence(logits_p, logits_q) == pytest.approx(expected, rel=1e-5)
    assert verify._divergence(logits_q, logits_p) != pytest.approx(expected, rel=1e-2)
    assert verify._divergence(logits_p, logits_p + 3) == pytest.approx(0, abs=1e-12)


def test_where_logits_cannot_be_compared(checkpoint, tmp_path, monkeypatch):
    config = DecoderConfig.from_dict(read_metadata(checkpoint)["model"])
    export_hf(checkpoint, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(verify, "num_params", lambda config: 10**12)
        assert "takes 10000 GB of memory" in verify.compare_logits(tmp_path / "out", config, None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "not installed" in verify.compare_logits(tmp_path / "out", config, None)
