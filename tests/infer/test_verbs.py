"""The verb `generate`: what a prompt gets does not hang on the others, and how likely each token of it was."""

import io
import json
import sys

import pytest

from lemur_jax.cli import main
from lemur_jax.infer.score import score
from lemur_jax.infer.session import load
from lemur_jax.infer.text import continuation
from lemur_jax.parallel.mesh import parse_mesh


@pytest.fixture
def generate(chat_model, capsys):
    def run(*prompts, seed=7, words=()):
        words = ["generate", "--checkpoint", str(chat_model), "--max-new-tokens", "12", *words]
        words += ["--temperature", "1", "--seed", str(seed)]
        for prompt in prompts:
            words += ["--prompt", prompt]
        assert main(words) == 0
        return capsys.readouterr().out

    return run


def test_a_prompt_gets_the_same_answer_in_any_company(generate):
    long = "for index in range(10): print(index) " * 3
    alone = generate("import")
    assert alone.startswith("import")
    assert generate("import", seed=8) != alone
    assert generate("def", "import").endswith(alone)
    assert generate("import", long).startswith(alone)
    # Asked again it draws again, and in any company the same.
    twice = generate("import", "import")
    assert twice.startswith(alone)
    assert twice != 2 * alone
    assert generate("import", "def", "import").endswith(twice.removeprefix(alone))


@pytest.mark.parametrize(
    "words", [["generate", "--prompt", "\udcff"], ["chat", "--prompt", "a", "--system", "b\udcff"]]
)
def test_a_text_that_is_not_utf_8_is_one_line(chat_model, capsys, words):
    assert main([*words, "--checkpoint", str(chat_model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{words[-2]} '" in line
    assert "is not UTF-8" in line


@pytest.mark.parametrize("option", ["--top-k=5", "--top-p=0.9", "--min-p=0.1"])
def test_what_changes_draws_needs_a_temperature(chat_model, capsys, option):
    assert main(["generate", "--prompt", "a", "--checkpoint", str(chat_model), option]) == 2
    assert "give a --temperature above 0 too" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_variables_of_a_chat_template_are_checked_first(chat_model, capsys, monkeypatch, verb):
    monkeypatch.setattr("lemur_jax.infer.session.make_session", None)  # the weights are not read
    wrong = {"{": "is not JSON", "[1]": "is [1], not an object", "[" * 9999: "is not JSON"}
    for value, message in (wrong | {'{"thinking": false}': "leaves out 'thinking'"}).items():
        assert main([verb, "--checkpoint", str(chat_model), "--chat-template-kwargs", value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_typed_line_that_is_too_long_or_not_utf_8_ends_no_conversation(chat_model, capsys, monkeypatch):
    lines = [b"hello", b"\xff", b"x " * 5000, b"hello again", b""]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), "utf-8"))
    assert main(["chat", "--max-new-tokens", "2", "--checkpoint", str(chat_model)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("> ") >= len(lines)
    assert "max_position_embeddings" in shown


def test_logprobs_are_those_that_score_finds(generate, chat_model, small_chat_tokenizer):
    """By another program, without a cache, of the ids that are told; with and without the option the same text."""
    prompts = ["import", "def"]
    texts = [generate(prompt) for prompt in prompts]
    told = generate(*prompts, words=["--logprobs"])
    session = load(chat_model, parse_mesh(""), "float32")
    for prompt, text in zip(prompts, texts, strict=True):
        assert told.startswith(text)
        lines = [line.split("\t") for line in told.removeprefix(text).splitlines()[:12]]
        told = told.removeprefix(text).partition(lines[-1][2] + "\n")[2]
        ids = [int(line[1]) for line in lines]
        before = [small_chat_tokenizer.bos_id, *small_chat_tokenizer.encode(prompt)]
        assert prompt + continuation(small_chat_tokenizer, before, ids) == text.rstrip("\n")
        assert [json.loads(line[2]) for line in lines] == [small_chat_tokenizer.token(id) for id in ids]
        (found,) = score(session, [(before, ids)])
        assert [float(line[0]) for line in lines] == pytest.approx(found.logprobs, abs=1e-3)
    assert not told
