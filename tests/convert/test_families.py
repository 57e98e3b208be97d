"""Every family against its class in transformers, in float32 on the CPU: logits, gradients, generation, export.

Rows of 640 tokens are longer than every window of these models.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.import_hf import import_hf, load_hf_params
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import make_session
from lemur_jax.models.decoder import Compute, forward
from lemur_jax.parallel.mesh import make_mesh

T = 640
SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
FAMILIES = {
    "llama with biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama with yarn": ("Llama", dict(rope_parameters=YARN)),
    "mistral": ("Mistral", dict(sliding_window=40)),
    "gemma2 without window and caps": (
        "Gemma2",
        dict(layer_types=["full_attention"] * 3, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "qwen2": ("Qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2 with a window": ("Qwen2", dict(use_sliding_window=True, sliding_window=40, max_window_layers=0)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=5)),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", dict(sliding_window=40, query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3Text", dict(sliding_window=40, num_hidden_layers=7)),
}


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    """A model of transformers with random norms, biases and weights, saved in `tmp_path / "model"`."""
    kind, changes = FAMILIES[request.param]
    shape = {**SHAPE, "num_hidden_layers": 3, "pad_token_id": 0, "max_position_embeddings": 1024, **changes}
    if kind == "Qwen2":
        del shape["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**shape)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    causal = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in causal.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    causal.save_pretrained(tmp_path / "model")
    return causal


def tokens():
    return np.random.default_rng(0).integers(1, 96, size=(2, T))


def test_logits_and_gradients(model, tmp_path):
    config, params = load_hf_params(tmp_path / "model")
    ids = tokens()
    weights = np.random.default_rng(1).normal(size=(2, T, 96)).astype(np.float32) / T
    theirs = model(torch.tensor(ids)).logits
    (theirs * torch.tensor(weights)).sum().backward()
    positions = jnp.broadcast_to(jnp.arange(T), ids.shape)

    def weighted(params):
        logits = forward(config, Compute(), params, jnp.asarray(ids), positions, jnp.ones_like(positions))
        return (logits * weights).sum(), logits

    (_, ours), gradients = jax.value_and_grad(weighted, has_aux=True)(jax.tree.map(jnp.asarray, params))
    expected = theirs.detach().numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() <= 1e-4
    embedding = model.get_input_embeddings().weight.grad.numpy()
    scale = np.abs(embedding).max()
    assert np.abs(gradients["embed"]["embedding"] - embedding).max() <= 1e-4 * scale
    query = np.stack([layer.self_attn.q_proj.weight.grad.numpy().T for layer in model.model.layers])
    ours = np.asarray(gradients["layers"]["attention"]["query"]).reshape(query.shape)
    assert np.abs(ours - query).max() <= 1e-3 * np.abs(query).max()


def test_an_export_is_the_same_model_bit_for_bit(model, tmp_path):
    import_hf(tmp_path / "model", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(again) is type(model)
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    with torch.no_grad():
        ids = torch.tensor(tokens())
        assert (again(ids).logits - model(ids).logits).abs().max() <= 1e-4 * model(ids).logits.abs().max()


@pytest.mark.parametrize("model", ["mistral", "smollm3", "gemma2", "gemma3"], indirect=True)
def test_greedy_generation(model, tmp_path):
    """A prompt and 64 tokens cross the window of 40."""
    config, params = load_hf_params(tmp_path / "model")
    mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}, jax.devices()[:1])
    session = make_session(config, params, mesh, "float32")
    prompts = [list(map(int, tokens()[0, :80])), list(map(int, tokens()[1, :130]))]
    answers = generate(session, prompts, max_new_tokens=64, stop_ids=[])
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert list(answer.tokens) == expected[0, len(prompt) :].tolist()
