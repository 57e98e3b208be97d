"""Filters against transformers' logits processors, draws against the distribution they should have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import generation

from lemur_jax.common.errors import UserError
from lemur_jax.infer.sampling import Sampling, choose, restrict

B, V = 16, 300
NONE = np.full((B, 4), -1)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Peaked, flat and tied distributions [B, V]."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(B, V)) * np.geomspace(0.1, 20, B)[:, None]
    return rows.astype(np.float32)


@pytest.mark.parametrize(
    ("options", "processor"),
    [
        ({"top_k": 1}, generation.TopKLogitsWarper(1)),
        ({"top_k": 17}, generation.TopKLogitsWarper(17)),
        ({"top_k": 1000}, generation.TopKLogitsWarper(1000)),
        ({"top_p": 0.9}, generation.TopPLogitsWarper(0.9)),
        ({"top_p": 0.01}, generation.TopPLogitsWarper(0.01)),
        ({"min_p": 0.05}, generation.MinPLogitsWarper(0.05)),
        ({"min_p": 1.0}, generation.MinPLogitsWarper(1.0)),
    ],
)
def test_filters_are_those_of_transformers(logits, options, processor):
    got = jax.jit(restrict)(logits, Sampling(temperature=1.0, **options).knobs())
    expected = processor(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(got, expected)


def test_all_filters_in_the_order_of_transformers(logits):
    """What remains after all of them, by the ids that many draws give."""
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.85, "min_p": 0.02, "repetition_penalty": 1.5}
    ids = np.random.default_rng(1).integers(0, V, size=(B, 50))
    ids[:, :2], logits = (0, V - 1), logits.copy()
    logits[:, [0, V - 1]] = logits.max(-1)[:, None] * [1, 0.9]
    history = np.pad(ids, ((0, 0), (0, 5)), constant_values=-1)
    scores = torch.tensor(logits)
    for processor in (
        generation.RepetitionPenaltyLogitsProcessor(1.5),
        generation.TemperatureLogitsWarper(0.7),
        generation.TopKLogitsWarper(9),
        generation.TopPLogitsWarper(0.85),
        generation.MinPLogitsWarper(0.02),
    ):
        scores = processor(torch.tensor(ids), scores)
    expected = scores.softmax(-1).numpy()
    draws = 3000
    knobs, seeds = Sampling(**options).knobs(), jnp.arange(B, dtype=jnp.uint32)
    draw = jax.jit(jax.vmap(lambda place: choose(logits, knobs, seeds, jnp.full(B, place), history)))
    tokens, logprobs = draw(jnp.arange(draws))
    counts = np.stack([np.bincount(column, minlength=V) for column in np.asarray(tokens).T])
    assert not counts[expected == 0].any()
    # Each frequency within five standard deviations of a binomial.
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= 5 * deviation + 1e-9).all()
    # Log-probabilities are the model's own, whatever was filtered.
    own = torch.tensor(logits).log_softmax(-1).numpy()
    np.testing.assert_allclose(logprobs, own[np.arange(B), tokens], atol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(
    "options", [{"temperature": 1e-6}, {"temperature": 1e-37}, {"temperature": 1e-42}, {"top_p": 1e-50}]
)
def test_near_0_the_best_is_drawn(logits, options):
    apart = np.round(logits * 10) + np.arange(V, dtype=np.float32) / 1000  # no ties
    knobs = Sampling(**({"temperature": 1.0, "top_p": 0.9} | options)).knobs()
    tokens, _ = choose(apart, knobs, np.arange(B), np.arange(B), NONE)
    np.testing.assert_array_equal(tokens, apart.argmax(-1))


def test_greedy_takes_the_best_whatever_the_filters(logits):
    knobs = Sampling(top_k=5, top_p=0.5, min_p=0.5).knobs()
    zeros = jnp.zeros(B, jnp.uint32)
    tokens, logprobs = choose(jnp.asarray(logits), knobs, zeros, zeros, NONE)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logprobs, torch.tensor(logits).log_softmax(-1).max(-1).values, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty is 1e-50"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
