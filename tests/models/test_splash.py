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
from tests.helpers.attention import arrays, assert_close
from tests.helpers.sessions import mesh_of

T = 256


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two blocks a row, in both passes."""
    original = splash.block_sizes

    def small(length, width, kind, blocks):
        return original(length, width, kind, blocks) if any(blocks) else original(128, width, kind)

    monkeypatch.setattr(splash, "block_sizes", small)


def on_device(dtype=jnp.float32):
    *qkv, segments, _ = arrays(T)
    return *(jnp.asarray(x, dtype) for x in qkv), jnp.asarray(segments)


@pytest.mark.process
def test_parts_of_dq_are_added_without_a_reduction(monkeypatch):
    def gradients():
        query, key, value, segments = on_device(jnp.bfloat16)
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
    query, key, value, segments = on_device()
    options = ScoreOptions(divisor=24.0, softcap=2.0, window=40)

    def both(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments, None, options), query, key, value)
        return out, *pull(out)

    for ours, theirs in zip(both(splash_attention), both(xla_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "heads", "key_heads"),
    [
        (None, 4, 2),
        ("fsdp=2,tensor=2", 4, 2),  # heads cut over tensor
        ("sequence=2,tensor=2", 8, 4),  # positions traded for heads, key heads too
        ("sequence=4", 4, 2),  # fewer key heads than devices: repeated for the trade
    ],
)
def test_forward_and_backward_against_float64(mesh, heads, key_heads):
    assert_close(splash_attention, arrays(T, heads, key_heads), mesh and mesh_of(mesh), atol=5e-6)


def test_refuses_what_the_kernels_cannot_do():
    *qkv, segments = on_device()
    with pytest.raises(UserError, match=r"sequence_length 100 .* multiple of 128"):
        splash_attention(*(x[:, :100] for x in qkv), segments[:, :100], None)
    with pytest.raises(UserError, match=r"cannot be cut over config.mesh.sequence 8"):
        splash_attention(*qkv, segments, mesh_of("sequence=8"))


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
    sizes = splash.block_sizes(1024, 16, kind)
    assert (sizes.block_kv, sizes.block_kv_dkv, sizes.block_kv_dkv_compute) == (512, 1024, 512)
    assert sizes.use_fused_bwd_kernel == (kind == "TPU v4")
    monkeypatch.setattr(splash, "block_sizes", lambda *_: sizes)
    assert_close(splash_attention, arrays(1024, 2, 1), None, dtype, atol=tolerance)


def test_residuals_kept_by_name_save_the_forward_kernel():
    """With the output alone and not its log-sum-exp, the kernel would run again in the backward pass."""
    query, key, value, segments = on_device()

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


def test_block_sizes_divide_the_length_and_are_those_of_the_config(monkeypatch):
    monkeypatch.undo()
    for length in (128, 384, 512, 1536, 2048, 4096):
        sizes = splash.block_sizes(length, 128, "TPU v5 lite")
        backward = (sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_q_dq, sizes.block_kv_dq)
        for size in (sizes.block_q, sizes.block_kv, *backward):
            assert length % size == size % 128 == 0
    for length, blocks, fused in (
        (32_768, (0, 0), True),
        (131_072, (0, 0), False),
        (131_072, (0, 4096), True),
    ):
        assert splash.block_sizes(length, 128, "TPU7x", blocks).use_fused_bwd_kernel == fused
    sizes = splash.block_sizes(4096, 128, "TPU v4", (1024, 256))
    assert (sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv) == (1024, 1024, 256, 256)
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
