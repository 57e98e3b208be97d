"""Loading: from a checkpoint onto meshes, and what is refused."""

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.manager import make_metadata, write_params
from lemur_jax.common.errors import UserError
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import load, make_session
from lemur_jax.models.presets import preset
from tests.infer.conftest import fresh_params, mesh_of

ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, chat_tokenizer):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    config = preset("tiny")
    metadata = make_metadata(model=config.to_dict(), tokenizer_files=chat_tokenizer.files())
    write_params(path, fresh_params(config), metadata, step=7)
    return path


def test_a_checkpoint_generates_on_a_mesh(checkpoint, chat_tokenizer):
    sizes = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 2}
    session = load(checkpoint, sizes, "float32", step=7, devices=jax.devices()[:4])
    assert session.model == preset("tiny")
    assert session.tokenizer.files() == chat_tokenizer.files()
    query = session.params["layers"]["attention"]["query"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 32, 2, 16)}
    direct = make_session(preset("tiny"), fresh_params(preset("tiny")), mesh_of(""), "float32")
    options = {"max_new_tokens": 8, "stop_ids": ()}
    prompts = [[1, 2, 3], [4]]
    got, expected = generate(session, prompts, **options), generate(direct, prompts, **options)
    assert [completion.tokens for completion in got] == [completion.tokens for completion in expected]


def test_parameters_come_in_the_dtype_asked_for(checkpoint):
    session = load(checkpoint, ONE, "bfloat16", devices=jax.devices()[:1])
    assert {leaf.dtype for leaf in jax.tree.leaves(session.params)} == {jax.numpy.dtype("bfloat16")}


def test_nothing_is_copied_that_lies_right(checkpoint):
    session = load(checkpoint, ONE, "float32", devices=jax.devices()[:1])
    again = make_session(session.model, session.params, session.mesh, "float32")
    same = jax.tree.map(
        lambda a, b: a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer(), session.params, again.params
    )
    assert all(jax.tree.leaves(same))


def test_weights_without_a_tokenizer(tmp_path):
    config = preset("tiny")
    write_params(
        tmp_path / "model", fresh_params(config), make_metadata(model=config.to_dict(), tokenizer_files={})
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
        ({"mesh_sizes": ONE | {"sequence": 2}}, "mesh axis sequence is 2"),
        ({"mesh_sizes": ONE | {"fsdp": 3}}, "does not multiply to the 2 devices"),
    ],
)
def test_bad_input(checkpoint, changes, message):
    options = {"checkpoint": checkpoint, "mesh_sizes": ONE | {"fsdp": 2}, "dtype": "float32"}
    with pytest.raises(UserError, match=message):
        load(**(options | changes), devices=jax.devices()[:2])


def test_heads_that_the_mesh_does_not_divide(checkpoint):
    with pytest.raises(UserError, match="'kv_heads' of size 2 is not divisible by 4"):
        load(checkpoint, ONE | {"tensor": 4}, "float32", devices=jax.devices()[:4])


def test_numpy_parameters(checkpoint):
    """As a conversion gives them."""
    params = jax.tree.map(np.asarray, fresh_params(preset("tiny")))
    session = make_session(preset("tiny"), params, mesh_of("fsdp=2"), "bfloat16")
    assert session.params["embed"]["embedding"].sharding.spec == jax.P("tensor", "fsdp")
