"""The smoke test against a stored reference: the same on another mesh, and every fault is found."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from lemur_jax.checkpoint import manager
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert import source
from lemur_jax.convert.hf_config import to_hf
from lemur_jax.infer import reference
from lemur_jax.infer.generate import generate
from lemur_jax.infer.score import score
from lemur_jax.infer.session import make_session
from lemur_jax.infer.smoke import NEW_TOKENS, PROMPTS, smoke
from lemur_jax.models.presets import preset
from lemur_jax.text.tokenizer import Tokenizer
from tests.infer.conftest import fresh_params, mesh_of


@pytest.fixture(scope="module")
def params(chat_tokenizer):
    config = preset("tiny", vocab_size=chat_tokenizer.vocab_size)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10
    return config, params


def session_on(params, tokenizer, mesh):
    return make_session(*params, mesh_of(mesh), "float32", tokenizer=tokenizer)


def run(session, stored=None):
    lines = []
    found = smoke(session, reference=stored, say=lines.append)
    return found, lines


def test_memory_is_told_where_the_device_tells_it(params, chat_tokenizer, monkeypatch):
    session = session_on(params, chat_tokenizer, "")
    stats = {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30, "bytes_limit": 31 * 2**30}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert run(session)[1][0].endswith(" a device, at most 3.00 GiB in use of 31.00")


def test_reference_of_one_mesh_and_a_run_on_another(params, chat_tokenizer, tmp_path):
    one, many = (session_on(params, chat_tokenizer, mesh) for mesh in ("", "fsdp=2,tensor=2"))
    found, (figures,) = run(one)
    assert "tokens/s" in figures
    assert "MiB of parameters a device" in figures
    reference.write(tmp_path / "reference.json", found)
    stored = reference.read(tmp_path / "reference.json")
    assert stored == found
    assert (stored.dtype, stored.weights) == ("float32", "float")
    assert [len(row) for row in stored.tokens] == [NEW_TOKENS] * len(PROMPTS)
    assert "all 192 tokens equal the reference's" in run(many, stored)[1][1]

    # One weight of another value: the tokens may stay, the log-probabilities do not.
    head = many.params["head"]["kernel"]
    changed = {**many.params, "head": {"kernel": head.at[:, 7].add(0.5)}}
    with pytest.raises(UserError, match=r"smoke test failed: (after|log-probabilities)"):
        run(dataclasses.replace(many, params=changed), stored)

    tokens = [list(row) for row in stored.tokens]
    tokens[1][5] = (tokens[1][5] + 1) % 512
    longer = [[*row, 3] for row in stored.tokens]
    shifted = (np.array(stored.logprobs) + 0.01).tolist()
    for changes, message in (
        ({"tokens": tokens}, r"after 'import os.*' the token at position 5 is \d+, in the reference \d+"),
        ({"tokens": longer}, "the reference has 49 tokens after 'def', this version generates 48"),
        ({"logprobs": shifted}, "log-probabilities differ by up to 0.01 nats"),
        ({"prompts": [[1]]}, "other prompts or another tokenizer"),
        ({"dtype": "bfloat16"}, "made with --dtype bfloat16 --weights float, this run has --dtype float32"),
        ({"weights": "int8"}, "made with --dtype float32 --weights int8, this run has .* --weights float"),
    ):
        with pytest.raises(UserError, match=message):
            run(one, dataclasses.replace(stored, **changes))


def test_a_tie_may_fall_either_way(params, chat_tokenizer):
    """Two tokens are equally likely: a reference with the other one, and what follows that, is no fault."""
    config, tree = params
    said = run(session_on(params, chat_tokenizer, ""))[0].tokens[0][10]
    unused = 3
    head = tree["head"]["kernel"]

    def with_head(kernel):
        return session_on((config, {**tree, "head": {"kernel": kernel}}), chat_tokenizer, "fsdp=2,tensor=2")

    twins = with_head(head.at[:, unused].set(head[:, said]))
    found, _ = run(twins)
    tokens = list(found.tokens[0])
    at = next(index for index, token in enumerate(tokens) if token in (said, unused))
    other = said + unused - tokens[at]
    tokens = [*tokens[:at], other]
    (rest,) = generate(
        twins, [[*found.prompts[0], *tokens]], max_new_tokens=NEW_TOKENS - len(tokens), stop_ids=()
    )
    tokens += rest.tokens
    logprobs = score(twins, [(found.prompts[0], tokens)])[0].logprobs
    stored = dataclasses.replace(
        found, tokens=[tokens, *found.tokens[1:]], logprobs=[list(logprobs), *found.logprobs[1:]]
    )
    line = run(twins, stored)[1][1]
    assert line.startswith("the reference's 192 tokens are likely here, log-probabilities within")
    assert f"the token at position {at} is {found.tokens[0][at]}, in the reference {other}: a tie" in line

    kernel = twins.params["head"]["kernel"]
    with pytest.raises(UserError, match=rf"in the reference {other}, which is less likely here by"):
        run(with_head(kernel.at[:, other].multiply(0.9)), stored)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hf", "{}/nowhere"], "nowhere is not a directory"),
        (["--hf", "{}/empty"], "config.json does not exist"),
        (["--hf", "{}/bare"], "bare holds no weights"),
        (["--hf", "{}/hf", "--dtype", "bfloat16"], "--hf compares with transformers in float32"),
        (["--hf", "{}/hf", "--weights", "int8"], "--hf compares with transformers in float32"),
        (["--mesh", "sequence=2"], "generation cannot cut the sequence"),
        (["--write-reference", "{}/file/reference.json"], "the reference cannot be written"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    chat_checkpoint, tmp_path, capsys, monkeypatch, words, message
):
    def loaded(*_):
        raise UserError("the weights are loaded")

    monkeypatch.setattr(source, "restore_params", loaded)
    for name in ("empty", "bare", "hf"):
        (tmp_path / name).mkdir()
    for name in ("bare", "hf"):
        described = to_hf(preset("tiny"), dtype="float32", bos=1, eos=2, pad=None)
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    (tmp_path / "hf/model.safetensors").write_text("")
    (tmp_path / "file").write_text("")
    words = ["smoke", "--checkpoint", str(chat_checkpoint), *(word.format(tmp_path) for word in words)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_transformers_cannot_open_is_one_line(params, chat_tokenizer, tmp_path):
    session = session_on(params, chat_tokenizer, "")
    with pytest.raises(UserError, match=r"transformers cannot open .*no-model: .") as error:
        smoke(session, str(tmp_path / "no-model"), say=lambda line: None)
    assert "\n" not in str(error.value)


WHOLE = {
    "dtype": "float32", "weights": "float", "prompts": [[1], [2]], "tokens": [[3, 4], [5, 6]],
    "logprobs": [[-1.0, -2], [-3.0, -4.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "reference of lemur smoke: Expecting property name"),
        ("[]", "it is not a JSON object"),
        ({"dtype": None}, "it has no dtype"),  # as those that were written before it was kept
        ({"logprobs": []}, "logprobs has 0 rows for 2 prompts"),
        ({"tokens": [[3, 4]]}, "tokens has 1 rows for 2 prompts"),
        ({"tokens": 7}, "tokens is not a list of rows"),
        ({"tokens": [[3, 4], 5]}, "tokens is not a list of rows"),
        ({"tokens": [[3, 4], [5, 6, 7]]}, "row 1 has 3 tokens and 2 logprobs"),
        ({"logprobs": [["a", 0], [0, 0]]}, "logprobs has an entry that is no number"),
    ],
)
def test_malformed_references(tmp_path, text, message):
    file = tmp_path / "reference.json"
    file.write_text(json.dumps(WHOLE))
    assert reference.read(file) == reference.Reference(**WHOLE)
    if isinstance(text, dict):
        text = json.dumps({key: value for key, value in (WHOLE | text).items() if value is not None})
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        reference.read(file)
    assert "\n" not in str(error.value)


def test_a_reference_that_does_not_fit_is_refused_before_anything_is_loaded(
    chat_checkpoint, tmp_path, capsys, monkeypatch
):
    tokenizer = Tokenizer.from_files(manager.tokenizer_files(manager.read_metadata(chat_checkpoint)))
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    rows = [[1] * NEW_TOKENS for _ in PROMPTS]
    fitting = reference.Reference(
        dtype="float32", weights="float", prompts=prompts, tokens=rows, logprobs=rows
    )

    def loaded(*_):
        raise UserError("the weights are loaded")

    monkeypatch.setattr(source, "restore_params", loaded)
    for number, (changes, message) in enumerate(
        [
            (
                {"dtype": "bfloat16"},
                "was made with --dtype bfloat16 --weights float, this run has --dtype float32",
            ),
            ({"weights": "int8"}, "was made with --dtype float32 --weights int8"),
            ({"prompts": [[*row, 3] for row in prompts]}, "other prompts or another tokenizer"),
            (
                {"tokens": [row[1:] for row in rows], "logprobs": [row[1:] for row in rows]},
                "this version generates",
            ),
            ({}, "the weights are loaded"),
        ]
    ):
        file = tmp_path / f"{number}.json"
        reference.write(file, dataclasses.replace(fitting, **changes))
        assert main(["smoke", "--checkpoint", str(chat_checkpoint), "--reference", str(file)]) == 2
        assert message in capsys.readouterr().err


def test_the_verb_compares_or_writes_as_it_is_told(chat_checkpoint, tmp_path, capsys):
    file = tmp_path / "new" / "reference.json"

    def verb(*words):
        status = main(["smoke", "--checkpoint", str(chat_checkpoint), *words])
        said = capsys.readouterr()
        return status, said.out if status == 0 else said.err

    status, said = verb("--reference", str(file))
    assert status == 2
    assert said == (
        f"lemur smoke: no reference {file}: make one with --write-reference where results are trusted\n"
    )
    assert not file.exists()
    assert verb("--reference", "")[0] == 2  # an empty variable in a script is no pass either

    status, said = verb("--write-reference", str(file))
    assert status == 0
    assert f"reference written to {file}" in said
    before = file.read_bytes()
    status, said = verb("--reference", str(file))
    assert status == 0
    assert "all 192 tokens equal the reference's" in said
    assert verb("--write-reference", str(file)) == (
        2,
        f"lemur smoke: {file} exists already: remove it to write a new reference\n",
    )
    assert verb("--reference", str(file), "--dtype", "bfloat16")[0] == 2
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["reference.json"]
