"""Plans of prefill and decode, compiled by the real TPU compiler."""

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.config import load
from lemur_jax.models.decoder import num_params
from lemur_jax.models.presets import preset
from lemur_jax.parallel.config import MeshConfig
from lemur_jax.plan.generate import format_generate_plan, plan_generate
from lemur_jax.plan.topologies import find_slice

MODEL = preset("llama2_70b", num_hidden_layers=2)
TENSOR_4 = MeshConfig(tensor=4)


def test_two_layers_of_70b_on_v5e(tpu_compiler):
    made = plan_generate(MODEL, TENSOR_4, find_slice("v5e-4"), batch=8, prompt_length=256, cache_length=512)
    assert made.fits
    weights = num_params(MODEL)
    # Norm scales are whole on every chip.
    assert made.decode.hbm["parameters"] == pytest.approx(2 * weights / 4, rel=1e-3)
    # Keys and values of two layers, 8 sequences, 512 slots, 8 heads of 128 over 4 chips, bfloat16.
    assert made.decode.hbm["kv_cache"] == 2 * 2 * 8 * 512 * 8 * 128 * 2 / 4
    for phase in (made.prefill, made.decode):
        assert sum(phase.hbm.values()) == phase.hbm_bytes_per_chip < phase.hbm_limit_bytes_per_chip
        assert phase.step_seconds == pytest.approx(sum(phase.parts.values()))
    # No token can come sooner than its weights are read at 819 GB/s, and one should not take ten times that.
    assert 2 * weights / 4 / 819e9 < made.decode.step_seconds < 20 * weights / 4 / 819e9
    # 2 FLOPs a parameter and token at 197 TFLOP/s, but for embedding and head.
    least = 2 * (weights - 2 * 32_000 * 8192) * 8 * 128 / (4 * 197e12)
    assert least * 0.9 < made.prefill.step_seconds < 10 * least
    assert made.decode.tokens_per_second == pytest.approx(8 / made.decode.step_seconds)
    assert format_generate_plan(made).count("\nFITS: ") == 2


def test_what_does_not_fit_is_said(tpu_compiler):
    made = plan_generate(
        MODEL, TENSOR_4, find_slice("v5e-4"), batch=2048, prompt_length=128, cache_length=4096
    )
    assert not made.fits
    assert made.decode.tokens_per_second is None
    text = format_generate_plan(made)
    assert "DOES NOT FIT" in text
    assert made.decode.hbm["kv_cache"] > made.decode.hbm_limit_bytes_per_chip
    assert "use a larger --config.mesh.tensor" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt_length=512), "--prompt-length 512 must be above 0 and below --cache-length 512"),
        (dict(cache_length=8192), "at most config.model.max_position_embeddings 4096"),
        (dict(batch=7), "--batch 7 must be a multiple of 2"),
    ],
)
def test_impossible_sizes(tpu_compiler, changes, message):
    sizes = {"batch": 8, "prompt_length": 256, "cache_length": 512} | changes
    with pytest.raises(UserError, match=message):
        plan_generate(MODEL, MeshConfig(tensor=2), find_slice("v5e-4"), **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "prefill", "decode", "speed"),
    [
        ("v4-32", dict(data=2, fsdp=1, tensor=8), 18.4, 19.4, 883),
        ("v5e-64", dict(data=1, fsdp=8, tensor=8), 3.0, 3.7, 86),
        ("v5e-64", dict(data=8, fsdp=1, tensor=8), 16.90, 18.48, None),
    ],
)
def test_70b_on_slices_as_in_the_documentation(tpu_compiler, topology, mesh, prefill, decode, speed):
    """docs/planner_details.md, "Generation": GiB a chip, tokens/s of all sequences (None: does not fit)."""
    model, sizes = load("configs/lemur_70b_chat.py").model, dict(prompt_length=1024, cache_length=2048)
    made = plan_generate(model, MeshConfig(**mesh), find_slice(topology), batch=32, **sizes)
    assert made.prefill.hbm_bytes_per_chip / 2**30 == pytest.approx(prefill, rel=0.05)
    assert made.decode.hbm_bytes_per_chip / 2**30 == pytest.approx(decode, rel=0.05)
    assert (made.prefill.fits, made.decode.fits) == (speed is not None, speed is not None)
    assert made.decode.tokens_per_second == (speed and pytest.approx(speed, rel=0.05))
