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
from lemur_jax.infer.batching import row_ways
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
    """Our model in process, greedy; a conversation that no longer fits is `shortened`.

    Args:
      batch_tokens: of the cache that conversations share, for each way in which the mesh shards rows.
    """

    def __init__(self, session: Session, *, max_new_tokens: int = 512, batch_tokens: int = SLOTS):
        self._session = session
        self._limit = min(max_new_tokens, session.model.max_position_embeddings // 2)
        self._batch_tokens = batch_tokens
        self._engine: Engine | None = None
        self._length = 0

    @property
    def default_batch(self) -> int:
        """How many conversations of 2,048 tokens have a row each, in which every turn reads only what is new."""
        length = min(2048, self._session.model.max_position_embeddings)
        return row_ways(self._session) * max(1, min(ROWS, self._batch_tokens // length))

    def batch(self, asked: Sequence[tuple[Sequence[Message], Sequence[str]]]) -> list[str]:
        """The next turns of several conversations, which share the device; each with the strings that end its turn."""
        room = self._session.model.max_position_embeddings - self._limit
        prompts = [(self._prompt(messages, room), stops) for messages, stops in asked]
        return self._answer(json.loads(from_primary(json.dumps(prompts))))

    def follow(self) -> None:
        """On hosts other than the primary, which alone has environments: computes what it asks for until its `end`."""
        while prompts := json.loads(from_primary("")):
            self._answer(prompts)

    def end(self) -> None:
        """Lets the other hosts go."""
        from_primary("[]")

    def _answer(self, prompts: list[tuple[list[int], list[str]]]) -> list[str]:
        longest = self._session.model.max_position_embeddings
        ends = stop_ids(self._session.need_tokenizer())
        requests = make_requests([ids for ids, _ in prompts], self._limit, ends, None, None)
        wanted = max(request.length for request in requests)
        # Conversations grow with every turn: rows of few lengths are few programs to compile.
        if self._engine is None or wanted > self._length:
            self._length = min(longest, 1 << (wanted - 1).bit_length())
            self._engine = make_engine(self._session, requests, self._batch_tokens, self._length)
        else:
            for request in requests:
                self._engine.submit(request)
        answers = [""] * len(requests)
        for stops in dict.fromkeys(tuple(stops) for _, stops in prompts):
            members = [index for index, one in enumerate(prompts) if tuple(one[1]) == stops]
            texts = finish(self._session, self._engine, [requests[index] for index in members], stops)
            for index, text in zip(members, texts, strict=True):
                answers[index] = text.text.strip()
        return answers

    def _prompt(self, messages: Sequence[Message], room: int) -> list[int]:
        """Ids of the conversation, shortened to at most `room`."""
        if not takes_tools(self._session.need_tokenizer()):
            messages = _without_tools(messages)
        while True:
            ids = encode_chat(self._session.need_tokenizer(), messages, add_generation_prompt=True)[0]
            if len(ids) <= room or not (shorter := shortened(messages)):
                return ids[-room:]
            messages = shorter


def shortened(messages: Sequence[Message]) -> list[Message]:
    """Without the oldest turn after the task, or else with half of the longest text; [] if that is short."""
    if len(messages) > 3:
        return [messages[0], *messages[3:]]  # without an answer, and the observation after it
    found = list(messages)
    longest = max(range(len(found)), key=lambda index: len(found[index]["content"]))
    text, part = found[longest]["content"], len(found[longest]["content"]) // 4
    found[longest] = {**found[longest], "content": f"{text[:part]}\n[...]\n{text[-part:]}"}
    return found if part > 5 else []


@functools.lru_cache(maxsize=1)
def takes_tools(tokenizer: Tokenizer) -> bool:
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

    A conversation that the endpoint refuses after the first turn, as it does where one is too long, is `shortened`.

    Raises:
      UserError: the client is not installed; at a turn, the endpoint refuses or cannot be reached.
    """
    try:
        from openai import APIStatusError, OpenAI, OpenAIError
    except ImportError as error:
        raise UserError("an endpoint needs the client: pip install openai") from error
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def answer(messages: Sequence[Message], stops: Sequence[str] = stops) -> str:
        turns: list[Any] = _without_tools(messages)  # OpenAI accepts them only after a call of its own form
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
            if refused and len(messages) > 1 and (shorter := shortened(messages)):
                return answer(shorter, stops)
            raise UserError(f"the endpoint {base_url}, model {model!r}: {error}") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # as of a web page, or no JSON
            text = f"the endpoint {base_url}, model {model!r}, sent no answer: {reply or error!s:.500}"
            raise UserError(text) from error
        return before_stops(text, stops).strip()

    return answer


_MINT_KINDS = {"mint": [], **{f"mint-{name}": [name] for name in mint.SETS}}  # sets; []: all
KINDS = ("python", "sql", "bash", "tools", "intercode-sql", "intercode-bash", *_MINT_KINDS)


def check_kinds(names: Sequence[str]) -> None:
    """UserError: another name than those of `KINDS`."""
    for name in names:
        if name not in KINDS:
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
      names: of `KINDS`.
      limit: of each kind.
      data: MINT's or InterCode's.
      stack: keeps InterCode's database server; None: until this process ends.
      expert: gives feedback in MINT.
      python: the interpreter that runs MINT's cells.
      skip: tasks of each kind that are left out in front.

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
    for name, only in _MINT_KINDS.items():
        makers[name] = functools.partial(open_mint, data, only, expert=expert, python=python)
    check_kinds(names)
    found: dict[str, Environment] = {}  # a set of MINT may be named twice
    for name in names:
        for kind, tasks in by_kind(makers[name]()).items():
            if skip and skip >= len(tasks):
                raise UserError(f"{kind} has {len(tasks)} tasks, and all are skipped: --skip is {skip}")
            found |= {task.id: task for task in tasks[skip:][:limit]}
    if stack is None:
        atexit.register(servers.close)  # now, so that it comes before the removal of the servers' directories
    return list(found.values())


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
    """Percent solved, by the row of the paper's Tables 4 to 7; runs with feedback have rows of their own (Table 6)."""
    rows = {f"mint-{name}": f"M-{title}" for name, title in mint.SETS.items()}
    rows |= {"intercode-sql": "IC-SQL", "intercode-bash": "IC-Bash"}
    found = {}
    for kind, of_kind in by_kind(traces).items():
        if kind in rows:
            seen = [turn.step.observation for trace in of_kind for turn in trace.turns]
            feedback = ", feedback" if any(mint.FEEDBACK in text for text in seen) else ""
            solved = sum(trace.solved_at is not None for trace in of_kind)
            found[rows[kind] + feedback] = 100 * solved / len(of_kind)
    return found


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
    for kind, of_kind in kinds.items():
        rates = "".join(f"{rate:9.1f}" for rate in success_by_turn(of_kind, max_turns))
        lines.append(f"{kind:<14}{len(of_kind):>9}{rates}")
    for kind, of_kind in kinds.items():
        counts = collections.Counter(filter(None, map(failure, of_kind))).most_common()
        if counts:
            lines.append(f"{kind} failures: " + ", ".join(f"{name} {count}" for name, count in counts))
    return "\n".join(lines)


def to_json(traces: Sequence[Trace], max_turns: int) -> dict[str, Any]:
    """Every trace whole, as JSON takes it."""
    whole = [
        dataclasses.asdict(trace) | {"solved_at": trace.solved_at, "failure": failure(trace)}
        for trace in traces
    ]
    return {"max_turns": max_turns, "traces": whole}


def from_json(trace: Mapping[str, Any]) -> Trace:
    """A trace of `to_json`."""
    turns = tuple(Turn(action=turn["action"], step=Step(**turn["step"])) for turn in trace["turns"])
    return Trace(id=trace["id"], task=trace["task"], turns=turns)


def conversations(traces: Iterable[Trace]) -> list[dict[str, Any]]:
    """The solved episodes for fine-tuning, which learns the agent's turns alone."""
    found = []
    for trace in traces:
        if trace.solved_at:
            messages: list[Message] = [{"role": "user", "content": trace.task}]
            for turn in trace.turns:
                messages.append({"role": "assistant", "content": turn.action})
                messages.append({"role": turn.step.role, "content": turn.step.observation})
            found.append({"id": trace.id, "messages": messages[:-1]})
    return found
