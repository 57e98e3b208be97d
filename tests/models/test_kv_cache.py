"""The cache: slots, and attention to them against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.models import kv_cache
from lemur_jax.models.decoder import Compute
from lemur_jax.models.presets import preset
from tests.helpers.sessions import mesh_of


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(
    ("S", "starts", "read"), [(6, [3, 0], 6), (300, [0, 127], 256), (300, [255, 7], 300)]
)
def test_positions_see_what_is_before_them_and_themselves(T, S, starts, read):
    """New positions of each row, which stand elsewhere in each; what lies behind them is another's.

    Slots from `read` on are not read: a NaN there would show.
    """
    rng = np.random.default_rng(0)
    B, K, H, N = 2, 2, 4, 16
    stored = rng.normal(size=(2, 2, B, S, K, N)).astype(np.float32)
    stored[:, :, :, read:] = np.nan
    query, key, value = (rng.normal(size=(B, T, heads, N)).astype(np.float32) for heads in (H, K, K))
    cache = kv_cache.KVCache(**dict(zip(("key", "value"), jnp.asarray(stored).swapaxes(3, 4), strict=True)))
    positions = jnp.array([range(start, start + T) for start in starts])
    attend = kv_cache.cached(preset("tiny"), Compute(mesh=mesh_of("")), positions, jnp.max(positions))
    mixed, _ = attend(query, key, value, cache, jnp.int32(1))
    for b, start in enumerate(starts):
        keys, values = stored[:, 1, b].astype(np.float64)
        keys[start : start + T], values[start : start + T] = key[b], value[b]
        for t in range(T):
            for h in range(H):
                head, end = h // (H // K), start + t + 1
                scores = keys[:end, head] @ query[b, t, h] / np.sqrt(N)
                weights = np.exp(scores) / np.exp(scores).sum()
                np.testing.assert_allclose(mixed[b, t, h], weights @ values[:end, head], atol=1e-5)


def test_it_is_sharded_like_the_model():
    compute = Compute(dtype="bfloat16", mesh=mesh_of("data=2,fsdp=2,tensor=2"))
    cache = jax.jit(lambda: kv_cache.empty(preset("tiny"), compute, rows=8, slots=32))()
    assert cache.key.dtype == jnp.bfloat16
    assert {shard.data.shape for shard in cache.key.addressable_shards} == {(2, 2, 1, 32, 16)}
