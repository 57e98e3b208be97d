"""int8 weights: what Qwix's integers are, where they lie, and what is computed with them."""

import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lemur_jax.common.errors import UserError
from lemur_jax.infer.generate import generate
from lemur_jax.infer.quantize import quantize
from lemur_jax.infer.score import score
from lemur_jax.infer.session import make_session
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params, mesh_of

CONFIG = preset("tiny", max_position_embeddings=64)


@pytest.fixture(scope="module")
def params():
    return fresh_params(CONFIG)


def test_int8_computes_with_the_integers_and_scales(params):
    """As a float session of scale times integer does, to rounding; not as one of the matrices before."""
    mesh = mesh_of("fsdp=2,tensor=2")
    int8 = make_session(CONFIG, params, mesh, "float32", weights="int8")
    is_quantized = lambda leaf: hasattr(leaf, "qvalue")  # noqa: E731
    rounded = jax.tree.map(
        lambda leaf: leaf.qvalue * leaf.scale if is_quantized(leaf) else leaf,
        int8.params,
        is_leaf=is_quantized,
    )
    floats, before = (make_session(CONFIG, tree, mesh, "float32") for tree in (rounded, params))
    pairs = [([5], list(range(6, 66)))]
    found, expected, other = (np.array(score(each, pairs)[0].logprobs) for each in (int8, floats, before))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert 1e-3 < np.abs(found - other).max() < 0.1
    (completion,) = generate(int8, [[1, 2, 3]], max_new_tokens=8, stop_ids=())
    assert completion.logprobs == pytest.approx(
        score(int8, [([1, 2, 3], completion.tokens)])[0].logprobs, abs=1e-4
    )


def test_integers_and_scales_are_those_of_the_definition(params):
    """round(w / s) with s = max |w| / 127.5 over what a product sums over, one for each output channel."""
    quantized = make_session(CONFIG, params, mesh_of("fsdp=2,tensor=2"), "float32", weights="int8").params
    attention, mlp = quantized["layers"]["attention"], quantized["layers"]["mlp"]
    L, D, H, N = params["layers"]["attention"]["query"].shape
    assert attention["query"].scale.shape == (L, 1, H, N)
    assert attention["out"].scale.shape == (L, 1, 1, D)
    assert mlp["down"].scale.shape == (L, 1, D)
    assert quantized["head"]["kernel"].scale.shape == (1, CONFIG.vocab_size)
    floats = [path for path, leaf in flatten_dict(quantized, sep="/").items() if isinstance(leaf, jax.Array)]
    norms = ("final_norm", "layers/attention_norm", "layers/mlp_norm")
    assert floats == ["embed/embedding", *(f"{norm}/scale" for norm in norms)]
    whole, cut = params["layers"]["mlp"]["down"], mlp["down"]
    assert cut.qvalue.dtype == np.int8
    assert {shard.data.shape for shard in cut.qvalue.addressable_shards} == {(2, 80, 32)}
    error = np.abs(np.asarray(cut.qvalue, np.float32) * np.asarray(cut.scale) - np.asarray(whole))
    assert (error <= 0.51 * np.asarray(cut.scale)).all()
    np.testing.assert_allclose(cut.scale, np.abs(whole).max(1, keepdims=True) / 127, rtol=0.01)


def test_without_qwix(params, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match="int8 weights need qwix"):
        quantize(CONFIG, mesh_of(""), params)
