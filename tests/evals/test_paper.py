"""The paper's protocols on tiny data in the hub's format: prompts as they are, metrics under their names."""

import json
import pathlib
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lemur_jax.agents import problems
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.evals import code
from lemur_jax.evals.published import parse_scores
from lemur_jax.evals.tasks import data as tasks
from lemur_jax.infer.generate import Completion
from lemur_jax.infer.score import Score
from tests.helpers.chat_models import write_chat_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

import lm_eval

from lemur_jax.evals import harness


def write(directory, name, config, split, rows):
    path = directory / name / config
    path.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / f"{split}-00000-of-00001.parquet")


def question(number, subject, answer=1):
    choices = [f"{number}{letter}" for letter in "wxyz"]
    return {"question": f" Which of {number}? ", "subject": subject, "choices": choices, "answer": answer}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two subjects of MMLU, a question of each task of BBH, a problem of GSM8K, two problems of MBPP."""
    root = tmp_path_factory.mktemp("data")
    dev = [question(n, subject) for subject in ("us_history", "algebra") for n in range(6)]
    write(root, "mmlu", "all", "dev", dev)
    test = [question(91, "us_history", 3), question(92, "us_history", 0), question(90, "algebra")]
    write(root, "mmlu", "all", "test", test)
    for path in (pathlib.Path(lm_eval.__file__).parent / "tasks/bbh/fewshot").glob("[!_]*.yaml"):
        write(root, "bbh", path.stem, "test", [{"input": f"is this {path.stem}", "target": "True"}])
    problems = [{"question": "How many?", "answer": "Two and two.\n#### 1,204"}]
    write(root, "gsm8k", "main", "test", problems)
    # As google-research/mbpp has them, Windows' line ends included; 601 and above are not for the test.
    with (root / "mbpp.jsonl").open("w") as file:
        for n in (1, 2, 3, 4, 11, 12, 601):
            item = {"text": f"Write a function that gives {n}.", "code": f"def give():\r\n  return {n}"}
            item |= {"task_id": n, "test_setup_code": "import math", "challenge_test_list": []}
            file.write(json.dumps(item | {"test_list": [f"assert give() == math.floor({n}.5)"]}) + "\n")
    return root


@pytest.fixture(scope="module")
def roomy(tmp_path_factory, small_chat_tokenizer):
    """A checkpoint with room for GSM8K's answers."""
    path = tmp_path_factory.mktemp("roomy") / "checkpoint"
    return write_chat_model(path, small_chat_tokenizer, max_position_embeddings=1024)


def test_mmlu_has_five_examples_of_its_subject(data):
    # The subjects take turns.
    second, first, third = tasks.mmlu(str(data))["test"]
    assert [one["subject"] for one in (second, first, third)] == ["us_history", "algebra", "us_history"]
    assert first["prompt"].startswith(
        "The following are multiple choice questions (with answers) about algebra.\n\n"
        "Which of 0?\nA. 0w\nB. 0x\nC. 0y\nD. 0z\nAnswer: B\n\nWhich of 1?"
    )
    assert first["prompt"].endswith("Which of 90?\nA. 90w\nB. 90x\nC. 90y\nD. 90z\nAnswer:")
    assert first["prompt"].count("Answer: B") == 5
    assert "Which of 5?" not in first["prompt"]
    assert "about us history.\n" in second["prompt"]
    assert second["answer"] == 3


def test_bbh_is_direct_after_three_examples(data):
    documents = {document["task"]: document for document in tasks.bbh(str(data))["test"]}
    assert len(documents) == 27
    boolean = documents["boolean_expressions"]
    assert boolean["prompt"].count("\nA: ") == 3
    assert boolean["prompt"].endswith("Q: is this boolean_expressions\nA:")
    assert "think step by step" not in boolean["prompt"]
    assert tasks.bbh_result(boolean, [" True\n"]) == {"exact_match": ("boolean_expressions", True)}
    assert tasks.bbh_result(boolean, [" False."]) == {"exact_match": ("boolean_expressions", False)}
    verdicts = [("a", True), ("a", True), ("a", False), ("b", False)]
    assert tasks.mean_over_tasks(verdicts) == pytest.approx(1 / 3)


def test_gsm8k_is_a_chain_of_thought_after_eight(data):
    (problem,) = tasks.gsm8k(str(data))["test"]
    assert problem["prompt"].startswith("Answer the following questions.\n\nQuestion: There are 15 trees")
    assert problem["prompt"].count("So the answer is ") == 8
    assert problem["prompt"].endswith("is 8.\n\nQuestion: How many?\nAnswer:")
    assert problem["target"] == "1,204"
    assert tasks.gsm8k_result(problem, ["First 3, then $1204."]) == {"exact_match": True}
    assert tasks.gsm8k_result(problem, ["1204, no, 5"]) == {"exact_match": False}
    assert tasks.gsm8k_result(problem, ["none"]) == {"exact_match": False}


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" (B)", "(b)"), ("(B) 4 July. Because", "(b)"), ("TRUE.\nQ: more", "true"), ("", "")]
    + [(text, text) for text in ("] ) )", "[ ( a )", "arson aspect")],
)
def test_short_answer(text, answer):
    assert tasks.short_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [("The answer is -3.50.", -3.5), ("$1,200.", 1200), ("12, 13", 13), ("no", None), ("3-4", 4)],
)
def test_last_number(text, number):
    assert tasks.last_number(text) == number


# What follows a prompt with this in it, if the model knows everything.
KNOWN = {
    "Which of 90?": "B",
    "Which of 91?": "D",
    "Which of 92?": "A",
    "Q: is this ": " True\n\nQ: more",
    "Question: How many?": " Four hundred, or so: $1,204.\n\nQuestion: more",
    "that gives 11.": "def give():\n  return 11\n[DONE]\nmore",
    "that gives 12.": "def give():\n  return 12\n[DONE]\nmore",
}


def known(tokenizer, prompt):
    text = tokenizer.decode(list(prompt))
    return KNOWN[max(KNOWN, key=text.rfind)]


def all_knowing_complete(session, prompts, **_):
    answers = []
    for prompt in prompts:
        text = known(session.tokenizer, prompt)
        ids = tuple(session.tokenizer.encode(text, prefix=False))
        answers.append(Completion(tokens=ids, logprobs=(0.0,) * len(ids), finish_reason="length", text=text))
    return answers


def all_knowing_score(session, pairs, **_):
    def good(context, continuation):
        return session.tokenizer.decode(list(continuation)).strip() == known(session.tokenizer, context)

    return [Score(logprobs=(0.0 if good(*pair) else -9.0,), greedy=(True,)) for pair in pairs]


@pytest.fixture
def all_knowing(data, monkeypatch):
    """Nothing is computed: answers come from `KNOWN`."""
    monkeypatch.setattr(problems, "humaneval", lambda: problems.mbpp(data / "none.jsonl"))
    for module in (code, harness):
        monkeypatch.setattr(module, "complete", all_knowing_complete)
    monkeypatch.setattr(harness, "score", all_knowing_score)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_a_model_that_knows_all_gets_full_marks(data, roomy, all_knowing, tmp_path, capsys, monkeypatch):
    # 128 tokens of an answer leave the end of the longest prompts in this model's 1,024.
    words = f"eval --checkpoint {roomy} --suite paper --data {data} --max-new-tokens 128".split()
    for options in ([], ["--chat"]):
        if options:
            monkeypatch.setitem(KNOWN, "Question: How many?", " Four hundred.\n\nOr so: $1,204.")
        out = tmp_path / "out.json"
        assert main([*words, *options, "--scores", "Spider=12.34", "--json", str(out)]) == 0
        results = {item["task"]: item for item in json.loads(out.read_text())["results"]}
        scores = {task: item["score"] for task, item in results.items() if not item["missing"]}
        assert scores == {"MMLU": 100, "BBH": 100, "GSM8K": 100, "MBPP": 100, "Spider": 12.34}
        assert results["BBH"]["detail"]["metrics"].keys() >= {"exact_match,none"}
        assert results["MBPP"]["detail"]["problems"] == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("MMLU", "Spider", "DS-1000", "30.7"))
    assert "MultiPL-E was not run: it has a harness of its own (bigcode-eval --task multiple-" in shown
    assert "12.3" in shown.split("checkpoint")[1].splitlines()[0]
    assert "Spider was not run" not in shown


def test_a_damaged_or_other_file_is_named(tmp_path):
    write(tmp_path, "gsm8k", "main", "test", [{"question": "?", "answers": "1"}])
    with pytest.raises(UserError, match=r"gsm8k/main/test-.* lacks answer; it has question, answers"):
        tasks.gsm8k(str(tmp_path))
    (path,) = (tmp_path / "gsm8k/main").glob("*.parquet")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"gsm8k/main/test-.* is no whole Parquet file .* git lfs"):
        tasks.gsm8k(str(tmp_path))


def test_missing_data_says_what_to_bring(tmp_path):
    message = r"mmlu needs .*/mmlu/all/dev\*.parquet, or the hub .* hf download cais/mmlu"
    with pytest.raises(UserError, match=message):
        tasks.mmlu(str(tmp_path))


def test_scores_of_other_harnesses():
    assert parse_scores("Spider=62.8,DS-1000=0") == {"Spider": 62.8, "DS-1000": 0.0}
    assert parse_scores("") == {}


@pytest.mark.parametrize("text", ["Spider", "Spider=x", "MMLU=50", "Spider=101", "Spider=nan"])
def test_bad_scores_are_refused_before_a_checkpoint_is_opened(text, capsys):
    assert main(["eval", "--checkpoint", "nowhere", "--suite", "paper", "--scores", text]) == 2
    assert f"cannot read the score {text!r}" in capsys.readouterr().err
