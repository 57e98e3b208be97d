"""What the model must do whatever its weights: packing, rematerialization, initialization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models.decoder import Compute, forward, init_params
from lemur_jax.models.presets import preset
from lemur_jax.models.remat import POLICIES

CONFIG = preset("tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def params():
    fresh = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, fresh)  # sharper attention than at the start


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 96), 0, CONFIG.vocab_size)


def logits(params, tokens, positions, segments, **compute):
    return forward(CONFIG, Compute(**compute), params, tokens, positions, segments)


# The second of two documents, of 40 and 56 tokens, takes the factors of long ones.
LONGROPE = dict(
    rope_scaling="longrope", rope_factor=4.0, rope_original_max_position_embeddings=48,
    rope_short_factor=(1.0,) * 8, rope_long_factor=tuple(range(1, 9)),
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, LONGROPE], ids=["llama", "longrope"])
def test_packed_documents_are_as_if_alone(params, tokens, changes):
    cut, logits = 40, functools.partial(forward, preset("tiny", **changes), Compute(), params)
    lengths = [cut, tokens.shape[1] - cut]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None].repeat(2, 0)
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array(lengths))[None].repeat(2, 0)
    packed = logits(tokens, positions, segments)
    first = logits(tokens[:, :cut], positions[:, :cut], segments[:, :cut])
    second = logits(tokens[:, cut:], positions[:, cut:], segments[:, cut:])
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], axis=1), atol=1e-5)
    together = logits(tokens, positions, jnp.ones_like(segments))
    assert np.abs(packed - together)[:, cut:].max() > 1e-2  # the check can fail


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_rematerialization_changes_nothing(params, tokens, remat):
    positions = jnp.arange(tokens.shape[1])[None].repeat(2, 0)
    ones = jnp.ones_like(tokens)

    def loss(params, remat):
        return jnp.mean(jnp.square(logits(params, tokens, positions, ones, remat=remat)))

    kept, recomputed = (jax.grad(loss)(params, policy) for policy in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), kept, recomputed)


@pytest.mark.parametrize(("field", "known"), [("remat", "full"), ("attention", "xla")])
def test_an_unknown_choice_lists_the_known(field, known):
    with pytest.raises(UserError, match=known):
        Compute(**{field: "some"})


def test_layers_start_different_and_norms_start_at_one():
    fresh = init_params(CONFIG, jax.random.key(0))
    query = fresh["layers"]["attention"]["query"]
    assert not np.array_equal(query[0], query[1])
    np.testing.assert_allclose(np.std(query), CONFIG.initializer_range, rtol=0.05)
    assert np.all(np.asarray(fresh["layers"]["mlp_norm"]["scale"]) == 1)
    offset = init_params(preset("tiny", norm_offset=1.0), jax.random.key(0))  # added to the scale
    assert np.all(np.asarray(offset["layers"]["mlp_norm"]["scale"]) == 0)


def test_bfloat16_compute_gives_float32_logits_close_to_float32(params, tokens):
    positions = jnp.arange(tokens.shape[1])[None].repeat(2, 0)
    wide, narrow = (
        logits(params, tokens, positions, jnp.ones_like(tokens), dtype=d) for d in ("float32", "bfloat16")
    )
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()
