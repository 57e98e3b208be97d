"""The splash kernels in the interpreter against NumPy in float64, forward and backward, whole and cut over a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models import decoder, splash
from lemur_jax.models.attention import xla_attention
from lemur_jax.models.config import ComputeConfig
from lemur_jax.models.decoder import Compute
from lemur_jax.models.presets import preset
from lemur_jax.models.scores import ScoreOptions
from lemur_jax.models.splash import splash_attention
from tests.helpers.sessions import mesh_of

B, T, H, K, N = 2, 256, 4, 2, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two blocks a row, in both passes."""
    original = splash.block_sizes

    def small(length, width, kind, blocks):
        return original(length, width, kind, blocks) if any(blocks) else original(128, width, kind)

    monkeypatch.setattr(splash, "block_sizes", small)


def arrays(heads=H, key_heads=K):
    rng = np.random.default_rng(0)
    query, weight = rng.normal(size=(2, B, T, heads, N))
    key, value = rng.normal(size=(2, B, T, key_heads, N))
    segments = np.sort(rng.integers(1, 4, size=(B, T)), axis=1)
    return query, key, value, segments, weight


def reference(query, key, value, segments, weight):
    """Output, and gradients of sum(output · weight) by the formulas of softmax attention."""
    G = query.shape[2] // key.shape[2]
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


def on_device(inputs, dtype=jnp.float32):
    return [jnp.asarray(x, jnp.int32 if x.dtype == int else dtype) for x in inputs]


def computed(inputs, mesh, dtype=jnp.float32):
    *qkv, segments, weight = on_device(inputs, dtype)

    @jax.jit
    def both(query, key, value):
        out, pull = jax.vjp(lambda *qkv: splash_attention(*qkv, segments, mesh), query, key, value)
        return out, *pull(weight)

    return both(*qkv)


def test_forward_and_backward_against_float64():
    inputs = arrays()
    for ours, theirs in zip(computed(inputs, None), reference(*inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.process
def test_parts_of_dq_are_added_without_a_reduction(monkeypatch):
    def gradients():
        query, key, value, segments, _ = on_device(arrays(), jnp.bfloat16)
        both = jax.grad(
            lambda *qkv: splash_attention(*qkv, segments, None).astype(jnp.float32).sum(), (0, 1, 2)
        )
        return jax.jit(both)(query, key, value), str(jax.make_jaxpr(both)(query, key, value))

    added, program = gradients()
    monkeypatch.setattr(splash, "_with_added_parts", lambda kernel: kernel)
    reduced, library = gradients()
    over_parts = re.compile(r"reduce_sum\[\s*axes=\((np\.int64\()?2\b")  # of [B, K, parts, ...]
    assert over_parts.search(library)
    assert not over_parts.search(program)
    assert "splash_mqa_dkv" in program
    for mine, theirs in zip(added, reduced, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_window_cap_and_scale_are_those_of_xla():
    """`tests/convert/test_families.py` compares these with transformers."""
    query, key, value, segments, _ = on_device(arrays())
    options = ScoreOptions(divisor=24.0, softcap=2.0, window=40)

    def both(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments, None, options), query, key, value)
        return out, *pull(out)

    for ours, theirs in zip(both(splash_attention), both(xla_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "heads", "key_heads"),
    [
        ("fsdp=2,tensor=2", 4, 2),  # heads cut over tensor
        ("sequence=2,tensor=2", 8, 4),  # positions traded for heads, key heads too
        ("sequence=4", 4, 2),  # fewer key heads than devices: repeated for the trade
    ],
)
def test_cut_over_a_mesh(mesh, heads, key_heads):
    inputs = arrays(heads, key_heads)
    for ours, theirs in zip(computed(inputs, mesh_of(mesh)), reference(*inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_refuses_what_the_kernels_cannot_do():
    query, key, value, segments, _ = arrays()
    with pytest.raises(UserError, match=r"sequence_length 100 .* multiple of 128"):
        splash_attention(query[:, :100], key[:, :100], value[:, :100], segments[:, :100], None)
    with pytest.raises(UserError, match=r"cannot be cut over config.mesh.sequence 8"):
        splash_attention(query, key, value, segments, mesh_of("sequence=8"))


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("TPU v4", jnp.float32, 1e-5),
        ("TPU v4", jnp.bfloat16, 0.05),
        ("TPU v5 lite", jnp.float32, 1e-5),  # dq in a kernel of its own
    ],
)
def test_block_sizes_of_real_runs(monkeypatch, kind, dtype, tolerance):
    """Blocks of another size in the backward pass, and there a computation finer than the block."""
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "T", 1024)
    sizes = splash.block_sizes(T, N, kind)
    assert (sizes.block_kv, sizes.block_kv_dkv, sizes.block_kv_dkv_compute) == (512, 1024, 512)
    assert sizes.use_fused_bwd_kernel == (kind == "TPU v4")
    monkeypatch.setattr(splash, "block_sizes", lambda *_: sizes)
    inputs = arrays(2, 1)
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (*inputs[:3], inputs[4])]
    wanted = reference(*rounded[:3], inputs[3], rounded[3])
    for ours, theirs in zip(computed(inputs, None, dtype), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance)


def test_residuals_kept_by_name_save_the_forward_kernel():
    """With the output alone and not its log-sum-exp, the kernel would run again in the backward pass."""
    query, key, value, segments, _ = on_device(arrays())

    def kernels_in(policy):
        body = jax.checkpoint(lambda *qkv: splash_attention(*qkv, segments, None), policy=policy)
        gradient = jax.grad(lambda *qkv: jnp.sum(body(*qkv)), argnums=(0, 1, 2))
        return count(jax.make_jaxpr(gradient)(query, key, value).jaxpr)

    def count(jaxpr):
        """Kernels whose results are used: what has no result left is there to read, and is not compiled."""
        used = [each for each in jaxpr.eqns if each.outvars]
        inner = [value for each in used for value in each.params.values()]
        inner = [getattr(value, "jaxpr", value) for value in inner]
        kernels = sum(each.primitive.name == "pallas_call" for each in used)
        return kernels + sum(count(value) for value in inner if hasattr(value, "eqns"))

    assert kernels_in(jax.checkpoint_policies.save_only_these_names(splash.RESIDUALS)) == 2
    assert kernels_in(jax.checkpoint_policies.nothing_saveable) == 3


def test_block_sizes_divide_the_length(monkeypatch):
    monkeypatch.undo()
    for length in (128, 384, 512, 1536, 2048, 4096):
        sizes = splash.block_sizes(length, 128, "TPU v5 lite")
        backward = (sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_q_dq, sizes.block_kv_dq)
        for size in (sizes.block_q, sizes.block_kv, *backward):
            assert length % size == 0
            assert size % 128 == 0


def test_blocks_of_the_config_are_those_of_the_kernels(monkeypatch):
    monkeypatch.undo()
    assert splash.block_sizes(32_768, 128, "TPU7x").use_fused_bwd_kernel
    assert not splash.block_sizes(131_072, 128, "TPU7x").use_fused_bwd_kernel
    assert splash.block_sizes(131_072, 128, "TPU7x", (0, 4096)).use_fused_bwd_kernel
    sizes = splash.block_sizes(4096, 128, "TPU v4", (1024, 256))
    assert (sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv) == (1024, 1024, 256, 256)
    assert splash.block_sizes(4096, 128, "TPU v4", (0, 0)) == splash.block_sizes(4096, 128, "TPU v4")
    program = forward_jaxpr(attention_blocks=(128, 256))
    assert '"block_q": 128, "block_kv": 128,' in program
    assert '"block_q_dkv": 256, "block_kv_dkv": 256,' in program


def forward_jaxpr(**options):
    """The model's forward pass over one row of 256 with the splash kernels, as text."""
    compute = Compute.from_config(ComputeConfig(attention="splash", **options), None)
    params = jax.eval_shape(lambda: decoder.init_params(preset("tiny"), jax.random.key(0)))
    row = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    return str(
        jax.make_jaxpr(lambda *batch: decoder.forward(preset("tiny"), compute, *batch))(params, row, row, row)
    )


@pytest.mark.parametrize("blocks", [(100, 0), (0, 384), (-128, 0), (128,)])
def test_blocks_that_cannot_be_are_refused(blocks):
    with pytest.raises(
        UserError, match=r"attention_blocks .* (multiple of 128 that divides the 256|must be two)"
    ):
        forward_jaxpr(attention_blocks=blocks)
