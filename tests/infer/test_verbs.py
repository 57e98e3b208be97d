"""The verb `generate`: what a prompt gets does not hang on the others, and how likely each token of it was."""

import json
import subprocess
import sys

import pytest

from lemur_jax.cli import main
from lemur_jax.cli.inference import prompt_seeds
from lemur_jax.infer.score import score
from lemur_jax.infer.session import load
from lemur_jax.infer.text import continuation
from lemur_jax.parallel.mesh import parse_mesh


@pytest.fixture
def generate(chat_checkpoint, capsys):
    def run(*prompts, seed=7, words=()):
        words = ["generate", "--checkpoint", str(chat_checkpoint), "--max-new-tokens", "12", *words]
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


def test_seeds_of_prompts():
    a, b, again = prompt_seeds(["a", "b", "a"])
    assert len({a, b, again}) == 3
    assert prompt_seeds(["a", "a", "b"]) == [a, again, b]
    assert all(0 <= seed < 2**32 for seed in (a, b, again))


@pytest.mark.parametrize(
    "words", [["generate", "--prompt", "\udcff"], ["chat", "--prompt", "a", "--system", "b\udcff"]]
)
def test_a_text_that_is_not_utf_8_is_one_line(chat_checkpoint, capsys, words):
    assert main([*words, "--checkpoint", str(chat_checkpoint)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{words[-2]} '" in line
    assert "is not UTF-8" in line


@pytest.mark.parametrize("option", ["--top-k=5", "--top-p=0.9", "--min-p=0.1"])
def test_what_changes_draws_needs_a_temperature(chat_checkpoint, capsys, option):
    assert main(["generate", "--prompt", "a", "--checkpoint", str(chat_checkpoint), option]) == 2
    assert "give a --temperature above 0 too" in capsys.readouterr().err


def test_a_typed_line_that_is_too_long_or_not_utf_8_ends_no_conversation(chat_checkpoint):
    lines = [b"hello", b"\xff", b"x " * 5000, b"hello again", b""]
    words = [sys.executable, *f"-m lemur_jax chat --max-new-tokens 2 --checkpoint {chat_checkpoint}".split()]
    chat = subprocess.run(words, input=b"\n".join(lines), stdout=subprocess.PIPE, check=True)
    shown = chat.stdout.decode()
    assert shown.count("> ") >= len(lines)
    assert "max_position_embeddings" in shown
    assert "Traceback" not in shown


def test_logprobs_are_those_that_score_finds(generate, chat_checkpoint, chat_tokenizer):
    """By another program, without a cache, of the ids that are told; with and without the option the same text."""
    prompts = ["import", "def"]
    texts = [generate(prompt) for prompt in prompts]
    told = generate(*prompts, words=["--logprobs"])
    session = load(chat_checkpoint, parse_mesh(""), "float32")
    for prompt, text in zip(prompts, texts, strict=True):
        assert told.startswith(text)
        lines = [line.split("\t") for line in told.removeprefix(text).splitlines()[:12]]
        told = told.removeprefix(text).partition(lines[-1][2] + "\n")[2]
        ids = [int(line[1]) for line in lines]
        before = [chat_tokenizer.bos_id, *chat_tokenizer.encode(prompt)]
        assert prompt + continuation(chat_tokenizer, before, ids) == text.rstrip("\n")
        assert [json.loads(line[2]) for line in lines] == [chat_tokenizer.token(id) for id in ids]
        (found,) = score(session, [(before, ids)])
        assert [float(line[0]) for line in lines] == pytest.approx(found.logprobs, abs=1e-3)
    assert not told
