"""Loading: from a checkpoint onto meshes, and what is refused."""

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import load, make_session
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params

CONFIG = preset("tiny", max_position_embeddings=64)
ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, chat_tokenizer):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    metadata = make_metadata(model=CONFIG.to_dict(), tokenizer_files=chat_tokenizer.files())
    write_params(path, fresh_params(CONFIG), metadata, step=7)
    return path


def test_a_checkpoint_generates_on_a_mesh(checkpoint, chat_tokenizer, tiny_session):
    session = load(checkpoint, ONE | {"fsdp": -1, "tensor": 2}, "float32", step=7, devices=jax.devices()[:4])
    assert session.model == CONFIG
    assert session.tokenizer.files() == chat_tokenizer.files()
    query = session.params["layers"]["attention"]["query"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 32, 2, 16)}
    params = fresh_params(CONFIG)
    direct = make_session(CONFIG, jax.tree.map(np.asarray, params), tiny_session.mesh, "float32")
    got, expected = (
        generate(each, [[1, 2, 3], [4]], max_new_tokens=8, stop_ids=()) for each in (session, direct)
    )
    assert got == expected


def test_parameters_come_in_the_dtype_asked_for_and_are_not_copied_where_they_lie_right(checkpoint):
    session = load(checkpoint, ONE, "bfloat16", devices=jax.devices()[:1])
    assert session.step == 7
    assert {leaf.dtype for leaf in jax.tree.leaves(session.params)} == {jax.numpy.dtype("bfloat16")}
    again = make_session(session.model, session.params, session.mesh, "bfloat16")
    same = jax.tree.map(
        lambda a, b: a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer(), session.params, again.params
    )
    assert all(jax.tree.leaves(same))


def test_weights_without_a_tokenizer(tmp_path):
    write_params(
        tmp_path / "model", fresh_params(CONFIG), make_metadata(model=CONFIG.to_dict(), tokenizer_files={})
    )
    session = load(tmp_path / "model", ONE, "float32", devices=jax.devices()[:1])
    assert session.tokenizer is None
    with pytest.raises(UserError, match="holds no tokenizer"):
        session.need_tokenizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "nowhere"}, "no checkpoint directory at nowhere"),
        ({"step": 8}, "no checkpoint of step 8"),
        ({"dtype": "int8"}, "cannot generate in dtype 'int8'"),
        ({"mesh_sizes": ONE | {"sequence": 2, "fsdp": 2}}, "mesh axis sequence is 2"),
        ({"mesh_sizes": ONE | {"fsdp": 3}}, "multiply to the 4 devices here: set --mesh so that it does"),
        ({"mesh_sizes": ONE | {"data": -1}, "checkpoint": "nowhere"}, "no checkpoint"),
        (
            {"mesh_sizes": ONE | {"tensor": 4}},
            "'kv_heads' of size 2 is not divisible by 4.*: change the mesh",
        ),
    ],
)
def test_bad_input(checkpoint, changes, message):
    options = {"checkpoint": checkpoint, "mesh_sizes": ONE | {"fsdp": 4}, "dtype": "float32"}
    with pytest.raises(UserError, match=message):
        load(**(options | changes), devices=jax.devices()[:4])
