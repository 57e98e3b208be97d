"""What is saved is apart from what the next update writes over."""

import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.checkpoint import manager
from lemur_jax.checkpoint.snapshot import snapshot
from tests.checkpoint.test_policies import full_disk, slow_storage
from tests.helpers.tiny import first_state, program_on

METADATA = manager.make_metadata(model={"vocab_size": 512}, tokenizer_files={})
SPECS = [("a", "b"), (None, "a"), ("b",), (("b", "a"),), ()]


def places(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def matrices(trees):
    """Where the shards of all matrices are; XLA may put numbers somewhere else."""
    return [places(leaf) for leaf in jax.tree.leaves(trees) if leaf.ndim > 1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.int8, np.bool_])
@pytest.mark.parametrize("shape", [(16, 24), (8, 8, 3), (), (0, 8)])
def test_the_same_bits_in_the_same_shards_elsewhere(dtype, shape):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    values = np.random.default_rng(0).integers(0, 120, shape).astype(dtype)
    tree = {
        str(spec): jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        for spec in SPECS
        if len(spec) <= len(shape)
    }
    copies = snapshot(tree)
    for name, array in tree.items():
        assert copies[name].sharding == array.sharding
        assert copies[name].dtype == array.dtype
        assert np.asarray(copies[name]).tobytes() == values.tobytes()
        if values.size:
            assert not set(places(copies[name])) & set(places(array))


def test_an_update_behind_a_save_writes_in_place(tmp_path, monkeypatch):
    """Held up by nothing: neither by a copy of what is being saved nor by storage that takes its time."""
    program = program_on((1, 4, 1, 2))
    state = first_state(program)
    doubled = jax.jit(lambda trees: jax.tree.map(lambda leaf: leaf * 2, trees), donate_argnums=0)
    trees = doubled({"params": state.params, "optimizer": state.optimizer})
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), trees)
    before = matrices(trees)
    slow = slow_storage(monkeypatch)
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **trees, metadata=METADATA)
        trees = jax.block_until_ready(doubled(trees))
        assert not slow.is_set()
        assert matrices(trees) == before
        slow.set()
        checkpoints.wait()
        found = checkpoints.restore(1, program.state.params, program.state.optimizer)
    jax.tree.map(np.testing.assert_array_equal, found, (expected["params"], expected["optimizer"]))


def in_use():
    return {place for array in jax.live_arrays() for place in places(array)}


def test_nothing_of_a_save_stays_in_memory(tmp_path):
    state = first_state(program_on((1, 4, 1, 2)))
    with manager.Checkpoints(tmp_path) as checkpoints:
        before = in_use()
        for step in (1, 2):
            checkpoints.save(step, state.params, state.optimizer, METADATA)
            checkpoints.wait()
            assert in_use() <= before


def test_nothing_of_a_save_that_failed_stays_in_memory(tmp_path):
    state = first_state(program_on((1, 4, 1, 2)))
    with manager.Checkpoints(tmp_path, max_failures=9, say=lambda _: None) as checkpoints:
        before = in_use()
        with full_disk():
            checkpoints.save(1, state.params, state.optimizer, METADATA)
            checkpoints.wait()
        assert checkpoints.failed
        gc.collect()
        assert in_use() <= before


def test_what_is_no_cpu_array_is_left_to_orbax(monkeypatch):
    monkeypatch.setattr("lemur_jax.checkpoint.snapshot.on_host", lambda array: False)
    array = jnp.arange(3)
    assert snapshot([array])[0] is array
