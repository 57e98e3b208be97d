"""Loading: from a checkpoint onto meshes, and what is refused."""

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint.metadata import make_metadata
from lemur_jax.checkpoint.streaming import write_params
from lemur_jax.common.errors import UserError
from lemur_jax.infer.engine import Engine, Request
from lemur_jax.infer.generate import generate
from lemur_jax.infer.score import score
from lemur_jax.infer.session import load, make_session
from lemur_jax.models.decoder import Compute, forward
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params, mesh_of

CONFIG = preset("tiny", max_position_embeddings=64)
ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_chat_tokenizer):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    metadata = make_metadata(model=CONFIG.to_dict(), tokenizer_files=small_chat_tokenizer.files())
    write_params(path, fresh_params(CONFIG), metadata, step=7)
    return path


def test_a_checkpoint_generates_on_a_mesh(checkpoint, small_chat_tokenizer, tiny_session):
    session = load(checkpoint, ONE | {"fsdp": -1, "tensor": 2}, "float32", step=7, devices=jax.devices()[:4])
    assert session.model == CONFIG
    assert session.tokenizer.files() == small_chat_tokenizer.files()
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


def test_longrope_does_not_depend_on_the_rest_of_a_batch():
    """LongRoPE has other angles in texts of more than 40 tokens, and padding belongs to none."""
    factors = dict(rope_short_factor=(1.0,) * 8, rope_long_factor=(3.0,) * 8, rope_factor=4.0)
    model = preset("tiny", rope_scaling="longrope", rope_original_max_position_embeddings=40, **factors)
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, fresh_params(model))
    session = make_session(model, params, mesh_of(""), "float32")
    short, long = ((list(range(1, 5)), list(range(5, end))) for end in (14, 60))
    alone, together = score(session, [short])[0], score(session, [short, long])[0]
    np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=1e-5)
    other = forward(model, Compute(), params, np.arange(1, 14)[None], np.arange(13)[None], np.ones((1, 13)))
    expected = np.asarray(jax.nn.log_softmax(other[0]))[np.arange(3, 12), np.arange(5, 14)]
    np.testing.assert_allclose(alone.logprobs, expected, atol=1e-5)
    # The engine takes the factors of the longest that a sequence may become, also where prompts begin alike.
    engine = Engine(session, rows=4)
    for prompt, limits in (([7] * 36, (3, 30)), ([*[7] * 36, 5], (40, 2)), ([*[7] * 40, 5], (1, 2))):
        requests = [engine.submit(Request(prompt=prompt, max_new_tokens=limit)) for limit in limits]
        while engine.busy:
            engine.step()
        for one in requests:
            (expected,) = score(session, [(prompt, one.tokens)])
            np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=1e-4)
