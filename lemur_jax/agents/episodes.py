"""Agents, episodes with full traces, and their summary."""

import atexit
import collections
import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from lemur_jax.agents import environments, intercode, intercode_bash, mint, tools
from lemur_jax.agents.environments import Environment, PythonEnvironment, Step, before_stops
from lemur_jax.agents.mint_sets import open_mint
from lemur_jax.agents.problems import humaneval
from lemur_jax.cluster.coordination import from_primary
from lemur_jax.common.errors import UserError
from lemur_jax.infer.batching import row_shards
from lemur_jax.infer.complete import finish
from lemur_jax.infer.engine import ROWS, SLOTS, Engine
from lemur_jax.infer.generate import make_engine, make_requests
from lemur_jax.infer.session import Session
from lemur_jax.text.chat_template import Message, encode_chat, stop_ids
from lemur_jax.text.tokenizer import Tokenizer

EXPERT_STOPS = ("\nObservation:", "\nTask:", "\nAssistant:")


class Agent(Protocol):
    """The next turn of the assistant in a conversation; it ends before the first of `stops`."""

    def __call__(self, messages: Sequence[Message], stops: Sequence[str] = ...) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """An action of the agent and its result."""

    action: str
    step: Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A whole episode."""

    id: str
    task: str
    turns: tuple[Turn, ...]

    @property
    def solved_at(self) -> int | None:
        """The turn, counted from 1, that solved it."""
        return len(self.turns) if self.turns and self.turns[-1].step.reward >= 1 else None


class SessionAgent:
    """A model in this process, greedy; a conversation that no longer fits is shortened.

    Args:
      batch_tokens: tokens of the cache that conversations share, for each shard of rows on the mesh.
    """

    def __init__(self, session: Session, *, max_new_tokens: int = 512, batch_tokens: int = SLOTS):
        self._session = session
        self._limit = min(max_new_tokens, session.model.max_position_embeddings // 2)
        self._batch_tokens = batch_tokens
        self._engine: Engine | None = None
        self._length = 0

    @property
    def default_batch(self) -> int:
        """The number of conversations of 2,048 tokens that have a row each, so that a turn reads only new tokens."""
        length = min(2048, self._session.model.max_position_embeddings)
        return row_shards(self._session) * max(1, min(ROWS, self._batch_tokens // length))

    def batch(self, asked: Sequence[tuple[Sequence[Message], Sequence[str]]]) -> list[str]:
        """The next turns of several conversations, which share the device; each with the strings that end its turn."""
        max_length = self._session.model.max_position_embeddings - self._limit
        prompts = [(self._prompt(messages, max_length), stops) for messages, stops in asked]
        return self._answer(json.loads(from_primary(json.dumps(prompts))))

    def follow(self) -> None:
        """On the other hosts: computes what the primary, which alone has environments, asks for, until its `end`."""
        while prompts := json.loads(from_primary("")):
            self._answer(prompts)

    def end(self) -> None:
        """Ends `follow` on the other hosts."""
        from_primary("[]")

    def _answer(self, prompts: list[tuple[list[int], list[str]]]) -> list[str]:
        max_length = self._session.model.max_position_embeddings
        stop_tokens = stop_ids(self._session.need_tokenizer())
        requests = make_requests([ids for ids, _ in prompts], self._limit, stop_tokens, None, None)
        length = max(request.length for request in requests)
        # Conversations grow with every turn: few different lengths of rows are few programs to compile.
        if self._engine is None or length > self._length:
            self._length = min(max_length, 1 << (length - 1).bit_length())
            self._engine = make_engine(self._session, requests, self._batch_tokens, self._length)
        else:
            for request in requests:
                self._engine.submit(request)
        answers = [""] * len(requests)
        for stops in dict.fromkeys(tuple(stops) for _, stops in prompts):
            indices = [index for index, prompt in enumerate(prompts) if tuple(prompt[1]) == stops]
            completions = finish(self._session, self._engine, [requests[index] for index in indices], stops)
            for index, completion in zip(indices, completions, strict=True):
                answers[index] = completion.text.strip()
        return answers

    def _prompt(self, messages: Sequence[Message], max_length: int) -> list[int]:
        """Ids of the conversation, shortened to at most `max_length`."""
        if not supports_tool_role(self._session.need_tokenizer()):
            messages = _without_tools(messages)
        while True:
            ids = encode_chat(self._session.need_tokenizer(), messages, add_generation_prompt=True)[0]
            if len(ids) <= max_length or not (shorter := shorten_conversation(messages)):
                return ids[-max_length:]
            messages = shorter


def shorten_conversation(messages: Sequence[Message]) -> list[Message]:
    """The messages without the oldest turn after the task, or with half of the longest text; [] if it is short."""
    start = 2 if messages[0]["role"] == "system" else 1
    if len(messages) > start + 2:
        return [*messages[:start], *messages[start + 2 :]]  # drops the first answer and its observation
    texts = [message for message in messages if isinstance(message["content"], str)]
    longest = max(texts, key=lambda message: len(message["content"]))
    text, quarter = longest["content"], len(longest["content"]) // 4
    shorter = {**longest, "content": f"{text[:quarter]}\n[...]\n{text[-quarter:]}"}
    return [shorter if message is longest else message for message in messages] if quarter > 5 else []


@functools.lru_cache(maxsize=1)
def supports_tool_role(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes turns of the role `tool`."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "tool")]
    try:
        encode_chat(tokenizer, turns, add_generation_prompt=True)
    except UserError:
        return False
    return True


def _without_tools(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "role": "user"} if message["role"] == "tool" else message for message in messages]


def endpoint_agent(
    base_url: str, model: str, *, max_new_tokens: int = 512, stops: Sequence[str] = ()
) -> Agent:
    """A model behind an OpenAI-compatible endpoint, greedy; its key comes from OPENAI_API_KEY.

    A conversation that the endpoint refuses after the first turn, e.g. because it is too long, is shortened.

    Raises:
      UserError: the client is not installed; at a turn, the endpoint refuses or cannot be reached.
    """
    try:
        from openai import APIStatusError, OpenAI, OpenAIError
    except ImportError as error:
        raise UserError("an endpoint needs the client: pip install openai") from error
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def answer(messages: Sequence[Message], stops: Sequence[str] = stops) -> str:
        turns: list[Any] = _without_tools(messages)  # OpenAI accepts tool turns only after its own tool calls
        options: dict[str, Any] = {"stop": list(stops[:4])} if stops else {}  # OpenAI takes four
        reply: Any = None
        try:
            reply = client.chat.completions.create(
                model=model, messages=turns, max_tokens=max_new_tokens, temperature=0.0, **options
            )
            # A lone surrogate could not be sent back in the next turn.
            text = (reply.choices[0].message.content or "").encode(errors="replace").decode()
        except OpenAIError as error:
            refused = isinstance(error, APIStatusError) and error.status_code in (400, 413, 422)
            if refused and len(messages) > 1 and (shorter := shorten_conversation(messages)):
                return answer(shorter, stops)
            raise UserError(f"the endpoint {base_url}, model {model!r}: {error}") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # as of a web page, or no JSON
            text = f"the endpoint {base_url}, model {model!r}, sent no answer: {reply or error!s:.500}"
            raise UserError(text) from error
        return before_stops(text, stops).strip()

    return answer


_MINT_KINDS = {"mint": [], **{f"mint-{name}": [name] for name in mint.SETS}}  # sets; []: all
KINDS = ("python", "sql", "bash", "tools", "intercode-sql", "intercode-bash", *_MINT_KINDS)
TASKSET = "verifiers:"  # before the name of one of the `verifiers` library


def check_kinds(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not in `KINDS`, nor verifiers:TASKSET."""
    for name in names:
        if name not in KINDS and not name.startswith(TASKSET):
            raise UserError(
                f"unknown environment {name!r}: there are {', '.join(KINDS)} and verifiers:TASKSET, and for"
                " config.rl.environment lamp and calculator"
            )


def open_environments(
    names: Sequence[str],
    limit: int | None = None,
    data: str = ".",
    stack: contextlib.ExitStack | None = None,
    expert: Agent | None = None,
    python: str = sys.executable,
    skip: int = 0,
) -> list[Environment]:
    """Environments by kind.

    Args:
      names: of `KINDS`, or verifiers:TASKSET.
      limit: of each kind.
      data: MINT's or InterCode's.
      stack: closes database servers and tasksets; None: they are closed when this process ends.
      expert: gives feedback in MINT.
      python: the interpreter that runs MINT's cells.
      skip: the first tasks of each kind that are left out.

    Raises:
      UserError: another kind, `skip` leaves no task of a kind, or data or a library is missing.
    """
    servers = stack or contextlib.ExitStack()
    makers: dict[str, Callable[[], Sequence[Environment]]] = {
        "python": lambda: [PythonEnvironment(problem) for problem in humaneval()],
        "sql": environments.sql_environments,
        "bash": environments.bash_environments,
        "tools": tools.tool_environments,
        "intercode-sql": lambda: intercode.open_sql(data, servers),
        "intercode-bash": lambda: intercode_bash.open_bash(data),
    }
    for name, sets in _MINT_KINDS.items():
        makers[name] = functools.partial(open_mint, data, sets, expert=expert, python=python)
    check_kinds(names)
    for name in names:
        if name.startswith(TASKSET):
            from lemur_jax.agents.tasksets import taskset_environments

            number = None if limit is None else skip + limit  # it may have more than can be listed
            taskset = name.removeprefix(TASKSET)
            makers[name] = functools.partial(taskset_environments, taskset, number, servers)
    by_id: dict[str, Environment] = {}  # a set of MINT may be named twice
    for name in names:
        for kind, tasks in by_kind(makers[name]()).items():
            if skip and skip >= len(tasks):
                raise UserError(f"{kind} has {len(tasks)} tasks, and all are skipped: --skip is {skip}")
            by_id |= {task.id: task for task in tasks[skip:][:limit]}
    if stack is None:
        atexit.register(servers.close)  # now, to run before the servers' directories are removed
    return list(by_id.values())


def by_kind(traces: Iterable[Any]) -> dict[str, list[Any]]:
    """Traces, or environments, by kind of environment."""
    kinds = collections.defaultdict(list)
    for trace in traces:
        kinds[trace.id.partition("/")[0]].append(trace)
    return kinds


def success_by_turn(traces: Sequence[Trace], max_turns: int) -> list[float]:
    """Percent solved within 1, 2, ... turns."""
    return [
        100 * sum((trace.solved_at or max_turns + 1) <= turn for trace in traces) / max(1, len(traces))
        for turn in range(1, max_turns + 1)
    ]


def paper_scores(traces: Iterable[Trace]) -> dict[str, float]:
    """Percent solved, by the row of the paper's Tables 4 to 7; runs with feedback have separate rows (Table 6)."""
    rows = {f"mint-{name}": f"M-{title}" for name, title in mint.SETS.items()}
    rows |= {"intercode-sql": "IC-SQL", "intercode-bash": "IC-Bash"}
    scores = {}
    for kind, group in by_kind(traces).items():
        if kind in rows:
            observations = [turn.step.observation for trace in group for turn in trace.turns]
            feedback = ", feedback" if any(mint.FEEDBACK in text for text in observations) else ""
            solved = sum(trace.solved_at is not None for trace in group)
            scores[rows[kind] + feedback] = 100 * solved / len(group)
    return scores


def failure(trace: Trace) -> str | None:
    """Why an episode failed: "repeated itself" in the last two turns, else the last verdict (docs/evaluation.md)."""
    if trace.solved_at is not None:
        return None
    if len(trace.turns) > 1 and trace.turns[-1].action == trace.turns[-2].action:
        return "repeated itself"
    return trace.turns[-1].step.verdict if trace.turns else "no answer"


def format_episodes(traces: Sequence[Trace], max_turns: int) -> str:
    """Success by turn for each kind of environment, and the failures."""
    kinds = by_kind(traces)
    header = "".join(f"{f'turn {turn}':>9}" for turn in range(1, max_turns + 1))
    lines = [f"{'solved, %':<14}{'episodes':>9}{header}"]
    for kind, group in kinds.items():
        rates = "".join(f"{rate:9.1f}" for rate in success_by_turn(group, max_turns))
        lines.append(f"{kind:<14}{len(group):>9}{rates}")
    for kind, group in kinds.items():
        counts = collections.Counter(filter(None, map(failure, group))).most_common()
        if counts:
            lines.append(f"{kind} failures: " + ", ".join(f"{name} {count}" for name, count in counts))
    return "\n".join(lines)


def to_json(traces: Sequence[Trace], max_turns: int) -> dict[str, Any]:
    """All traces in full, as JSON values."""
    records = [
        dataclasses.asdict(trace) | {"solved_at": trace.solved_at, "failure": failure(trace)}
        for trace in traces
    ]
    return {"max_turns": max_turns, "traces": records}


def from_json(trace: Mapping[str, Any]) -> Trace:
    """A trace from one item of `to_json`."""
    turns = tuple(Turn(action=turn["action"], step=Step(**turn["step"])) for turn in trace["turns"])
    return Trace(id=trace["id"], task=trace["task"], turns=turns)


def conversations(traces: Iterable[Trace]) -> list[dict[str, Any]]:
    """The solved episodes for fine-tuning, which learns the agent's turns alone."""
    examples = []
    for trace in traces:
        if trace.solved_at:
            messages: list[Message] = [{"role": "user", "content": trace.task}]
            for turn in trace.turns:
                messages.append({"role": "assistant", "content": turn.action})
                messages.append({"role": turn.step.role, "content": turn.step.observation})
            examples.append({"id": trace.id, "messages": messages[:-1]})
    return examples
