"""Many episodes at once: the agent answers in batches, environments step in threads, finished episodes are saved."""

import dataclasses
import functools
import json
import logging
import os
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
    """An episode that goes on: the `messages` so far, and the `reward` of the last turn."""

    def __init__(self, environment: Environment, max_turns: int):
        self.environment = environment
        self._left = environment.max_turns or max_turns
        self._task = environment.reset()
        self._turns: list[Turn] = []
        self.reward = 0.0
        self.messages: list[Message] = [{"role": "user", "content": self._task}]

    def act(self, action: str) -> Trace | None:
        """Takes a turn; returns the trace when it was the last."""
        action = before_stops(action, self.environment.stops)
        step = self.environment.step(action)
        self.reward = step.reward
        self._turns.append(Turn(action=action, step=step))
        self.messages += [
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
      UserError: the file is of another run, or no journal.
    """

    def __init__(self, path: pathlib.Path | None, run: Mapping[str, Any]):
        self._path = path
        self.traces: dict[str, Trace] = {}
        # Written with the first episode, so that a run that fails before it leaves no file.
        self._head = json.dumps(run) + "\n"
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        try:
            header, *episodes = map(json.loads, complete.splitlines() or [b"null"])
            self.traces = {trace.id: trace for trace in map(from_json, episodes)}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a journal ({error!r}): name another --json") from error
        if complete and header != run:
            raise UserError(f"{path} holds episodes of {header}, not {run}: remove it or name another --json")
        if complete != content:  # the last line was cut off
            os.truncate(path, len(complete))
        if complete:
            self._head = ""
        if self.traces:
            logger.info("%d episodes are done already (%s)", len(self.traces), path)

    def add(self, trace: Trace) -> None:
        """Saves a finished episode; returns when it is in the file."""
        self.traces[trace.id] = trace
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{self._head}{json.dumps(dataclasses.asdict(trace))}\n")
                self._head = ""


def run_episodes(
    environments: Sequence[Environment],
    agent: Agent | SessionAgent,
    *,
    max_turns: int,
    batch: int = 32,
    journal: Journal | None = None,
) -> list[Trace]:
    """Runs the episodes that the journal does not have; an error is raised after the turns of the other episodes.

    Tasks that cannot run here are named in a warning; they have no trace.
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
                for error in (one for one in started if isinstance(one, NotScored)):
                    logger.warning("not scored: %s", error)
                    skipped += 1
                _raise_first([one for one in started if not isinstance(one, NotScored)])
            if not running:
                break
            prompts = [(one.messages, one.environment.stops) for one in running]
            if isinstance(agent, SessionAgent):
                answers: list[Any] = agent.batch(prompts)
            else:  # requests to an endpoint run concurrently
                answers = call_all([functools.partial(agent, *one) for one in prompts])
            answered = [pair for pair in zip(running, answers, strict=True) if isinstance(pair[1], str)]
            outcomes = call_all([functools.partial(gated, one.act, answer) for one, answer in answered])
            for (episode, _), trace in zip(answered, outcomes, strict=True):
                if isinstance(trace, Trace):
                    running.remove(episode)
                    journal.add(trace)
                    traces[trace.id] = trace
            _raise_first([*answers, *outcomes])
            turns += len(answered)
            solved = sum(trace.solved_at is not None for trace in traces.values())
            done = f"{len(traces)} of {len(ids) - skipped}"
            logger.info("episodes: %s, solved %d; turns: %d, running %d", done, solved, turns, len(running))
    finally:
        for episode in running:
            episode.environment.close()
    if skipped:
        logger.warning("not scored: %d of %d tasks", skipped, len(ids))
    return [traces[id] for id in ids if id in traces]


def _raise_first(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


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
