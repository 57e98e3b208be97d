"""The verb `generate`: what a prompt gets does not hang on the others."""

import pytest

from lemur_jax.cli import main
from lemur_jax.cli.inference import prompt_seeds


@pytest.fixture
def generate(chat_checkpoint, capsys):
    def run(*prompts, seed=7):
        words = ["generate", "--checkpoint", str(chat_checkpoint), "--max-new-tokens", "12"]
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
    prompt_seeds(["\udcff"])  # a byte of the command line that is no UTF-8
