"""The cache: slots, and attention to them against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models import kv_cache
from lemur_jax.models.decoder import Compute
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh


def test_write_touches_its_slots_alone():
    cache = kv_cache.empty(preset("tiny"), Compute(), rows=3, slots=5)
    key = jnp.arange(3 * 2 * 2 * 16, dtype=jnp.float32).reshape(3, 2, 2, 16) + 1
    after = kv_cache.write(cache, jnp.int32(1), jnp.int32(2), key, -key)
    expected = np.zeros((2, 3, 5, 2, 16))
    expected[1, :, 2:4] = key
    np.testing.assert_array_equal(after.key, expected)
    np.testing.assert_array_equal(after.value, -expected)


def test_a_position_sees_the_visible_slots_and_itself():
    rng = np.random.default_rng(0)
    B, S, K, H, N = 2, 6, 2, 4, 8
    stored = rng.normal(size=(2, 1, B, S, K, N)).astype(np.float32)
    query, key, value = (rng.normal(size=(B, 1, heads, N)).astype(np.float32) for heads in (H, K, K))
    visible = np.array([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]], bool)
    cache = kv_cache.KVCache(key=jnp.asarray(stored[0]), value=jnp.asarray(stored[1]))
    attend = kv_cache.decoding(
        preset("tiny"), jnp.int32(4), jnp.asarray(visible), jnp.zeros((B, S), jnp.int32)
    )
    mixed, _ = attend(query, key, value, cache, jnp.int32(0))
    for b in range(B):
        keys, values = (np.where(np.arange(S)[:, None, None] == 4, new[b], old[0, b]).astype(np.float64)
                        for new, old in ((key, stored[0]), (value, stored[1])))  # fmt: skip
        for h in range(H):
            head = h // (H // K)
            scores = keys[visible[b], head] @ query[b, 0, h] / np.sqrt(N)
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(mixed[b, 0, h], weights @ values[visible[b], head], atol=1e-5)


def test_it_is_sharded_like_the_model():
    mesh = make_mesh({"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2})
    compute = Compute(dtype="bfloat16", mesh=mesh)
    cache = jax.jit(lambda: kv_cache.empty(preset("tiny"), compute, rows=8, slots=32))()
    assert cache.key.dtype == jnp.bfloat16
    assert {shard.data.shape for shard in cache.key.addressable_shards} == {(2, 2, 32, 1, 16)}


def test_rows_that_the_mesh_does_not_divide():
    mesh = make_mesh({"data": 4, "fsdp": 1, "sequence": 1, "tensor": 2})
    with pytest.raises(UserError, match="'batch' of size 6 is not divisible by 4"):
        kv_cache.empty(preset("tiny"), Compute(mesh=mesh), rows=6, slots=32)
