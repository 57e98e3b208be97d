"""Attention against NumPy in float64, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models import attention as choosing
from lemur_jax.models.attention import IMPLEMENTATIONS, attention, cudnn_attention, xla_attention
from tests.helpers.sessions import mesh_of

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


@pytest.mark.parametrize("remat_above", [0, T])  # the softmax computed again in the backward pass, or kept
def test_backward_against_finite_differences(arrays, remat_above, monkeypatch):
    monkeypatch.setattr(choosing, "REMAT_ABOVE", remat_above)
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


@pytest.fixture
def without_gpu(monkeypatch):
    """cuDNN's kernels replaced by what JAX computes in their place: the call, the masks and the cutting are ours."""
    original = jax.nn.dot_product_attention

    def call(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return original(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("mesh", ["", "fsdp=2,tensor=2"])
def test_cudnn_sees_documents_and_their_gradients(arrays, without_gpu, documents, mesh):
    query, key, value, segments = arrays
    segments = np.minimum(segments, documents)
    mesh = mesh_of(mesh) if mesh else None
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]

    def pulled(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, jnp.asarray(segments), mesh), *inputs)
        return out, *pull(jnp.ones_like(out))

    ours, theirs = jax.jit(lambda: pulled(cudnn_attention))(), pulled(xla_attention)
    rounded = [np.asarray(x, np.float64) for x in inputs]
    np.testing.assert_allclose(np.asarray(ours[0], np.float64), reference(*rounded, segments), atol=0.02)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(other, np.float32), rtol=0.03, atol=0.06
        )


def test_cudnn_refuses_what_it_cannot_do(arrays):
    query, key, value, segments = (jnp.asarray(x) for x in arrays)
    with pytest.raises(UserError, match="needs bfloat16"):
        cudnn_attention(query, key, value, segments, None)
    with pytest.raises(UserError, match="config.mesh.sequence"):
        cudnn_attention(
            *(x.astype(jnp.bfloat16) for x in (query, key, value)), segments, mesh_of("sequence=2")
        )


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("cpu", "bfloat16", "xla"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
        ("tpu", "bfloat16", "xla"),  # the splash kernels need a mesh
    ],
)
def test_auto_takes_what_fits_the_device(monkeypatch, platform, dtype, name):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert attention("auto", None, dtype) is IMPLEMENTATIONS[name]
