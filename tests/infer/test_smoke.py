"""The smoke test against a stored reference: the same on another mesh, and every fault is found."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert import source
from lemur_jax.convert.hf_config import to_hf
from lemur_jax.infer.generate import generate
from lemur_jax.infer.score import score
from lemur_jax.infer.session import make_session
from lemur_jax.infer.smoke import (
    NEW_TOKENS,
    PROMPTS,
    Reference,
    check_hf,
    read_reference,
    smoke,
    write_reference,
)
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params, mesh_of


@pytest.fixture(scope="module")
def session_on(small_chat_tokenizer):
    """session_on(mesh, head): the model of `chat_model`, perhaps with another head."""
    config = preset("tiny", vocab_size=small_chat_tokenizer.vocab_size)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10

    def make(mesh, head=None):
        tree = params if head is None else {**params, "head": {"kernel": head}}
        return make_session(config, tree, mesh_of(mesh), "float32", tokenizer=small_chat_tokenizer)

    return make


@pytest.fixture
def run(caplog):
    """run(session, reference) -> (what was generated, logged lines)."""

    def go(session, stored=None):
        caplog.clear()
        return smoke(session, reference=stored), caplog.messages

    return go


def test_reference_of_one_mesh_and_a_run_on_another(run, session_on, tmp_path, monkeypatch):
    one, many = session_on(""), session_on("fsdp=2,tensor=2")
    stats = {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30, "bytes_limit": 31 * 2**30}
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: stats)])
    found, (figures,) = run(one)
    assert "tokens/s" in figures
    assert figures.endswith(" MiB of parameters a device, at most 3.00 GiB in use of 31.00")
    write_reference(tmp_path / "reference.json", found)
    stored = read_reference(tmp_path / "reference.json")
    assert stored == found
    assert (stored.dtype, stored.weights) == ("float32", "float")
    assert [len(row) for row in stored.tokens] == [NEW_TOKENS] * len(PROMPTS)
    assert "all 192 tokens equal the reference's" in run(many, stored)[1][1]

    # One weight of another value: the tokens may stay, the log-probabilities do not.
    head = many.params["head"]["kernel"]
    with pytest.raises(UserError, match=r"smoke test failed: (after|log-probabilities)"):
        run(session_on("fsdp=2,tensor=2", head.at[:, 7].add(0.5)), stored)

    tokens = [list(row) for row in stored.tokens]
    tokens[1][5] = (tokens[1][5] + 1) % 512
    shifted = (np.array(stored.logprobs) + 0.01).tolist()
    for changes, message in (
        ({"tokens": tokens}, r"after 'import os.*' the token at position 5 is \d+, the reference has \d+"),
        ({"logprobs": shifted}, "log-probabilities differ by up to 0.01 nats"),
    ):
        with pytest.raises(UserError, match=message):
            run(one, dataclasses.replace(stored, **changes))


def test_a_tie_may_fall_either_way(run, session_on):
    """Two tokens are equally likely: a reference with the other one, and what follows that, is no fault."""
    mesh, unused = "fsdp=2,tensor=2", 3
    plain = session_on(mesh)
    chosen = run(plain)[0].tokens[0][10]
    head = plain.params["head"]["kernel"]
    twins = session_on(mesh, head.at[:, unused].set(head[:, chosen]))
    found, _ = run(twins)
    tokens = list(found.tokens[0])
    at = next(index for index, token in enumerate(tokens) if token in (chosen, unused))
    other = chosen + unused - tokens[at]
    prompt, tokens = found.prompts[0], [*tokens[:at], other]
    (rest,) = generate(twins, [[*prompt, *tokens]], max_new_tokens=NEW_TOKENS - len(tokens), stop_ids=())
    tokens += rest.tokens
    logprobs = score(twins, [(prompt, tokens)])[0].logprobs
    stored = dataclasses.replace(
        found, tokens=[tokens, *found.tokens[1:]], logprobs=[list(logprobs), *found.logprobs[1:]]
    )
    line = run(twins, stored)[1][1]
    assert line.startswith("the reference's 192 tokens are likely here, log-probabilities within")
    assert f"the token at position {at} is {found.tokens[0][at]}, the reference has {other}: a tie" in line

    kernel = twins.params["head"]["kernel"]
    with pytest.raises(UserError, match=rf"the reference has {other}, which is less likely here by"):
        run(session_on(mesh, kernel.at[:, other].multiply(0.9)), stored)


def test_another_file_is_no_reference(tmp_path):
    file = tmp_path / "reference.json"
    for text in ("{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match="is no reference of lemur smoke, write a new one: ."):
            read_reference(file)


@pytest.fixture
def refused(chat_model, tmp_path, capsys, monkeypatch):
    """refused(words): the one line with which the verb ends before the weights are read."""

    def loaded(*_):
        raise UserError("the weights are loaded")

    monkeypatch.setattr(source, "restore_params", loaded)

    def go(*words):
        words = [word.format(tmp_path) for word in words]
        assert main(["smoke", "--checkpoint", str(chat_model), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return go


def test_a_comparison_without_transformers_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"--hf needs torch: pip install 'lemur_jax\[verify\]'"):
        check_hf(str(tmp_path), "float32", "float")


def test_what_cannot_be_is_said_before_anything_is_loaded(refused, tmp_path, small_chat_tokenizer):
    pytest.importorskip("transformers")
    for name in ("empty", "bare", "hf"):
        (tmp_path / name).mkdir()
    for name in ("bare", "hf"):
        described = to_hf(preset("tiny"), dtype="float32", bos=1, eos=2, pad=None)
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    (tmp_path / "hf" / "model.safetensors").write_text("")
    for words, message in (
        (["--hf", "{}/nowhere"], "nowhere a Hugging Face model directory?"),
        (["--hf", "{}/empty"], "config.json does not exist"),
        (["--hf", "{}/bare"], "bare holds no weights"),
        (["--hf", "{}/hf", "--dtype", "bfloat16"], "--hf compares with transformers in float32"),
        (["--hf", "{}/hf", "--weights", "int8"], "--hf compares with transformers in float32"),
    ):
        assert message in refused(*words)

    prompts = [[small_chat_tokenizer.bos_id, *small_chat_tokenizer.encode(prompt)] for prompt in PROMPTS]
    rows = [[1] * NEW_TOKENS for _ in PROMPTS]
    fitting = Reference(dtype="float32", weights="float", prompts=prompts, tokens=rows, logprobs=rows)
    for number, (changes, message) in enumerate(
        (
            ({"dtype": "bfloat16"}, "--dtype bfloat16 --weights float, this run has --dtype float32"),
            ({"weights": "int8"}, "was made with --dtype float32 --weights int8"),
            ({"prompts": [[*row, 3] for row in prompts]}, "other prompts or another tokenizer"),
            ({name: [row[1:] for row in rows] for name in ("tokens", "logprobs")}, "does not have 48 tokens"),
            ({}, "the weights are loaded"),
        )
    ):
        file = tmp_path / f"{number}.json"
        write_reference(file, dataclasses.replace(fitting, **changes))
        assert message in refused("--reference", str(file))


def test_the_verb_compares_or_writes_as_it_is_told(chat_model, tmp_path, capsys):
    file = tmp_path / "new" / "reference.json"

    def verb(*words):
        status = main(["smoke", "--checkpoint", str(chat_model), *words])
        said = capsys.readouterr()
        return status, said.out if status == 0 else said.err

    missing = f"lemur smoke: no reference {file}: make one with --write-reference where results are trusted\n"
    assert verb("--reference", str(file)) == (2, missing)
    assert not file.exists()
    assert verb("--reference", "")[0] == 2  # an empty variable in a script is no pass either
    status, said = verb("--write-reference", str(file))
    assert status == 0
    assert f"reference written to {file}" in said
    before = file.read_bytes()
    status, said = verb("--reference", str(file))
    assert status == 0
    assert "all 192 tokens equal the reference's" in said
    taken = f"lemur smoke: {file} exists already: remove it to write a new reference\n"
    assert verb("--write-reference", str(file)) == (2, taken)
    assert verb("--reference", str(file), "--dtype", "bfloat16")[0] == 2
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["reference.json"]
