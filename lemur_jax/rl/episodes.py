"""Episodes of a policy in environments: turns, what the environment answers, and how an episode ends."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

from lemur_jax.agents.environments import Environment, Step
from lemur_jax.agents.episodes import supports_tool_role
from lemur_jax.agents.runner import call_all
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.infer.complete import with_text
from lemur_jax.infer.engine import Engine, Request
from lemur_jax.infer.generate import Completion
from lemur_jax.infer.sampling import Sampling
from lemur_jax.rl.config import RlConfig
from lemur_jax.text.chat_template import Message, encode_chat, stop_ids
from lemur_jax.text.tokenizer import Tokenizer

MAX_CONCURRENT_CALLS = 8  # of environments


@dataclasses.dataclass(kw_only=True, eq=False)
class Episode:
    """One attempt at a task.

    Attributes:
      environment: its own copy.
      seed: of sampling, together with the index of the turn.
      ids: all tokens so far, those of the environment included.
      logprobs: while sampling, of each id; NaN where the environment wrote it.
      turns: for each id the turn in which the policy wrote it; -1: the environment did.
      rewards: of each turn.
      solved: whether the last turn solved the task.
      end: "" while it runs; "done", "turns" (used up), "cut" (no room is left, for the last turn or another one),
        "long" (the task leaves no room for an answer) or "failed".
      error: of the environment.
    """

    environment: Environment
    seed: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    turns: list[int] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    solved: bool = False
    end: str = ""
    error: str = ""

    @property
    def valid(self) -> bool:
        return self.end not in ("failed", "long")

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        by_policy = logprobs is not None
        self.ids += ids
        self.logprobs += logprobs if logprobs is not None else [math.nan] * len(ids)
        self.turns += [len(self.rewards) if by_policy else -1] * len(ids)


class Player:
    """Plays episodes with an engine.

    Args:
      options: `config.rl`.
      slots: most tokens of an episode.
    """

    def __init__(self, options: RlConfig, tokenizer: Tokenizer, slots: int):
        self._options, self._tokenizer, self._slots = options, tokenizer, slots
        self._stops = stop_ids(tokenizer)

    def play(self, engine: Engine, episodes: Sequence[Episode], sampling: Sampling) -> None:
        """Plays all episodes to their end. Turns that end at one step of the engine go to their environments together,
        so that sampling does not depend on timing."""
        seconds = self._options.environment_seconds
        tasks = call_all([episode.environment.reset for episode in episodes], seconds, MAX_CONCURRENT_CALLS)
        for episode, task in zip(episodes, tasks, strict=True):
            if isinstance(task, str):
                episode.add(self._encode({"role": "user", "content": task}))
            else:
                episode.end, episode.error = "failed", _reason(task, episode)
        playing = {
            id(request): (request, one) for one in episodes if (request := self._ask(engine, one, sampling))
        }
        while playing:
            ended = []
            for request in engine.step():
                _, episode = playing[id(request)]
                if not (request.finish_reason or episode.environment.stops):
                    continue
                turn = with_text(engine.session, request, episode.environment.stops)
                if turn.finish_reason:
                    engine.cancel(request)  # after a stop string it would go on
                    del playing[id(request)]
                    episode.add(turn.tokens, turn.logprobs)
                    ended.append((episode, turn))
            calls = [
                functools.partial(episode.environment.step, turn.text.strip()) for episode, turn in ended
            ]
            results = call_all(calls, seconds, MAX_CONCURRENT_CALLS)
            for (episode, turn), result in zip(ended, results, strict=True):
                self._observe(episode, result, turn)
                if next_request := self._ask(engine, episode, sampling):
                    playing[id(next_request)] = (next_request, episode)
        call_all([episode.environment.close for episode in episodes], seconds, MAX_CONCURRENT_CALLS)

    def _ask(self, engine: Engine, episode: Episode, sampling: Sampling) -> Request | None:
        """The policy's next turn; None if the episode has ended, or ends because there is no space for a token."""
        space = self._slots - len(episode.ids)
        if not episode.end and space < 1:
            episode.end = "cut" if episode.rewards else "long"
        if episode.end:
            return None
        return engine.submit(
            Request(
                prompt=list(episode.ids),
                max_new_tokens=min(space, self._options.max_new_tokens),
                stop_ids=self._stops,
                sampling=sampling,
                seed=seed_of(episode.seed, len(episode.rewards)),
            )
        )

    def _observe(self, episode: Episode, result: Any, turn: Completion) -> None:
        """Takes the environment's answer to a turn."""
        try:
            if not isinstance(result, Step):
                raise result
            reward = float(result.reward)
            if not math.isfinite(reward):
                raise ValueError(f"the reward is {result.reward}")
        except Exception as error:
            episode.end, episode.error = "failed", _reason(error, episode)
            return
        episode.solved = reward >= 1
        earlier = sum(episode.rewards) if episode.environment.cumulative_rewards else 0.0
        episode.rewards.append(reward - earlier)
        if turn.finish_reason == "length" and len(episode.ids) == self._slots:
            episode.end = "cut"
        elif result.done or episode.solved:
            episode.end = "done"
        elif len(episode.rewards) >= (episode.environment.max_turns or self._options.max_turns):
            episode.end = "turns"
        else:
            ids = self._following(result, ended=turn.stop_id)
            if len(episode.ids) + len(ids) < self._slots:
                episode.add(ids)
            else:
                episode.end = "cut"

    def _encode(self, *messages: Message) -> list[int]:
        return encode_chat(self._tokenizer, messages, add_generation_prompt=True)[0]

    def _following(self, step: Step, ended: bool) -> list[int]:
        """Ids of the template between two turns of the policy, with the end of the first unless that has `ended`."""
        role = step.role if step.role != "tool" or supports_tool_role(self._tokenizer) else "user"
        task, turn = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        opening = self._encode(task)
        ids = self._encode(task, turn, {"role": role, "content": step.observation})
        # A generation prompt may open a thought (`<think>`), which templates leave out of earlier answers.
        pairs = enumerate(zip(opening, ids, strict=False))
        start = next((index for index, (a, b) in pairs if a != b), len(opening))
        for index in range(start, len(ids)):
            if ids[index] in self._stops:
                return ids[index + ended :]
        raise UserError("the chat template ends the assistant's turn with no token that stops generation")


def _reason(error: Any, episode: Episode) -> str:
    text = reason_of(error) if isinstance(error, BaseException) else f"it returned {error!r:.80}"
    return f"{episode.environment.id}: {text}"


def seed_of(*numbers: int) -> int:
    """32 bits that depend on the numbers alone."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
