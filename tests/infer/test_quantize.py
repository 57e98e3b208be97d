"""int8 weights: what Qwix's integers are, where they lie, and what they cost in perplexity."""

import math
import pathlib
import pydoc
import sys

import jax
import numpy as np
import optax
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.infer.generate import generate
from lemur_jax.infer.quantize import quantize
from lemur_jax.infer.score import score
from lemur_jax.infer.session import make_session
from lemur_jax.models.decoder import Compute, forward
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params, mesh_of

T = 64


@pytest.fixture(scope="module")
def trained(small_chat_tokenizer):
    """A model that has read some Python, and text that it has not read."""
    ids = small_chat_tokenizer.encode(pathlib.Path(pydoc.__file__).read_text(encoding="utf-8")[:60_000])
    rows = np.array(ids[: len(ids) // (T + 1) * (T + 1)], np.int32).reshape(-1, T + 1)
    train, held_out = rows[:-8], rows[-8:]
    config = preset("tiny", vocab_size=small_chat_tokenizer.vocab_size)
    params, optimizer = fresh_params(config), optax.adam(3e-3)

    @jax.jit
    def update(params, state, batch):
        def loss(params):
            tokens, targets = batch[:, :-1], batch[:, 1:]
            positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
            logits = forward(config, Compute(), params, tokens, positions, np.ones_like(positions))
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        change, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, change), state

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(150):
        params, state = update(params, state, train[rng.integers(0, len(train), 16)])
    return config, params, held_out.tolist()


def perplexity(session, rows):
    scores = score(session, [(row[:1], row[1:]) for row in rows])
    return math.exp(-np.mean([logprob for found in scores for logprob in found.logprobs]))


def test_perplexity_hardly_changes(trained):
    config, params, rows = trained
    sessions = {
        weights: make_session(config, params, mesh_of("fsdp=2,tensor=2"), "float32", weights=weights)
        for weights in ("float", "int8")
    }
    before, after = (perplexity(session, rows) for session in sessions.values())
    assert before < 120  # of 505: it has learned something that can be lost
    assert before != after
    assert abs(after / before - 1) < 0.02
    size = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(s.params)) for name, s in sessions.items()}
    table = config.vocab_size * config.hidden_size * 4  # the embedding stays float
    assert size["int8"] - table < 0.3 * (size["float"] - table)
    tokens = generate(sessions["int8"], rows[:3], max_new_tokens=8, stop_ids=())
    assert all(len(completion.tokens) == 8 for completion in tokens)


def test_integers_and_scales_are_those_of_the_definition(trained):
    """round(w / s) with s = max |w| / 127.5 over what a product sums over, one for each output channel."""
    config, params, _ = trained
    mesh = mesh_of("fsdp=2,tensor=2")
    quantized = make_session(config, params, mesh, "float32", weights="int8").params
    attention, mlp = quantized["layers"]["attention"], quantized["layers"]["mlp"]
    L, D, H, N = params["layers"]["attention"]["query"].shape
    assert attention["query"].scale.shape == (L, 1, H, N)
    assert attention["out"].scale.shape == (L, 1, 1, D)
    assert mlp["down"].scale.shape == (L, 1, D)
    assert quantized["head"]["kernel"].scale.shape == (1, config.vocab_size)
    assert isinstance(quantized["embed"]["embedding"], jax.Array)
    whole, cut = params["layers"]["mlp"]["down"], mlp["down"]
    assert cut.qvalue.dtype == np.int8
    assert {shard.data.shape for shard in cut.qvalue.addressable_shards} == {(2, 80, 32)}
    error = np.abs(np.asarray(cut.qvalue, np.float32) * np.asarray(cut.scale) - np.asarray(whole))
    assert (error <= 0.51 * np.asarray(cut.scale)).all()
    np.testing.assert_allclose(cut.scale, np.abs(whole).max(1, keepdims=True) / 127, rtol=0.01)


def test_without_qwix(trained, monkeypatch):
    config, params, _ = trained
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match="int8 weights need qwix"):
        quantize(config, mesh_of(""), params)
