"""Attention and its gradients in float64, and the same by an implementation."""

import jax
import jax.numpy as jnp
import numpy as np


def arrays(T: int, heads: int = 4, key_heads: int = 2, N: int = 16, documents: int = 3):
    """Query, key and value, segments, and a weight of the output, of two rows."""
    rng = np.random.default_rng(0)
    query, weight = rng.normal(size=(2, 2, T, heads, N))
    key, value = rng.normal(size=(2, 2, T, key_heads, N))
    return query, key, value, np.sort(rng.integers(1, documents + 1, size=(2, T)), axis=1), weight


def reference(query, key, value, segments, weight):
    """Output, and gradients of sum(output · weight) by the formulas of softmax attention."""
    B, T, H, N = query.shape
    G = H // key.shape[2]
    key, value = (np.repeat(x, G, axis=2) for x in (key, value))
    visible = np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None])
    scores = np.where(visible[:, None], np.einsum("bthn,bshn->bhts", query, key) / np.sqrt(N), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshn->bthn", shares, value)
    upstream = np.einsum("bthn,bshn->bhts", weight, value)
    inner = shares * (upstream - np.einsum("bhts,bhts->bht", shares, upstream)[..., None]) / np.sqrt(N)

    def grouped(x):  # the gradient of a key head is the sum over its query heads
        return x.reshape(B, T, -1, G, N).sum(3)

    return (
        out,
        np.einsum("bhts,bshn->bthn", inner, key),
        grouped(np.einsum("bhts,bthn->bshn", inner, query)),
        grouped(np.einsum("bhts,bthn->bshn", shares, weight)),
    )


def assert_close(attend, inputs, mesh=None, dtype=jnp.float32, **tolerance):
    """Compares an implementation, on a mesh and in a dtype, with the reference of the rounded inputs."""
    *qkv, segments, weight = (jnp.asarray(x, jnp.int32 if x.dtype == int else dtype) for x in inputs)

    @jax.jit
    def both(*qkv):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments, mesh), *qkv)
        return out, *pull(weight)

    wide = [np.asarray(x, np.float64) for x in (*qkv, weight)]
    for ours, theirs in zip(both(*qkv), reference(*wide[:3], inputs[3], wide[3]), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, **tolerance)
