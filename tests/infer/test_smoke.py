"""The smoke test against a stored reference: the same on another mesh, and every fault is found."""

import dataclasses
import json

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.infer.session import make_session
from lemur_jax.infer.smoke import NEW_TOKENS, PROMPTS, smoke
from lemur_jax.models.presets import preset
from tests.infer.conftest import fresh_params, mesh_of


@pytest.fixture(scope="module")
def params(chat_tokenizer):
    config = preset("tiny", vocab_size=chat_tokenizer.vocab_size)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10
    return config, params


def session_on(params, tokenizer, mesh):
    return make_session(*params, mesh_of(mesh), "float32", tokenizer=tokenizer)


def run(session, file):
    lines = []
    smoke(session, reference=str(file), say=lines.append)
    return lines


def test_reference_is_written_then_compared_on_another_mesh(params, chat_tokenizer, tmp_path):
    file = tmp_path / "reference.json"
    one, many = (session_on(params, chat_tokenizer, mesh) for mesh in ("", "fsdp=2,tensor=2"))
    assert "192 tokens and their log-probabilities written" in run(one, file)[1]
    stored = json.loads(file.read_text())
    assert [len(row) for row in stored["tokens"]] == [NEW_TOKENS] * len(PROMPTS)
    before = file.read_bytes()
    figures, compared = run(many, file)
    assert "tokens/s" in figures
    assert "MiB of parameters a device" in figures
    assert "all 192 tokens equal" in compared
    assert file.read_bytes() == before

    # One weight of another value: the tokens may stay, the log-probabilities do not.
    head = many.params["head"]["kernel"]
    changed = {**many.params, "head": {"kernel": head.at[:, 7].add(0.5)}}
    with pytest.raises(UserError, match=r"smoke test failed: (after|log-probabilities)"):
        run(dataclasses.replace(many, params=changed), file)

    def damaged(**changes):
        file.write_text(json.dumps(stored | changes))
        return file

    tokens = [list(row) for row in stored["tokens"]]
    tokens[1][5] = (tokens[1][5] + 1) % 512
    with pytest.raises(
        UserError, match=r"after 'import os.*' the token at position 5 is \d+, in .*reference"
    ):
        run(one, damaged(tokens=tokens))
    with pytest.raises(UserError, match="other prompts or another tokenizer"):
        run(one, damaged(prompts=[[1]]))
    file.write_text("[]")
    with pytest.raises(UserError, match="is no reference of lemur smoke"):
        run(one, file)
