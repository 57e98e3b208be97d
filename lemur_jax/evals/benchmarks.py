"""`lemur eval`: tasks by name, and the paper's suite beside its published numbers.

HumanEval and MBPP are run here, in the sandbox. Every other task is one of lm-evaluation-harness, or of
the user's own files for it.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.evals import code
from lemur_jax.evals.published import ELSEWHERE, PUBLISHED
from lemur_jax.infer.session import Session

# Our task files (`evals/tasks/`), which follow the paper's protocols: name, and the metric that counts.
PAPER = {
    "MMLU": ("lemur_mmlu", "acc,none"),
    "BBH": ("lemur_bbh", "exact_match,none"),
    "GSM8K": ("lemur_gsm8k", "exact_match,none"),
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
    max_new_tokens: int | None = None,
    scores: Mapping[str, float] | None = None,
) -> list[Found]:
    """Runs tasks one after another.

    Args:
      tasks: "humaneval", "mbpp", or names of the harness's tasks and of those in `include_path`.
      suite: "paper" adds the benchmarks of the paper; those whose data is missing are reported as missing
        rather than stop the others.
      data: directory with `mbpp.jsonl`, `mmlu/`, `bbh/` and `gsm8k/`; what is not there is asked of the hub.
      include_path: directory of the user's own task files (YAML) for the harness.
      limit: only the first so many documents of each task.
      chat: ask in the model's chat template.
      seed: of sampling.
      max_new_tokens: of an answer; None: 512 for HumanEval and MBPP, what the task says for others.
      scores: per cent of benchmarks in `ELSEWHERE`, for the suite's table; see `published.parse_scores`.

    Raises:
      UserError: an unknown suite or task, or a task asked for by name whose data is missing.
    """
    if suite not in ("", "paper"):
        raise UserError(f"unknown suite {suite!r}: there is one, paper")
    jobs: dict[str, Callable[[], Found]] = {}
    if suite:
        jobs |= {name: _paper_job(session, name, data, limit, chat, max_new_tokens) for name in PAPER}
    own = ["humaneval", "mbpp"] if suite else []
    for task in dict.fromkeys([*own, *tasks]):
        jobs[task] = _job(session, task, data, include_path, limit, chat, seed, max_new_tokens)
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
    if suite:
        found += _elsewhere(scores or {})
    return found


def _elsewhere(scores: Mapping[str, float]) -> list[Found]:
    return [
        Found(
            task=name,
            score=scores.get(name),
            detail={},
            missing=""
            if name in scores
            else f"it has a harness of its own ({command}): see docs/evaluation.md",
        )
        for name, command in ELSEWHERE.items()
    ]


def _job(session, task, data, include_path, limit, chat, seed, max_new_tokens) -> Callable[[], Found]:
    options = {"chat": chat, "max_new_tokens": max_new_tokens or 512}
    if task == "humaneval":
        options |= {
            "stops": code.HUMANEVAL_STOPS,
            "sampling": dataclasses.replace(code.HUMANEVAL_SAMPLING, seed=seed),
        }
        return lambda: _run_code(session, "HumanEval", code.humaneval()[:limit], options)
    if task == "mbpp":
        path = epath.Path(data) / "mbpp.jsonl"
        options |= {"stops": code.MBPP_STOPS, "sampling": code.MBPP_SAMPLING}
        return lambda: _run_code(session, "MBPP", code.mbpp(path)[:limit], options)
    return lambda: _run_harness(session, task, include_path, data, limit, chat, max_new_tokens)


def _run_code(session, name: str, problems: Sequence[code.Problem], options: dict[str, Any]) -> Found:
    outcomes = code.solve(session, problems, **options)
    verdicts = dict(collections.Counter(outcome.verdict for outcome in outcomes).most_common())
    answers = [dataclasses.asdict(outcome) for outcome in outcomes]
    detail = {"problems": len(outcomes), "verdicts": verdicts, "answers": answers}
    return Found(task=name, score=code.pass_rate(outcomes), detail=detail)


def _paper_job(session, name: str, data: str, limit, chat, max_new_tokens) -> Callable[[], Found]:
    task, metric = PAPER[name]

    def run() -> Found:
        found = _run_harness(session, task, "", data, limit, chat, max_new_tokens)
        return dataclasses.replace(found, task=name, score=100 * found.detail["metrics"][metric])

    return run


def _run_harness(session, task: str, include_path: str, data: str, limit, chat, max_new_tokens) -> Found:
    from lemur_jax.evals.harness import LemurLM  # registers, and says so if the harness is missing

    from lm_eval import simple_evaluate  # isort: skip
    from lm_eval.tasks import TaskManager

    ours = str(pathlib.Path(__file__).parent / "tasks")
    paths = [ours, include_path] if include_path else [ours]
    manager = TaskManager(include_path=paths, metadata={"data": data})
    if task not in manager.all_tasks:
        raise UserError(
            f"unknown task {task!r}: see lm_eval ls tasks, or name its directory with --include-path"
        )
    result: Any = simple_evaluate(
        model=LemurLM(session),
        tasks=[task],
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens else None,
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
