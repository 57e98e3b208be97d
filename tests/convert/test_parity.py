"""Logits against transformers.LlamaForCausalLM, in float32 on the CPU.

On 640 tokens: a short prompt cannot see a rotary fault.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.import_hf import import_hf, load_hf_params
from lemur_jax.models.decoder import Compute, forward

T = 640
ROPES = {
    "theta 1e4": {"rope_type": "default", "rope_theta": 10_000.0},
    "theta 5e5 llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,  # so that 640 positions are beyond it
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}


def theirs(hf, tokens):
    with torch.no_grad():
        return hf.model(torch.tensor(tokens)).logits.numpy()


def ours(hf, tokens):
    config, params = load_hf_params(hf.path)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = forward(config, Compute(), params, jnp.asarray(tokens), positions, jnp.ones_like(positions))
    return np.asarray(logits)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True)], ids=["mha untied", "gqa tied"])
def test_logits(make_model, rope, kv_heads, tied):
    hf = make_model(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters=dict(ROPES[rope]),
    )
    tokens = np.random.default_rng(0).integers(0, 128, size=(2, T))
    expected = theirs(hf, tokens)
    assert np.abs(expected).max() > 1  # large enough for 1e-4 to say something
    assert np.abs(ours(hf, tokens) - expected).max() <= 1e-4


def test_mistral_without_its_window(make_model, tmp_path):
    """The same logits from us, and from the Llama as which it is exported."""
    hf = make_model(
        kind="Mistral", sliding_window=None, hidden_size=128, intermediate_size=256, num_key_value_heads=2
    )
    tokens = np.random.default_rng(0).integers(0, 96, size=(2, T))
    expected = theirs(hf, tokens)
    assert np.abs(expected).max() > 1
    assert np.abs(ours(hf, tokens) - expected).max() <= 1e-4
    import_hf(hf.path, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="float32")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert np.abs(llama(torch.tensor(tokens)).logits.numpy() - expected).max() <= 1e-4


def test_the_test_sees_a_rotary_fault(make_model):
    """With another θ the same comparison fails by far."""
    hf = make_model(hidden_size=128, num_hidden_layers=2, rope_parameters=dict(ROPES["theta 1e4"]))
    tokens = np.random.default_rng(0).integers(0, 96, size=(1, T))
    expected = theirs(hf, tokens)
    hf.edit_config(rope_parameters={"rope_type": "default", "rope_theta": 10_100.0})
    assert np.abs(ours(hf, tokens) - expected).max() > 1e-3
