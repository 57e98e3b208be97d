"""Attention against NumPy in float64, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models.attention import attention, xla_attention

B, T, H, K, N = 2, 300, 4, 2, 8  # T is no multiple of the block


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, T, H, N))
    key, value = rng.normal(size=(2, B, T, K, N))
    segments = np.sort(rng.integers(1, 4, size=(B, T)), axis=1)
    return query, key, value, segments


def reference(query, key, value, segments):
    key, value = (np.repeat(x, H // K, axis=2) for x in (key, value))
    scores = np.einsum("bthn,bshn->bhts", query, key) / np.sqrt(N)
    visible = np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshn->bthn", weights / weights.sum(-1, keepdims=True), value)


def test_forward(arrays):
    query, key, value, segments = arrays
    out = xla_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value)), jnp.asarray(segments), None
    )
    np.testing.assert_allclose(out, reference(*arrays), atol=2e-6)


def test_backward_against_finite_differences(arrays):
    query, key, value, segments = arrays
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(B, T, H, N))

    def loss(query, key, value):
        return jnp.sum(
            xla_attention(query, key, value, jnp.asarray(segments), None) * jnp.asarray(weight, jnp.float32)
        )

    gradients = jax.grad(loss, argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)))
    for position, gradient in enumerate(gradients):
        direction = rng.normal(size=arrays[position].shape)
        shifted = [list(arrays), list(arrays)]
        for sign, inputs in zip((1, -1), shifted, strict=True):
            inputs[position] = inputs[position] + sign * 1e-5 * direction
        up, down = (np.sum(reference(*inputs) * weight) for inputs in shifted)
        np.testing.assert_allclose(
            np.sum(np.asarray(gradient, np.float64) * direction), (up - down) / 2e-5, rtol=1e-4
        )


def test_unknown_implementation_lists_the_known():
    with pytest.raises(UserError, match="xla"):
        attention("flash9")
