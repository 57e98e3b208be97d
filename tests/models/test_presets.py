"""Presets against the published parameter counts; nothing is allocated."""

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import num_params
from lemur_jax.models.presets import PRESETS, preset

# From the model cards and safetensors indices on Hugging Face (bytes of bfloat16 weights / 2); Lemur's
# two are Llama-2-70B's with 24 and 5 rows more in embedding and head.
PUBLISHED = {
    "llama3.2_1b": 1_235_814_400,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_34b": 33_743_970_304,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "llama3.2_3b": 3_212_749_824,
    "llama1_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3.3_70b": 70_553_706_496,
    "smollm2_135m": 134_515_008,
    "smollm2_1.7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
    "mistral_7b_v0.3": 7_248_023_552,
    "olmo2_7b": 7_298_617_344,
    "phi4_14b": 14_659_507_200,
    "gemma2_9b": 9_241_705_984,
    "gemma3_270m": 268_098_176,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b_v0.1": 7_241_732_096,
    "qwen2.5_coder_7b": 7_615_616_512,
    "qwen2.5_coder_32b": 32_763_876_352,
    "qwen3_8b": 8_190_735_360,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "gemma3_27b": 27_009_346_304,  # of the text part
    "lemur_70b": 68_976_648_192 + 2 * 24 * 8192,
    "lemur_70b_chat": 68_976_648_192 + 2 * 5 * 8192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert num_params(preset(name)) == PUBLISHED[name]


def test_every_preset_survives_its_dictionary():
    for config in PRESETS.values():
        assert DecoderConfig.from_dict(config.to_dict()) == config


def test_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="llama2_70b"):
        preset("llama2_71b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_scaling": "spiral"}, "rope_scaling"),
        ({"rope_scaling": "longrope"}, "rope_short_factor"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_experts": 2, "experts_per_token": 3}, "is 3: it must be 1 to model.num_experts 2"),
        ({"num_experts": 8, "experts_per_token": 3, "mlp_bias": True}, "model.mlp_bias"),
    ],
)
def test_impossible_shape_is_named(change, words):
    with pytest.raises(UserError, match=words):
        preset("tiny", **change)
