"""Every family against its class in transformers, in float32 on the CPU: logits, gradients, generation, export.

Rows of 640 tokens are longer than every window of these models.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lemur_jax.common.errors import UserError
from lemur_jax.config import load
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.hf_config import to_hf
from lemur_jax.convert.import_hf import import_hf, load_hf_params
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import make_session
from lemur_jax.models.decoder import Compute, forward
from lemur_jax.parallel.mesh import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
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
LONG = "phi3 in rows longer than its original length"
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [1.0 + 0.7 * pair for pair in range(8)],
}
QWEN3_MOE = dict(
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=48,
    norm_topk_prob=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
LLAMA3 = {
    **{
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "original_max_position_embeddings": 256,  # so that 640 positions are beyond it
}
FAMILIES = {
    "llama 3, tied": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama with linear scaling": (
        "Llama",
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ),
    "llama with biases": ("Llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    "llama with yarn": ("Llama", dict(rope_parameters=YARN)),
    "mistral": ("Mistral", dict(sliding_window=40)),
    "mistral without a window": ("Mistral", dict(sliding_window=None)),  # exported as a Llama
    "gemma2 without window and caps": (
        "Gemma2",
        dict(layer_types=["full_attention"] * 3, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "qwen2": ("Qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2 with a window": ("Qwen2", dict(use_sliding_window=True, sliding_window=40, max_window_layers=0)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=5)),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3 moe": ("Qwen3Moe", QWEN3_MOE),
    "olmoe": ("Olmoe", dict(num_experts=6, num_experts_per_tok=3, tie_word_embeddings=True)),
    "phi3": ("Phi3", dict(sliding_window=40)),
    LONG: (
        "Phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=64),
    ),
    "phi3 in shorter rows": (
        "Phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=700),
    ),
    "gemma2": ("Gemma2", dict(sliding_window=40, query_pre_attn_scalar=24)),
    "gemma3": (
        "Gemma3Text",
        # transformers has the cap of scores in the config and does not apply it.
        dict(sliding_window=40, num_hidden_layers=7, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    """A model of transformers with random norms, biases and weights, saved in `tmp_path / "model"`."""
    kind, changes = FAMILIES[request.param]
    shape = {**SHAPE, "num_hidden_layers": 3, "pad_token_id": 0, "max_position_embeddings": 1024, **changes}
    if kind in ("Qwen2", "Phi3", "Olmoe"):
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
    # Import only rearranges tensors, so that it turns their gradients into gradients of our parameters.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    _, expected_gradients = load_hf_params(tmp_path / "gradients")

    def assert_close(path, ours, theirs):
        scale = np.abs(theirs).max()
        assert scale > 0, path
        assert np.abs(ours - theirs).max() <= 1e-3 * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(assert_close, gradients, expected_gradients)


def test_an_export_is_the_same_model_bit_for_bit(model, tmp_path):
    import_hf(tmp_path / "model", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs, ours = model.state_dict(), again.state_dict()
    if model.config.model_type == "phi3":  # exported as the family that has the projections apart
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            for name in [name for name in theirs if fused in name]:
                prefix = name.replace(fused.split(".")[1] + ".weight", "")
                ours[name] = torch.cat([ours.pop(f"{prefix}{part}_proj.weight") for part in parts])
    elif model.config.model_type != "mistral" or model.config.sliding_window:
        assert type(again) is type(model)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    with torch.no_grad():
        ids = torch.tensor(tokens())
        assert (again(ids).logits - model(ids).logits).abs().max() <= 1e-4 * model(ids).logits.abs().max()


FAST = ("mistral", "smollm3", "gemma2", "gemma3", "mixtral", LONG)
GENERATED = [
    *FAST,
    *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FAST),
]


@pytest.mark.parametrize("model", GENERATED, indirect=True)
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


def logit_difference(theirs, config, params):
    """The largest difference of logits between a model of transformers and ours, over 100 tokens."""
    ids = tokens()[:, :100]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(100), ids.shape)
    ours = forward(config, Compute(), params, jnp.asarray(ids), positions, jnp.ones_like(positions))
    return np.abs(ours - expected).max()


def test_the_text_part_of_a_multimodal_gemma(tmp_path):
    text = dict(**SHAPE, num_hidden_layers=2, sliding_window=40, pad_token_id=0)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    whole.save_pretrained(tmp_path / "model")
    assert logit_difference(whole, *load_hf_params(tmp_path / "model")) <= 1e-4


def test_a_multiplier_of_residuals(tmp_path):
    """Granite is Llama with multipliers; of its own kind no checkpoint can be imported."""
    kept = dict(embedding_multiplier=1.0, logits_scaling=1.0, attention_multiplier=16**-0.5)
    config = transformers.GraniteConfig(**SHAPE, **kept, num_hidden_layers=2, residual_multiplier=0.22)
    granite = transformers.GraniteForCausalLM(config).float().eval()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_hidden_layers=2))
    llama.load_state_dict(granite.state_dict())
    llama.save_pretrained(tmp_path / "model")
    config, params = load_hf_params(tmp_path / "model")
    config = dataclasses.replace(config, residual_multiplier=0.22)
    assert logit_difference(granite, config, params) <= 1e-5
    with pytest.raises(UserError, match="no model of transformers"):
        to_hf(config, dtype="float32", bos=None, eos=None, pad=0)


@pytest.mark.parametrize("argument", ["yarn32k", "yarn128k"])
def test_yarn_config_has_the_perplexity_of_transformers(argument, tmp_path):
    """At the last positions that the config extends the model to."""
    yarn = load(f"{ROOT}/configs/long_context.py:{argument}").model
    small = dataclasses.replace(yarn, **SHAPE, num_hidden_layers=2)
    ids = tokens()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**to_hf(small, dtype="float32", bos=None, eos=None, pad=0))
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "model")
    config, params = load_hf_params(tmp_path / "model")
    assert config == small
    positions = np.broadcast_to(np.arange(T) + yarn.max_position_embeddings - T, ids.shape)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), position_ids=torch.tensor(positions)).logits.numpy()
    ours = forward(config, Compute(), params, jnp.asarray(ids), jnp.asarray(positions), jnp.ones_like(ids))
    perplexity, plain = (
        np.exp(-np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1).mean())
        for logits in (ours, expected)
    )
    np.testing.assert_allclose(perplexity, plain, rtol=1e-4)
