"""Adapters written for a base that is a Hugging Face directory."""

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, replace
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.hf_config import read_config
from lemur_jax.convert.peft import export_peft, read_peft
from lemur_jax.models import lora
from lemur_jax.models.config import AdapterConfig


def write_adapter(directory, base, name=None, scale=0.2):
    """A checkpoint of a random adapter of all projections of `base`, a Hugging Face directory that is called `name`."""
    model = read_config(base)
    options = {"adapter.rank": 4, "adapter.targets": ("*",), "init.checkpoint": name or str(base)}
    config = replace(RunConfig(model=model), options)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * scale,
        lora.abstract_adapter(config.adapter, model, "float32"),
    )
    metadata = make_metadata(model=model.to_dict(), tokenizer_files={}, config=config.to_json())
    write_params(directory, adapter, metadata)


def test_peft_computes_what_the_merged_model_computes(make_model, tmp_path):
    model = make_model(kind="Qwen2", num_key_value_heads=2)
    write_adapter(tmp_path / "adapter", model.path)
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    export_hf(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    with pytest.raises(UserError, match="hf is the base of the adapter in"):
        export_hf(tmp_path / "adapter", model.path, overwrite=True)
    query = AdapterConfig(rank=4, targets=("*/query",), checkpoint=str(tmp_path / "peft"))
    with pytest.raises(UserError, match=r"for config\.adapter\.targets \*/query: tensor .* not part"):
        read_peft(query, read_config(model.path), "float32")
    tokens = torch.arange(1, 61)[None]
    with torch.no_grad():
        before = model.model(tokens).logits
        adapted = peft.PeftModel.from_pretrained(model.model, tmp_path / "peft").eval()(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    assert (adapted - before).abs().max() > 0.1
    assert (adapted - merged).abs().max() <= 1e-4 * merged.abs().max()


def test_a_value_too_large_for_float16_is_refused(hf_model, tmp_path):
    write_adapter(tmp_path / "adapter", hf_model.path, scale=1e5)
    with pytest.raises(UserError, match=r"lora_A\.weight has a value of .* more than float16 can hold"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", dtype="float16")
    assert not (tmp_path / "peft").exists()


def test_a_changed_rotary_embedding_is_refused(hf_model, tmp_path):
    """`init.change_rope` is in the config of the run alone: `peft` would take the base's."""
    write_adapter(tmp_path / "adapter", hf_model.path)
    hf_model.edit_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(UserError, match="has rope_theta 500000.0, the run 10000.0"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")


def test_a_base_with_other_names_is_refused(make_model, tmp_path):
    """`peft` would load such an adapter in part, with a warning."""
    model = make_model(kind="Phi3", num_key_value_heads=2, pad_token_id=0)
    write_adapter(tmp_path / "adapter", model.path)
    with pytest.raises(UserError, match=r"has no tensor model\.layers\.0\.mlp\.gate_proj\.weight"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")
    model.path.rename(tmp_path / "moved")  # then nothing can be checked
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    with pytest.raises(UserError, match="adapter is an adapter of .*hf, which cannot be read"):
        export_hf(tmp_path / "adapter", tmp_path / "merged")


def test_the_revision_of_a_base_on_the_hub_is_apart(hf_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapter", hf_model.path, "org/model@v1")
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    assert (config.base_model_name_or_path, config.revision) == ("org/model", "v1")
