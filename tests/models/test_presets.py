"""Presets against the published parameter counts; nothing is allocated."""

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import num_params
from lemur_jax.models.presets import PRESETS, preset

# Parameters, from the model cards and safetensors indices on Hugging Face (bytes of bfloat16 weights / 2), and from
# config.json θ, positions and epsilon. Lemur's two are Llama-2-70B's with 24 and 5 rows more in embedding and head.
PUBLISHED = {
    "llama3.2_1b": (1_235_814_400, 500_000, 131_072, 1e-05),
    "llama2_7b": (6_738_415_616, 10_000, 4_096, 1e-05),
    "llama2_13b": (13_015_864_320, 10_000, 4_096, 1e-05),
    "llama2_70b": (68_976_648_192, 10_000, 4_096, 1e-05),
    "codellama_7b": (6_738_546_688, 1_000_000, 16_384, 1e-05),
    "codellama_34b": (33_743_970_304, 1_000_000, 16_384, 1e-05),
    "llama3.1_8b": (8_030_261_248, 500_000, 131_072, 1e-05),
    "llama3.1_70b": (70_553_706_496, 500_000, 131_072, 1e-05),
    "llama3.1_405b": (405_853_388_800, 500_000, 131_072, 1e-05),
    "llama3.2_3b": (3_212_749_824, 500_000, 131_072, 1e-05),
    "llama1_7b": (6_738_415_616, 10_000, 2_048, 1e-06),
    "llama3_8b": (8_030_261_248, 500_000, 8_192, 1e-05),
    "llama3.3_70b": (70_553_706_496, 500_000, 131_072, 1e-05),
    "smollm2_135m": (134_515_008, 100_000, 8_192, 1e-05),
    "smollm2_1.7b": (1_711_376_384, 130_000, 8_192, 1e-05),
    "smollm3_3b": (3_075_098_624, 5_000_000, 65_536, 1e-06),
    "mistral_7b_v0.3": (7_248_023_552, 1_000_000, 32_768, 1e-05),
    "olmo2_7b": (7_298_617_344, 500_000, 4_096, 1e-06),
    "phi4_14b": (14_659_507_200, 250_000, 16_384, 1e-05),
    "gemma2_9b": (9_241_705_984, 10_000, 8_192, 1e-06),
    "gemma3_270m": (268_098_176, 1_000_000, 32_768, 1e-06),
    "olmoe_1b_7b": (6_919_161_856, 10_000, 4_096, 1e-05),
    "qwen3_32b": (32_762_123_264, 1_000_000, 40_960, 1e-06),
    "mistral_7b_v0.1": (7_241_732_096, 10_000, 32_768, 1e-05),
    "qwen2.5_coder_7b": (7_615_616_512, 1_000_000, 32_768, 1e-06),
    "qwen2.5_coder_32b": (32_763_876_352, 1_000_000, 32_768, 1e-06),
    "qwen3_8b": (8_190_735_360, 1_000_000, 40_960, 1e-06),
    "mixtral_8x7b": (46_702_792_704, 1_000_000, 32_768, 1e-05),
    "qwen3_30b_a3b": (30_532_122_624, 1_000_000, 40_960, 1e-06),
    "gemma3_27b": (27_009_346_304, 1_000_000, 131_072, 1e-06),  # of the text part
    "lemur_70b": (68_976_648_192 + 2 * 24 * 8192, 10_000, 4_096, 1e-05),
    "lemur_70b_chat": (68_976_648_192 + 2 * 5 * 8192, 10_000, 4_096, 1e-05),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_is_the_published_one(name):
    config = preset(name)
    found = num_params(config), config.rope_theta, config.max_position_embeddings, config.rms_norm_eps
    assert found == PUBLISHED[name]


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
