"""Attention against NumPy in float64, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models import attention as choosing
from lemur_jax.models.attention import IMPLEMENTATIONS, attention, cudnn_attention, xla_attention
from tests.helpers.attention import arrays, assert_close
from tests.helpers.sessions import mesh_of

T = 300  # no multiple of the block


@pytest.mark.parametrize("remat_above", [0, T])  # the softmax computed again in the backward pass, or kept
def test_forward_and_backward_against_float64(remat_above, monkeypatch):
    monkeypatch.setattr(choosing, "REMAT_ABOVE", remat_above)
    assert_close(xla_attention, arrays(T), atol=5e-6)


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
def test_cudnn_sees_documents_and_their_gradients(without_gpu, documents, mesh):
    mesh = mesh_of(mesh) if mesh else None
    assert_close(cudnn_attention, arrays(T, documents=documents), mesh, jnp.bfloat16, rtol=0.03, atol=0.06)


def test_cudnn_refuses_what_it_cannot_do():
    *qkv, segments, _ = map(jnp.asarray, arrays(T))
    with pytest.raises(UserError, match="needs bfloat16"):
        cudnn_attention(*qkv, segments, None)
    with pytest.raises(UserError, match="config.mesh.sequence"):
        cudnn_attention(*(x.astype(jnp.bfloat16) for x in qkv), segments, mesh_of("sequence=2"))


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
