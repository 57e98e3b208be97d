"""Episodes of a policy in environments: turns, what the environment answers, and how an episode ends."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

from lemur_jax.agents.environments import Environment, Step
from lemur_jax.agents.episodes import takes_tools
from lemur_jax.agents.runner import call_all
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.infer.complete import with_text
from lemur_jax.infer.engine import Engine, Request
from lemur_jax.infer.generate import Completion
from lemur_jax.infer.sampling import Sampling
from lemur_jax.rl.config import RlConfig
from lemur_jax.text.chat_template import Message, encode_chat, stop_ids
from lemur_jax.text.tokenizer import Tokenizer

AT_ONCE = 8  # calls of environments


@dataclasses.dataclass(kw_only=True, eq=False)
class Episode:
    """One attempt at a task.

    Attributes:
      environment: its own copy.
      seed: of what is drawn, with the number of the turn.
      ids: all tokens so far, those of the environment included.
      logprobs: while sampling, of each id; NaN where the environment wrote it.
      turns: for each id the turn in which the policy wrote it; -1: the environment did.
      rewards: of each turn.
      solved: whether the last turn solved the task.
      end: "" while it goes on; "done", "turns" (used up), "cut" (no room is left, for the last turn or another one),
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
        own = logprobs is not None
        self.ids += ids
        self.logprobs += logprobs if logprobs is not None else [math.nan] * len(ids)
        self.turns += [len(self.rewards) if own else -1] * len(ids)


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
        so that what is sampled when does not depend on clocks."""
        seconds = self._options.environment_seconds
        tasks = call_all([one.environment.reset for one in episodes], seconds, AT_ONCE)
        for one, task in zip(episodes, tasks, strict=True):
            if isinstance(task, str):
                one.add(self._encode({"role": "user", "content": task}))
            else:
                one.end, one.error = "failed", _reason(task, one)
        playing = {
            id(request): (request, one) for one in episodes if (request := self._ask(engine, one, sampling))
        }
        while playing:
            ended = []
            for request in engine.step():
                _, one = playing[id(request)]
                if not (request.finish_reason or one.environment.stops):
                    continue
                turn = with_text(engine.session, request, one.environment.stops)
                if turn.finish_reason:
                    engine.cancel(request)  # after a stop string it would go on
                    del playing[id(request)]
                    one.add(turn.tokens, turn.logprobs)
                    ended.append((one, turn))
            calls = [functools.partial(one.environment.step, turn.text.strip()) for one, turn in ended]
            for (one, turn), found in zip(ended, call_all(calls, seconds, AT_ONCE), strict=True):
                self._observe(one, found, turn)
                if following := self._ask(engine, one, sampling):
                    playing[id(following)] = (following, one)
        call_all([one.environment.close for one in episodes], seconds, AT_ONCE)

    def _ask(self, engine: Engine, one: Episode, sampling: Sampling) -> Request | None:
        """The policy's next turn; None if the episode has ended, or ends because no token has room."""
        room = self._slots - len(one.ids)
        if not one.end and room < 1:
            one.end = "cut" if one.rewards else "long"
        if one.end:
            return None
        return engine.submit(
            Request(
                prompt=list(one.ids),
                max_new_tokens=min(room, self._options.max_new_tokens),
                stop_ids=self._stops,
                sampling=sampling,
                seed=seed_of(one.seed, len(one.rewards)),
            )
        )

    def _observe(self, one: Episode, found: Any, turn: Completion) -> None:
        """Takes the environment's answer to a turn."""
        try:
            if not isinstance(found, Step):
                raise found
            reward = float(found.reward)
            if not math.isfinite(reward):
                raise ValueError(f"the reward is {found.reward}")
        except Exception as error:
            one.end, one.error = "failed", _reason(error, one)
            return
        one.solved = reward >= 1
        one.rewards.append(reward - sum(one.rewards) if one.environment.cumulative_rewards else reward)
        if turn.finish_reason == "length" and len(one.ids) == self._slots:
            one.end = "cut"
        elif found.done or one.solved:
            one.end = "done"
        elif len(one.rewards) >= (one.environment.max_turns or self._options.max_turns):
            one.end = "turns"
        else:
            more = self._following(found, ended=turn.stop_id)
            if len(one.ids) + len(more) < self._slots:
                one.add(more)
            else:
                one.end = "cut"

    def _encode(self, *messages: Message) -> list[int]:
        return encode_chat(self._tokenizer, messages, add_generation_prompt=True)[0]

    def _following(self, found: Step, ended: bool) -> list[int]:
        """The template's text between two turns of the policy, from what ends a turn on if that has not `ended`."""
        role = found.role if found.role != "tool" or takes_tools(self._tokenizer) else "user"
        task, turn = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        opening = self._encode(task)
        ids = self._encode(task, turn, {"role": role, "content": found.observation})
        # A generation prompt may open a thought (`<think>`), which templates leave out of earlier answers.
        pairs = enumerate(zip(opening, ids, strict=False))
        start = next((index for index, (one, other) in pairs if one != other), len(opening))
        for index in range(start, len(ids)):
            if ids[index] in self._stops:
                return ids[index + ended :]
        raise UserError("the chat template ends the assistant's turn with no token that stops generation")


def _reason(error: Any, one: Episode) -> str:
    said = reason_of(error) if isinstance(error, BaseException) else f"it returned {error!r:.80}"
    return f"{one.environment.id}: {said}"


def seed_of(*numbers: int) -> int:
    """32 bits that depend on the numbers alone."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
