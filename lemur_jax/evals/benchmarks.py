"""`lemur eval`: tasks by name, and the paper's suite beside its published numbers.

HumanEval and MBPP are run here, in the sandbox. Every other task is one of lm-evaluation-harness, or of
the user's own files for it.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.evals import code
from lemur_jax.infer.session import Session

# Percent, of the paper (arXiv 2310.06830) recalled and not copied from it; check there before quoting.
PUBLISHED: dict[str, dict[str, float | None]] = {
    "Llama-2-70B": {"MMLU": 68.9, "BBH": 51.2, "GSM8K": 56.8, "HumanEval": 30.5, "MBPP": 45.4},
    "Lemur-70B": {"MMLU": 64.5, "BBH": 51.6, "GSM8K": 54.9, "HumanEval": 35.4, "MBPP": 53.2},
    "Lemur-70B-Chat": {"MMLU": 65.3, "BBH": 61.9, "GSM8K": 66.3, "HumanEval": 61.0, "MBPP": 55.5},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A benchmark of the paper in the harness: its name there, shots, metric, and data set on the hub."""

    task: str
    shots: int | None
    metric: str
    data: str


# The paper's protocols: MMLU 5-shot by argmax over A to D; BBH direct, 3-shot; GSM8K 8-shot chain of
# thought, the last number counts.
PAPER = {
    "MMLU": HarnessTask(task="mmlu", shots=5, metric="acc,none", data="cais/mmlu"),
    "BBH": HarnessTask(task="bbh_fewshot", shots=None, metric="exact_match,none", data="SaylorTwift/bbh"),
    "GSM8K": HarnessTask(
        task="gsm8k_cot", shots=8, metric="exact_match,flexible-extract", data="openai/gsm8k"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """One task's result.

    Attributes:
      task: its name, e.g. "HumanEval".
      score: percent for the paper's benchmarks; None if it could not be run.
      detail: metrics, verdicts and the like, as JSON takes them.
      missing: what to bring, if it could not be run.
    """

    task: str
    score: float | None
    detail: dict[str, Any]
    missing: str = ""


def evaluate(
    session: Session,
    tasks: Sequence[str],
    *,
    suite: str = "",
    data: str = "",
    include_path: str = "",
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> list[Found]:
    """Runs tasks one after another.

    Args:
      tasks: "humaneval", "mbpp", or names of the harness's tasks and of those in `include_path`.
      suite: "paper" adds the five benchmarks of the paper; those whose data is missing are reported
        as missing rather than stop the others.
      data: directory with `mbpp.jsonl`.
      include_path: directory of the user's own task files (YAML) for the harness.
      limit: only the first so many documents of each task.
      chat: apply the chat template in the harness's tasks.

    Raises:
      UserError: an unknown suite or task, or a task asked for by name whose data is missing.
    """
    if suite not in ("", "paper"):
        raise UserError(f"unknown suite {suite!r}: there is one, paper")
    jobs: dict[str, Callable[[], Found]] = {}
    if suite:
        jobs |= {name: _paper_job(session, name, limit, chat) for name in PAPER}
    own = ["humaneval", "mbpp"] if suite else []
    for task in dict.fromkeys([*own, *tasks]):
        jobs[task] = _job(session, task, data, include_path, limit, chat, seed)
    if not jobs:
        raise UserError("nothing to evaluate: name --tasks, or --suite paper")
    found = []
    for name, job in jobs.items():
        try:
            found.append(job())
        except UserError as error:
            if not suite or name in tasks:
                raise
            shown = {"humaneval": "HumanEval", "mbpp": "MBPP"}.get(name, name)
            found.append(Found(task=shown, score=None, detail={}, missing=str(error)))
    return found


def _job(session, task: str, data: str, include_path: str, limit, chat, seed) -> Callable[[], Found]:
    if task == "humaneval":
        return lambda: _run_code(
            session, "HumanEval", code.humaneval()[:limit], code.HUMANEVAL_STOPS, 0.2, seed
        )
    if task == "mbpp":
        path = epath.Path(data) / "mbpp.jsonl"
        return lambda: _run_code(session, "MBPP", code.mbpp(path)[:limit], code.MBPP_STOPS, 0.0, seed)
    return lambda: _run_harness(session, task, None, include_path, limit, chat)


def _run_code(session, name: str, problems, stops, temperature: float, seed: int) -> Found:
    outcomes = code.solve(session, problems, stops=stops, temperature=temperature, seed=seed)
    verdicts = dict(collections.Counter(outcome.verdict for outcome in outcomes).most_common())
    answers = [dataclasses.asdict(outcome) for outcome in outcomes]
    detail = {"problems": len(outcomes), "verdicts": verdicts, "answers": answers}
    return Found(task=name, score=code.pass_rate(outcomes), detail=detail)


def _paper_job(session, name: str, limit, chat) -> Callable[[], Found]:
    task = PAPER[name]

    def run() -> Found:
        try:
            found = _run_harness(session, task.task, task.shots, "", limit, chat)
        except UserError:
            raise
        except Exception as error:  # whatever the data library raises without a network
            raise UserError(
                f"{name} needs the data set {task.data} ({type(error).__name__}): where there is a network,"
                f" run lm_eval --model dummy --tasks {task.task} with HF_HOME=DIR, bring DIR here and set"
                " HF_HOME to it"
            ) from error
        return dataclasses.replace(found, task=name, score=100 * found.detail["metrics"][task.metric])

    return run


def _run_harness(session, task: str, shots: int | None, include_path: str, limit, chat) -> Found:
    from lemur_jax.evals.harness import LemurLM  # registers, and says so if the harness is missing

    from lm_eval import simple_evaluate  # isort: skip
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path or None)
    if task not in manager.all_tasks:
        raise UserError(
            f"unknown task {task!r}: see lm_eval ls tasks, or name its directory with --include-path"
        )
    result: Any = simple_evaluate(
        model=LemurLM(session),
        tasks=[task],
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=False,
    )
    metrics = result.get("groups", {}).get(task) or result["results"][task]
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return Found(task=task, score=None, detail={"metrics": numbers})


def table(found: Sequence[Found], name: str) -> str:
    """Ours beside the paper's, then whatever has no counterpart there, then what is missing."""
    by_task = {item.task: item for item in found}
    shown = [task for task in next(iter(PUBLISHED.values())) if task in by_task]
    lines = []
    if shown:
        width = max(map(len, (*PUBLISHED, name)))
        lines.append(" " * width + "".join(f"{task:>11}" for task in shown))
        ours = {task: by_task[task].score for task in shown}
        rows: dict[str, dict[str, float | None]] = {**PUBLISHED, name: ours}
        for model, row in rows.items():
            cells = ("--" if row[task] is None else f"{row[task]:.1f}" for task in shown)
            lines.append(f"{model:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    for item in found:
        lines += [f"{item.task}  {key}  {value:.4f}" for key, value in item.detail.get("metrics", {}).items()]
        if "verdicts" in item.detail:
            counts = ", ".join(f"{verdict} {count}" for verdict, count in item.detail["verdicts"].items())
            lines.append(f"{item.task}: {item.detail['problems']} problems: {counts}")
        if item.missing:
            lines.append(f"{item.task} was not run: {item.missing}")
    return "\n".join(lines)


def to_json(found: Sequence[Found], checkpoint: str) -> str:
    """Everything found, answers included."""
    results = [dataclasses.asdict(item) for item in found]
    return json.dumps({"checkpoint": checkpoint, "published": PUBLISHED, "results": results}, indent=1)
