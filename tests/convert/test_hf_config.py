"""config.json against what transformers reads and writes."""

import copy
import json

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lemur_jax.common.errors import UserError
from lemur_jax.convert import hf_config
from lemur_jax.models.presets import preset
from lemur_jax.models.rope import inverse_frequencies

LLAMA2 = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
ORIGINAL = "original_max_position_embeddings"
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**SCALED, ORIGINAL: 8192}


def with_keys(**changes):
    return {**LLAMA2, **changes}


def test_llama2_as_published():
    assert hf_config.from_hf(LLAMA2) == preset("llama2_7b")


@pytest.mark.parametrize(
    "name", ["llama2_70b", "codellama_34b", "llama3.1_8b", "llama3.2_1b", "lemur_70b_chat"]
)
def test_round_trip_and_transformers_agrees(name, tmp_path):
    config = preset(name)
    written = hf_config.to_hf(config, dtype="bfloat16", bos=1, eos=2, pad=None)
    assert hf_config.from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaConfig
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert (
        str(theirs.dtype) == f"torch.{written['torch_dtype']}" == "torch.bfloat16"
    )  # the latter for version 4
    # What transformers 5 makes of it, and writes again, is the same model to us.
    theirs.save_pretrained(tmp_path / "again")
    assert hf_config.read_config(tmp_path / "again") == config


def test_both_versions_of_transformers_find_the_angles_of_gemma(tmp_path):
    config = preset("gemma3_27b")
    written = hf_config.to_hf(config, dtype="float32", bos=2, eos=1, pad=0)
    assert hf_config.from_hf(written) == config
    # As version 4 reads them.
    scaling = {"rope_type": "linear", "factor": 8.0}
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert written["rope_scaling"] == scaling
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs["full_attention"] == {**scaling, "rope_theta": 1e6}
    assert theirs["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(("inside", "outside"), [(2048, None), (2048, 1024), (6, None), (4, None)])
def test_an_original_length_outside_of_the_scaling_counts_first(inside, outside):
    """Over the shortest, the ramp between the kept and the divided frequencies has no length, or a negative one."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, ORIGINAL: inside}
    raw = with_keys(rope_parameters=rope) | ({"original_max_position_embeddings": outside} if outside else {})
    ours = inverse_frequencies(hf_config.from_hf(raw))
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(raw))).inv_freq
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_family_that_refuses_the_heads_is_not_written():
    raw = with_keys(
        model_type="mistral", sliding_window=None, hidden_size=100, num_attention_heads=8, head_dim=16
    )
    config = hf_config.from_hf(raw)
    written = hf_config.to_hf(config, dtype="float32", bos=1, eos=2, pad=0)
    assert transformers.AutoConfig.for_model(**written).head_dim == 16
    with pytest.raises(Exception, match="not a multiple"):
        transformers.AutoConfig.for_model(**{**written, "model_type": "llama"})


OLD_YARN = {"type": "yarn", "factor": 32.0, ORIGINAL: 1024, "finetuned": True}  # of Yarn-Llama-2
SU = {"type": "su", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"model_type": "mistral"}, "num_key_value_heads", 8),
        ({"model_type": "mistral"}, "sliding_window", 4096),
        ({"model_type": "mistral", "sliding_window": None}, "sliding_window", 0),
        # Phi-3.5's window is wider than all positions: it counts where these are extended.
        ({"model_type": "phi3", "sliding_window": 262_144}, "sliding_window", 262_144),
        ({"model_type": "mixtral", "num_experts": 4}, "num_experts", 4),
        ({"model_type": "gemma2", "sliding_window_pattern": 3}, "full_attention_every", 2),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "logit_softcap", 30.0),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "attention_softcap", 0.0),
        ({"model_type": "gemma3_text", "rope_scaling": None}, "rope_theta", 1e6),
        ({"model_type": "smollm3", "num_key_value_heads": None}, "num_key_value_heads", 32),
        ({"rope_scaling": OLD_YARN}, "rope_factor", 32.0),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling", "linear"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_factor", 4.0),
        ({"rope_scaling": SCALED}, "rope_original_max_position_embeddings", 4096),
        # Of transformers 5.
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, "rope_original_max_position_embeddings", 8192),
        ({"model_type": "phi3", "rope_scaling": SU, ORIGINAL: 1024}, "rope_factor", 4.0),
    ],
)
def test_defaults_and_spellings_are_those_of_transformers(changes, field, value):
    assert getattr(hf_config.from_hf(with_keys(**changes)), field) == value


LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 29},
            "no period",
        ),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "refuses it: ZeroDivisionError"),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' expected float"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1.0}, "final_logit_softcapping is -1"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers is"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is impl"),
        (
            {"model_type": "olmoe", "head_dim": 64},
            "heads of together 2048 channels and hidden_size 4096 differ",
        ),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv is 8.0; only None is implemented"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "it must be 1 to model.num_experts 8"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "at most 1024"),
        ({"rope_scaling": LONGROPE}, "must be 64 positive numbers with longrope scaling"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, not a positive integer"),
        ({"model_type": "gemma3_text", "rope_parameters": LLAMA3}, "has factor outside of full_attention"),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}},
            "the rope_type 'default' and the type 'linear'",
        ),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window is None, not a positive integer"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "sliding_window is None, not a"),
        ({"model_type": "gemma3"}, "of type gemma3 needs a text_config"),
        ({"layer_types": 5}, "refuses it: TypeError"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types is"),
        # transformers gives all layers of these the window, other programs only those that are named.
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"] * 16},
            "layer_types is .* models of type mistral",
        ),
        *(({"is_causal": no}, f"is_causal is {no}") for no in (False, None)),  # gte-Qwen2
        ({"per_layer_config": {"0": {"intermediate_size": 64}}}, "per_layer_config is"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": "34"}}, "num_hidden_layers is '34'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*gptq"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": SU | {"type": "longrope", ORIGINAL: 0}}, "original_max_position_embeddings is 0"),
        ({"rope_scaling": {"type": "linear"}}, "'linear': {'factor'}"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', not a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "unknown key mscale"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "unknown key full_attention"),
        ({"rope_scaling": "linear"}, "rope_parameters' with value 'linear'"),
        ({"rope_scaling": {"type": ["linear"]}}, "has the type"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "has the type 'spiral'; implemented are"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "32000"}, "vocab_size is '32000'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers is nan"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"hidden_size": 4097}, "hidden size .4097. is not a multiple"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' expected bool, got str"),
    ],
)
def test_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message) as error:
        hf_config.from_hf(with_keys(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_damaged_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        hf_config.read_config(tmp_path)


def test_a_config_that_cannot_be_read(tmp_path):
    for missing in (tmp_path, tmp_path / "meta-llama/Llama-2-7b-hf"):
        with pytest.raises(UserError, match=f"does not exist: is {missing} a Hugging Face model directory"):
            hf_config.read_config(missing)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json cannot be read: Is a directory"):
        hf_config.read_config(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/config\.json cannot be read: Not a directory"):
        hf_config.read_config(tmp_path / "file")
