"""Checkpoints: what goes in comes out, onto any mesh, and what does not fit is named."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import type_handlers

from lemur_jax.checkpoint import manager
from lemur_jax.checkpoint.metadata import make_metadata, tokenizer_files
from lemur_jax.checkpoint.reading import read_metadata, restore_params
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from tests.helpers.tiny import first_state, program_on, tiny_config

METADATA = make_metadata(
    model={"vocab_size": 512},
    tokenizer_files={"tokenizer.model": b"\x00\xff"},
    config={"seed": 1},
    data={"code": "ab"},
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir after three saves of an eight-device state; the last two checkpoints are kept."""
    workdir = tmp_path_factory.mktemp("run")
    state = first_state(program_on((1, 4, 1, 2)))
    with manager.Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state.params, state.optimizer, METADATA)
    return workdir, state


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("shape", [(1, 4, 1, 2), (1, 1, 1, 1), (2, 2, 1, 2)])
def test_restores_the_same_bits_onto_any_mesh(saved, shape):
    workdir, state = saved
    program = program_on(shape)
    checkpoints = manager.Checkpoints(workdir / "checkpoints", keep=2)
    assert checkpoints.finished == 3
    params, optimizer = checkpoints.restore(3, program.state.params, program.state.optimizer)
    equal((params, optimizer), (state.params, state.optimizer))
    assert jax.tree.leaves(params)[0].sharding == jax.tree.leaves(program.state.params)[0].sharding


def test_parameters_alone_and_metadata(saved):
    workdir, state = saved
    equal(restore_params(workdir, program_on((1, 8, 1, 1)).state.params), state.params)
    metadata = read_metadata(workdir, 2)
    assert metadata["step"] == 2
    assert metadata["config"] == {"seed": 1}
    assert tokenizer_files(metadata) == {"tokenizer.model": b"\x00\xff"}


def test_dropped_step_is_refused_and_the_others_named(saved):
    with pytest.raises(UserError, match="no checkpoint of step 1 .* 2, 3"):
        read_metadata(saved[0], 1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"tie_word_embeddings": True}, "head/kernel is not wanted"),
        ({"intermediate_size": 96}, r"mlp/down has shape \(2, 160, 64\), this config wants \(2, 96, 64\)"),
    ],
)
def test_other_model_is_refused_by_leaf(saved, model, words):
    program = program_on((1, 1, 1, 1), tiny_config(**model))
    with pytest.raises(UserError, match=words):
        restore_params(saved[0], program.state.params)


def test_one_slice_reads_and_sends_to_the_others(saved, monkeypatch):
    """With two slices of four devices, each array is restored by Orbax's handler that reads on the first."""
    workdir, state = saved
    program = program_on((2, 2, 1, 2))
    read = []
    handler = type_handlers.SingleReplicaArrayHandler
    deserialize = handler.deserialize

    async def recorded(self, infos, args=None):
        read.extend(infos)
        return await deserialize(self, infos, args)

    monkeypatch.setattr(handler, "deserialize", recorded)
    with manager.Checkpoints(workdir / "checkpoints", keep=2, broadcast=True) as checkpoints:
        found = checkpoints.restore(3, program.state.params, program.state.optimizer)
    equal(found, (state.params, state.optimizer))
    wanted = jax.tree.leaves((program.state.params, program.state.optimizer))
    assert len(read) == len(wanted)
    assert [leaf.sharding for leaf in jax.tree.leaves(found)] == [leaf.sharding for leaf in wanted]
    for leaf in jax.tree.leaves(found[0]):  # every slice holds the values, not the first alone
        whole = np.asarray(leaf)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])


def test_parameters_alone_hold_no_optimizer(tmp_path):
    state = first_state(program_on((1, 1, 1, 1)))
    write_params(tmp_path / "imported", state.params, METADATA)
    equal(restore_params(tmp_path / "imported", state.params), state.params)
    checkpoints = manager.Checkpoints(tmp_path / "imported")
    with pytest.raises(UserError, match="optimizer: there is none"):
        checkpoints.restore(0, state.params, state.optimizer)
