"""FLOPs against published figures and against the products in a traced model; peaks against JAX's kinds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from lemur_jax.models import decoder
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute
from lemur_jax.models.presets import preset
from lemur_jax.telemetry.flops import chip, flops_per_token, mfu

SMALL = DecoderConfig(
    vocab_size=40, hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8,  # wider than hidden_size / heads
)  # fmt: skip


@pytest.mark.parametrize("window", [1, 7, 20, 64])
def test_a_window_costs_the_keys_in_it(window):
    """Two of the three layers have it."""
    T, config = 20, dataclasses.replace(SMALL, sliding_window=window, full_attention_every=3)
    keys = 2 * sum(min(t, window) for t in range(1, T + 1)) + sum(range(1, T + 1))
    attention = flops_per_token(config, T, backward=False).attention
    assert attention == pytest.approx(2 * 2 * config.num_attention_heads * config.head_dim * keys / T)


@pytest.mark.parametrize(("causal", "gflop"), [(True, 428.4), (False, 444.5)])
def test_llama2_70b_costs_what_is_known(causal, gflop):
    flops = flops_per_token(preset("llama2_70b"), 4096, causal=causal)
    assert round(flops.total / 1e9, 1) == gflop


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products in a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):  # a scan has its number of turns
                total += equation.params.get("length", 1) * product_flops(inner.jaxpr)
    return total


@pytest.mark.parametrize("backward", [False, True])
def test_formula_counts_the_products_of_the_decoder(backward):
    def logits(params, tokens):
        return jnp.sum(decoder.forward(SMALL, Compute(dtype="float32"), params, tokens, tokens, tokens))

    params = jax.eval_shape(lambda: decoder.init_params(SMALL, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(logits) if backward else logits)(params, tokens)
    expected = flops_per_token(SMALL, 16, causal=False, backward=backward).total * 16
    assert product_flops(traced.jaxpr) == expected


def test_a_tied_head_is_computed():
    tied = DecoderConfig(**{**SMALL.to_dict(), "tie_word_embeddings": True})
    assert flops_per_token(tied, 8) == flops_per_token(SMALL, 8)


@pytest.mark.parametrize(
    ("kind", "name", "tflops"),
    [
        ("TPU v5 lite", "TPU v5e", 197),
        ("TPU v5", "TPU v5p", 459),
        ("TPU v5p", "TPU v5p", 459),
        ("TPU7x", "TPU7x", 2307),
        ("NVIDIA A100-SXM4-80GB", "A100", 312),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5),
    ],
)
def test_peaks_by_device_kind(kind, name, tflops):
    found = chip(kind)
    assert (found.name, found.bf16_flops) == (name, tflops * 1e12)
    assert found.flops_per_device == found.bf16_flops / (2 if kind == "TPU7x" else 1)


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v4 lite", "TPU v3", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_unknown_chips_have_no_peak(kind):
    assert chip(kind) is None


def test_mfu_of_a_published_run():
    """PaLM 540B: 238.3K tokens/s on 6,144 TPU v4 is an MFU of 46.2% with attention (its table 3)."""
    attention = 12 * 118 * 48 * 256 * 2048  # L, H, N, T, full
    token_flops = 6 * 540.35e9 + attention
    assert mfu(238.3e3, token_flops, 6144 * chip("TPU v4").flops_per_device) == pytest.approx(
        0.462, abs=0.001
    )
