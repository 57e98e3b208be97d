"""`lemur report --prompt` on a run that was really made."""

import html
import re

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.config import load
from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import load as load_session
from lemur_jax.report.samples import MAX_NEW_TOKENS, SAMPLING, sample
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import loop
from tests.helpers.runs import make_project


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    make_project(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = load("config.py", ["--config.train.steps=3", "--config.eval.tasks=()"])
        loop.train(config, root / "run", lambda _: None)
    return root / "run"


PROMPTS = ["value_1 = ", "other <b>"]


def test_the_page_shows_what_the_checkpoint_says(run, tmp_path):
    words = ["report", str(run), "--output", str(tmp_path / "report.html")]
    for prompt in PROMPTS:
        words += ["--prompt", prompt]
    assert main(words) == 0
    text = (
        (tmp_path / "report.html").read_bytes().decode()
    )  # a model may say \r, which text mode would change
    section = text.partition("<h2>Samples</h2>")[2].partition("<h2>")[0]
    shown = [
        html.unescape(re.sub("<[^>]*>", "", found))
        for found in re.findall("<pre>(.*?)</pre>", section, re.DOTALL)
    ]
    tokenizer = Tokenizer.load(run.parent / "tokenizer")
    session = load_session(run, {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}, "float32")
    drawn = generate(
        session,
        [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS],
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=[tokenizer.eos_id],
        sampling=SAMPLING,
    )
    for prompt, text, completion in zip(PROMPTS, shown, drawn, strict=True):
        assert text.startswith(prompt)
        assert text.removeprefix(prompt).strip() == tokenizer.decode(completion.tokens).strip() != ""


def test_a_run_without_a_checkpoint_is_refused(tmp_path, stages):
    with pytest.raises(UserError, match="no finished checkpoint"):
        sample(stages[:1], PROMPTS)
