"""Many episodes at once: the agent answers in batches, environments step in threads, finished episodes are saved."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lemur_jax.agents.environments import Environment, NotScored, before_stops
from lemur_jax.agents.episodes import Agent, SessionAgent, Trace, Turn, from_json
from lemur_jax.common.cores import available_cores
from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import Message

logger = logging.getLogger(__name__)


class Running:
    """An unfinished episode: the `messages` that the agent reads, and the `reward` of the last turn."""

    def __init__(self, environment: Environment, max_turns: int):
        self.environment = environment
        self._left = environment.max_turns or max_turns
        self._task = environment.reset()
        self._turns: list[Turn] = []
        self.reward = 0.0
        self._messages: list[Message] = [{"role": "user", "content": self._task}]

    @property
    def messages(self) -> Sequence[Message]:
        return self.environment.conversation or self._messages

    def act(self, action: str) -> Trace | None:
        """Takes a turn; returns the trace when it was the last."""
        action = before_stops(action, self.environment.stops)
        try:
            step = self.environment.step(action)
        except NotScored:
            self.environment.close()
            raise
        self.reward = step.reward
        self._turns.append(Turn(action=action, step=step))
        self._messages += [
            {"role": "assistant", "content": self.environment.as_turn(action)},
            {"role": step.role, "content": step.observation},
        ]
        if step.reward < 1 and not step.done and len(self._turns) < self._left:
            return None
        self.environment.close()
        return Trace(id=self.environment.id, task=self._task, turns=tuple(self._turns))


class Journal:
    """Finished episodes in a file of JSON lines, so that a killed evaluation can continue.

    Args:
      path: None keeps nothing.
      run: what the episodes depend on, e.g. the agent and its limits; the file of another run is refused.

    Raises:
      UserError: the file is of another run, is written by another process, or is no journal.
    """

    def __init__(self, path: pathlib.Path | None, run: Mapping[str, Any]):
        self._path = path
        self.traces: dict[str, Trace] = {}
        self._head = json.dumps(run) + "\n"
        if path is None:
            return
        self._file = path.open("a+b")
        with contextlib.ExitStack() as failed:
            failed.callback(self._file.close)
            self._read(path, run)
            failed.pop_all()

    def _read(self, path: pathlib.Path, run: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run writes {path}: wait for its end, or name another --json") from error
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            header, *episodes = map(json.loads, complete.splitlines() or [b"null"])
            self.traces = {trace.id: trace for trace in map(from_json, episodes)}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a journal ({error!r}): name another --json") from error
        if complete and header != run:
            raise UserError(f"{path} holds episodes of {header}, not {run}: remove it or name another --json")
        self._file.truncate(len(complete))  # the last line may be cut off
        if complete:
            self._head = ""
        if self.traces:
            logger.info("%d episodes are done already (%s)", len(self.traces), path)

    def add(self, trace: Trace) -> None:
        """Saves a finished episode; returns when it is in the file."""
        self.traces[trace.id] = trace
        if self._path is not None:
            self._file.write(f"{self._head}{json.dumps(dataclasses.asdict(trace))}\n".encode())
            self._file.flush()
            self._head = ""

    def close(self) -> None:
        """Lets another run use the file; removes it if it has no episode."""
        if self._path is not None:
            if not self.traces:
                self._path.unlink()
            self._file.close()


def run_episodes(
    environments: Sequence[Environment],
    agent: Agent | SessionAgent,
    *,
    max_turns: int,
    batch: int = 32,
    journal: Journal | None = None,
) -> list[Trace]:
    """Runs the episodes that the journal does not have; an error is raised after the turns of the other episodes.

    Tasks that cannot run here are named in a warning; they have no trace. UserError if there is no other.
    """
    journal = journal or Journal(None, {})
    ids = [environment.id for environment in environments]
    traces = {id: journal.traces[id] for id in ids if id in journal.traces}
    waiting = [environment for environment in environments if environment.id not in traces]
    running: list[Running] = []
    logger.info("episodes: %d of %d, up to %d at once", len(traces), len(ids), batch)
    turns = skipped = 0
    semaphore = threading.Semaphore(max(4, available_cores()))  # more sandboxes at once would time out

    def gated(function: Callable[..., Any], *arguments: Any) -> Any:
        with semaphore:
            return function(*arguments)

    try:
        while waiting or running:
            while waiting and len(running) < batch:
                fresh = [waiting.pop(0) for _ in range(min(len(waiting), batch - len(running)))]
                started = call_all([functools.partial(gated, Running, one, max_turns) for one in fresh])
                running += [one for one in started if isinstance(one, Running)]
                skipped += _count_not_scored(started)
            if not running:
                break
            prompts = [(one.messages, one.environment.stops) for one in running]
            if isinstance(agent, SessionAgent):
                answers: list[Any] = agent.batch(prompts)
            else:  # requests to an endpoint run concurrently
                answers = call_all([functools.partial(agent, *one) for one in prompts])
            answered = [pair for pair in zip(running, answers, strict=True) if isinstance(pair[1], str)]
            outcomes = call_all([functools.partial(gated, one.act, answer) for one, answer in answered])
            for (episode, _), outcome in zip(answered, outcomes, strict=True):
                if isinstance(outcome, Trace | NotScored):
                    running.remove(episode)
                if isinstance(outcome, Trace):
                    journal.add(outcome)
                    traces[outcome.id] = outcome
            skipped += _count_not_scored([*answers, *outcomes])
            turns += len(answered)
            solved = sum(trace.solved_at is not None for trace in traces.values())
            done = f"{len(traces)} of {len(ids) - skipped}"
            logger.info("episodes: %s, solved %d; turns: %d, running %d", done, solved, turns, len(running))
    finally:
        for episode in running:
            episode.environment.close()
    if skipped:
        logger.warning("not scored: %d of %d tasks", skipped, len(ids))
        if not traces:
            raise UserError("no task can be scored here: the warnings above say why")
    return [traces[id] for id in ids if id in traces]


def _count_not_scored(results: Sequence[Any]) -> int:
    """Names the tasks that are not scored, and counts them; any other exception is raised."""
    skipped = [result for result in results if isinstance(result, NotScored)]
    for error in skipped:
        logger.warning("not scored: %s", error)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, NotScored):
            raise result
    return len(skipped)


def call_all(
    functions: Sequence[Callable[[], Any]], seconds: float = threading.TIMEOUT_MAX, at_once: int = 1 << 20
) -> list[Any]:
    """The results or exceptions of the calls; one that hangs stays in its daemon thread, also after Ctrl-C."""
    results: list[Any] = [TimeoutError(f"no answer after {seconds:g} s") for _ in functions]

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:  # also SystemExit of an environment
            results[index] = error

    for start in range(0, len(functions), at_once):
        indices = range(start, min(start + at_once, len(functions)))
        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in indices]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    return list(results)
