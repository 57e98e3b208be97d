"""`lemur eval`: tasks by name, and the paper's suite beside its published numbers.

HumanEval and MBPP are our own. Every other task is one of lm-evaluation-harness, or of the user's task files.
"""

import collections
import contextlib
import dataclasses
import difflib
import functools
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.agents import problems
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.evals import code
from lemur_jax.evals.published import ELSEWHERE, PUBLISHED
from lemur_jax.infer.session import Session

# Our task files (`evals/tasks/`) with the paper's protocols, and the metric of each.
PAPER = {
    "MMLU": ("lemur_mmlu", "acc,none"),
    "BBH": ("lemur_bbh", "exact_match,none"),
    "GSM8K": ("lemur_gsm8k", "exact_match,none"),
}
CODE = {"humaneval": "HumanEval", "mbpp": "MBPP"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How tasks are run."""

    data: str = ""  # directory with `mbpp.jsonl`, `mmlu/`, `bbh/` and `gsm8k/`; the rest comes from the hub
    include_path: str = ""  # directory of the user's own task files (YAML) for the harness
    limit: int | None = None  # number of documents of each task
    chat: bool = False  # ask in the model's chat template
    seed: int = 0  # of sampling
    # of an answer; None: 512 for HumanEval and MBPP, what the task says for others
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task's result."""

    task: str  # its name, e.g. "HumanEval"
    score: float | None = None  # percent for the paper's benchmarks; None if it could not be run
    # metrics, verdicts and the like, as JSON values
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""  # what is needed, if it could not be run


def evaluate(
    session: Session,
    tasks: Sequence[str],
    options: Options = Options(),
    *,
    suite: str = "",
    scores: Mapping[str, float] | None = None,
) -> Iterator[TaskResult]:
    """Runs tasks one after another, each when its result is requested.

    Args:
      tasks: "humaneval", "mbpp", or names of the harness's tasks and of those in `include_path`.
      suite: "paper" adds the benchmarks of the paper; missing data of one does not stop the others.
      scores: per cent of benchmarks in `ELSEWHERE`, for the suite's table; see `published.parse_scores`.

    Raises:
      UserError: an unknown suite or task, or a task asked for by name whose data is missing.
    """
    if suite not in ("", "paper"):
        raise UserError(f"unknown suite {suite!r}: there is one, paper")
    names = dict.fromkeys([*PAPER, *CODE, *tasks] if suite else tasks)
    if not names:
        raise UserError("nothing to evaluate: name --tasks, or --suite paper")
    for name in names:
        run = _run_paper_task if name in PAPER else _run_code if name in CODE else _run_harness
        try:
            yield run(session, name, options)
        except UserError as error:
            if not suite or name in tasks:
                raise
            yield TaskResult(task=CODE.get(name, name), missing=str(error))
    for name, command in ELSEWHERE.items() if suite else ():
        score = (scores or {}).get(name)
        missing = f"it has a harness of its own ({command}): see docs/evaluation.md" if score is None else ""
        yield TaskResult(task=name, score=score, missing=missing)


def check_tasks(tasks: Sequence[str], options: Options) -> None:
    """Raises UserError for an unknown task, with the nearest names, and where the problems of MBPP are missing."""
    for task in tasks:
        if task == "mbpp":
            _mbpp(options)
        elif task not in CODE:
            _task_manager(task, options)


def _run_code(session: Session, task: str, options: Options) -> TaskResult:
    settings: dict[str, Any] = {"chat": options.chat, "max_new_tokens": options.max_new_tokens or 512}
    if task == "humaneval":
        found = problems.humaneval()
        sampling = dataclasses.replace(code.HUMANEVAL_SAMPLING, seed=options.seed)
        settings |= {"stops": code.HUMANEVAL_STOPS, "sampling": sampling}
    else:
        found = _mbpp(options)
        settings |= {"stops": code.MBPP_STOPS, "sampling": code.MBPP_SAMPLING, "cut": code.cut_mbpp}
    verdicts = code.solve(session, found[: options.limit], **settings)
    counts = collections.Counter(verdict.verdict for verdict in verdicts)
    answers = [dataclasses.asdict(verdict) for verdict in verdicts]
    detail = {"problems": len(verdicts), "verdicts": dict(counts.most_common()), "answers": answers}
    return TaskResult(task=CODE[task], score=100 * counts["passed"] / len(verdicts), detail=detail)


def _mbpp(options: Options) -> list[problems.Problem]:
    return problems.mbpp(epath.Path(options.data) / "mbpp.jsonl")


def _run_paper_task(session: Session, name: str, options: Options) -> TaskResult:
    task, metric = PAPER[name]
    result = _run_harness(session, task, dataclasses.replace(options, include_path=""))
    return dataclasses.replace(result, task=name, score=100 * result.detail["metrics"][metric])


def _run_harness(session: Session, task: str, options: Options) -> TaskResult:
    manager = _task_manager(task, options)
    from lm_eval import simple_evaluate

    from lemur_jax.evals.harness import LemurLM

    max_tokens = options.max_new_tokens
    generation: dict[str, Any] = {"max_gen_toks": max_tokens} if max_tokens else {}
    if options.chat and task == PAPER["GSM8K"][0]:
        generation["until"] = []  # a chat model reasons in paragraphs, and ends its answer itself
    try:
        with _cache_without_hub():
            result: Any = simple_evaluate(
                model=LemurLM(session, seed=options.seed),
                tasks=_load_task(manager, task),
                limit=options.limit,
                task_manager=manager,
                apply_chat_template=options.chat,
                gen_kwargs=generation or None,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"task {task!r}: its data set is not in the cache and the hub cannot be reached"
            f" ({reason_of(error)}): run it once where there is a network, or copy its cache here (HF_HOME)"
        ) from error
    by_task = {
        name: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        for name, metrics in result["results"].items()
    }
    # A tag, and a group that does not aggregate, have no numbers of their own.
    flat = {f"{name} {key}": value for name, metrics in by_task.items() for key, value in metrics.items()}
    return TaskResult(task=task, detail={"metrics": by_task.get(task) or flat})


def _load_task(manager: Any, task: str) -> list[Any]:
    """The task, the group or the tasks of a tag, with their data."""
    try:
        loaded = manager.load([task])
    except (UserError, ConnectionError, FileNotFoundError, ImportError):
        raise
    except Exception as error:  # of any class: what the task's file says meets its data here
        raise UserError(
            f"task {task!r} cannot be set up ({reason_of(error)}): correct its file or its data"
        ) from error
    groups, tasks = loaded["groups"], loaded["tasks"]
    for flag, reason in (
        ("UNSAFE_CODE", "runs answers outside the sandbox"),
        ("MULTIMODAL", "shows pictures"),
    ):
        if any(getattr(one, flag, False) for one in tasks.values()):
            raise UserError(f"task {task!r} {reason}: leave it out (humaneval and mbpp run in the sandbox)")
    return [groups[task]] if task in groups else list(tasks.values())


@contextlib.contextmanager
def _cache_without_hub() -> Iterator[None]:
    """Where the hub cannot be reached, data sets come from the cache at once, without half a minute of retries."""
    import datasets
    from huggingface_hub import constants

    url = urllib.parse.urlsplit(constants.ENDPOINT)
    saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            place = url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443)
            socket.create_connection(place, timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


@functools.lru_cache(maxsize=4)
def _task_manager(task: str, options: Options) -> Any:
    """The harness's index of tasks: of our files and the user's, and if need be of its own 14,000."""
    import lemur_jax.evals.harness  # noqa: F401  # says so if lm-eval is missing

    from lm_eval.tasks import TaskManager  # isort: skip

    own_tasks = str(pathlib.Path(__file__).parent / "tasks")
    paths = [own_tasks, options.include_path] if options.include_path else [own_tasks]
    if not pathlib.Path(paths[-1]).is_dir():
        raise UserError(f"--include-path {options.include_path} is no directory")
    for defaults in (False, True):
        manager = TaskManager(include_path=paths, include_defaults=defaults, metadata={"data": options.data})
        if task in manager.all_tasks:
            return manager
    matches = difflib.get_close_matches(task, sorted({*manager.all_tasks, *CODE}), 3)
    hint = f"did you mean {' or '.join(matches)}? " if matches else ""
    raise UserError(
        f"unknown task {task!r}: {hint}see lm_eval ls tasks, or name the directory of its file with --include-path"
    )


def format_results(results: Sequence[TaskResult], name: str) -> str:
    """A table of ours beside the paper's scores, then all metrics, then what is missing."""
    by_task = {item.task: item for item in results}
    columns = [task for task in next(iter(PUBLISHED.values())) if task in by_task]
    lines = []
    if columns:
        width = max(map(len, (*PUBLISHED, name)))
        lines.append(" " * width + "".join(f"{task:>11}" for task in columns))
        scores = {task: by_task[task].score for task in columns}
        rows: dict[str, dict[str, float | None]] = {**PUBLISHED, name: scores}
        for model, row in rows.items():
            cells = ("--" if row[task] is None else f"{row[task]:.1f}" for task in columns)
            lines.append(f"{model:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    for item in results:
        lines += [f"{item.task}  {key}  {value:.4f}" for key, value in item.detail.get("metrics", {}).items()]
        if "verdicts" in item.detail:
            counts = ", ".join(f"{verdict} {count}" for verdict, count in item.detail["verdicts"].items())
            lines.append(f"{item.task}: {item.detail['problems']} problems: {counts}")
        if item.missing:
            lines.append(f"{item.task} was not run: {item.missing}")
    return "\n".join(lines)


def to_json(results: Sequence[TaskResult], checkpoint: str) -> dict[str, Any]:
    """All results, answers included, as JSON values."""
    records = [dataclasses.asdict(item) for item in results]
    return {"checkpoint": checkpoint, "published": PUBLISHED, "results": records}
