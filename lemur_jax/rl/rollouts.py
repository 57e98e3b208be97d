"""Episodes of a policy in environments, as batches for the update: a function of (parameters, seed, step).

Axis legend: B episode (a row of the batch), T position.
"""

import collections
import copy
import dataclasses
import hashlib
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lemur_jax.agents.environments import Environment, Step
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.infer.engine import Engine, Request
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import make_session
from lemur_jax.parallel.rules import batch_ways
from lemur_jax.rl import games
from lemur_jax.rl.config import RlConfig
from lemur_jax.rl.objective import advantages
from lemur_jax.text.chat_template import encode_chat, stop_ids
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.step import Program

AT_ONCE = 8  # environments that work at the same time
ENGINE_ROWS = 64  # most episodes in decode for each way in which the mesh shards rows


class Name(NamedTuple):
    """The one source of the batches, as metrics name it."""

    name: str


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
      end: "" while it goes on; "done", "turns" (used up), "cut" (no room is left), "long" (the task leaves no room
        for an answer) or "failed".
      error: of the environment.
    """

    environment: Environment
    seed: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    turns: list[int] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    end: str = ""
    error: str = ""

    @property
    def solved(self) -> bool:
        return bool(self.rewards) and self.rewards[-1] >= 1

    @property
    def valid(self) -> bool:
        return self.end not in ("failed", "long")

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        own = logprobs is not None
        self.ids += ids
        self.logprobs += logprobs if logprobs is not None else [math.nan] * len(ids)
        self.turns += [len(self.rewards) if own else -1] * len(ids)


class Rollouts:
    """Plays episodes, and takes the place of the mixture and its loader in the training loop.

    Args:
      options: `config.rl`.
      program: its batch has the number of episodes and their length, its `compute` the dtype of sampling.
      seed: of tasks and sampling.
      steps: updates of the run.

    Raises:
      UserError: there is no such environment, or rows, groups and mesh do not fit together.
    """

    def __init__(self, options: RlConfig, tokenizer: Tokenizer, program: Program, *, seed: int, steps: int):
        if jax.process_count() > 1:
            raise UserError(
                "lemur rl runs on one host: several hosts would have to share what environments answer"
            )
        self.sources = (Name("episodes"),)
        self.batch_rows, self.length = program.batch["tokens"].shape
        if self.batch_rows % options.group_size:
            raise UserError(
                f"config.train.batch_rows {self.batch_rows} must be a multiple of config.rl.group_size"
                f" {options.group_size}"
            )
        self.options, self.seed, self.tokenizer, self.program = options, seed, tokenizer, program
        self._tasks, self._held_out = games.tasks(options.environment, options.data)
        self._stops = stop_ids(tokenizer)
        self._engine: Engine | None = None
        self._names: list[str] = []
        self.last_step = steps

    def digests(self) -> dict[str, str]:
        """Of the data: there is none."""
        return {}

    def documents(self, step: int, rows: Sequence[int]) -> list[str]:
        """The tasks of rows of the last batch."""
        return list(dict.fromkeys(self._names[row] for row in rows))

    def iterate(self, start_step: int, stop_step: int) -> Generator[tuple[int, Any], None, None]:
        """Numbers of steps, twice: `play` makes the batch, which needs the parameters."""
        yield from ((step, step) for step in range(start_step, stop_step))

    def play(self, step: int, params: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The batch of a step, and its figures as metrics of the objective.

        Args:
          params: those of the update, as of `Program.weights`.

        Raises:
          UserError: the environment failed in every episode.
        """
        with jax.transfer_guard("allow"):
            arrays, figures = self._batch(step, params)
        return arrays, {f"objective/{name}": np.float32(value) for name, value in figures.items()}

    def check_gap(self, step: int, metrics: Mapping[str, Any]) -> None:
        """UserError if log-probabilities of the update differ too much from those of sampling."""
        gap, most = float(jax.device_get(metrics["objective/logprob_gap"])), self.options.max_logprob_gap
        if not gap <= most:
            raise UserError(
                f"step {step + 1}: log-probabilities of the update and of sampling differ by {gap:.3g} nats a token,"
                f" more than config.rl.max_logprob_gap {most:g}; the last checkpoint is intact"
            )

    def _batch(self, step: int, params: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        started = time.perf_counter()
        engine = self._with(params)
        figures: dict[str, Any] = {}
        period = self.options.eval_every_steps
        if period and (step % period == 0 or step + 1 == self.last_step):
            held_out = self._held_out[: self.options.eval_tasks]
            played = [Episode(environment=copy.copy(one), seed=0) for one in held_out]
            self._play(engine, played, Sampling())
            figures["held_out_success"] = _mean([one.solved for one in played])
        episodes = self._groups(engine, step)
        self._names = [one.environment.id for one in episodes]
        failed = [one for one in episodes if one.end == "failed"]
        if len(failed) == len(episodes):
            raise UserError(f"step {step + 1}: the environment failed in every episode: {failed[0].error}")
        ends = collections.Counter(one.end for one in episodes)
        scored = self._advantages(episodes, step)
        figures |= {
            "reward": _mean([sum(one.rewards) for one in episodes if one.valid]),
            "success": _mean([one.solved for one in episodes if one.valid]),
            "turns": _mean([len(one.rewards) for one in episodes if one.valid]),
            "equal_groups": sum(
                not any(map(np.any, group)) for group in _grouped(scored, self.options.group_size)
            ),
            **{f"episodes/{name}": ends[name] for name in ("failed", "long", "cut")},
        }
        arrays = self._arrays(episodes, scored)
        engine.release()  # the update needs the memory of cache and cast parameters
        engine.session = dataclasses.replace(engine.session, params=None)
        figures["sampling_seconds"] = time.perf_counter() - started
        return arrays, figures

    def _with(self, params: Any) -> Engine:
        """The engine with these parameters: the same arrays, where the dtype is the same."""
        program = self.program
        session = make_session(
            program.model, params, program.mesh, program.compute.dtype, tokenizer=self.tokenizer
        )
        if not self._engine:
            length = min(self.length + 1, program.model.max_position_embeddings)
            rows = engine_rows(self.batch_rows, batch_ways(program.mesh))
            self._engine = Engine(session, rows, 1 << 30, length)
        self._engine.session = session
        return self._engine

    def _groups(self, engine: Engine, step: int) -> list[Episode]:
        """Episodes of all groups; those whose rewards are equal are replaced while there are rounds left."""
        options, wanted = self.options, self.batch_rows // self.options.group_size
        kept: list[list[Episode]] = []
        for number in range(options.max_rounds):
            keys = [(self.seed, step, number, group) for group in range(wanted - len(kept))]
            tasks = [self._tasks[_hash(*key) % len(self._tasks)] for key in keys]
            groups = [
                [Episode(environment=copy.copy(task), seed=_hash(*key, n)) for n in range(options.group_size)]
                for key, task in zip(keys, tasks, strict=True)
            ]
            self._play(engine, [one for group in groups for one in group], Sampling(temperature=1.0))
            last = number + 1 == options.max_rounds
            kept += [
                group for group in groups if last or len({sum(one.rewards) for one in group if one.valid}) > 1
            ]
            if len(kept) == wanted:
                break
        return [one for group in kept for one in group]

    def _play(self, engine: Engine, episodes: Sequence[Episode], sampling: Sampling) -> None:
        """Plays all episodes to their end. Turns that end at one step of the engine go to their environments together,
        so that what is sampled when does not depend on clocks."""
        seconds = self.options.environment_seconds
        for one, task in zip(
            episodes, _call([one.environment.reset for one in episodes], seconds), strict=True
        ):
            if isinstance(task, str):
                one.add(encode_chat(self.tokenizer, [_user(task)], add_generation_prompt=True)[0])
            else:
                one.end, one.error = "failed", _reason(task, one)
        playing = {
            id(request): (request, one) for one in episodes if (request := self._ask(engine, one, sampling))
        }
        while playing:
            ended = [playing.pop(id(request)) for request in engine.step() if request.finish_reason]
            for request, one in ended:
                one.add(request.tokens, request.logprobs)
            actions = [self._text(request) for request, _ in ended]
            calls = [
                lambda one=one, action=action: one.environment.step(action)
                for (_, one), action in zip(ended, actions, strict=True)
            ]
            for (request, one), found in zip(ended, _call(calls, seconds), strict=True):
                self._observe(one, found, request.finish_reason)
                if following := self._ask(engine, one, sampling):
                    playing[id(following)] = (following, one)
        _call([one.environment.close for one in episodes], seconds)

    def _ask(self, engine: Engine, one: Episode, sampling: Sampling) -> Request | None:
        """The policy's next turn; None if the episode has ended, or ends because no token has room."""
        room = min(self.length + 1, self.program.model.max_position_embeddings) - len(one.ids)
        if not one.end and room < 1:
            one.end = "cut" if one.rewards else "long"
        if one.end:
            return None
        return engine.submit(
            Request(
                prompt=list(one.ids),
                max_new_tokens=min(room, self.options.max_new_tokens),
                stop_ids=self._stops,
                sampling=sampling,
                seed=_hash(one.seed, len(one.rewards)),
            )
        )

    def _text(self, request: Request) -> str:
        ids = request.tokens[:-1] if request.finish_reason == "stop" else request.tokens
        return self.tokenizer.decode(ids, skip_special=True).strip()

    def _observe(self, one: Episode, found: Any, reason: str) -> None:
        """Takes the environment's answer to a turn."""
        try:
            if not isinstance(found, Step):
                raise found
            one.rewards.append(float(found.reward))
            if not math.isfinite(one.rewards[-1]):
                raise ValueError(f"the reward is {found.reward}")
        except Exception as error:
            one.end, one.error = "failed", _reason(error, one)
            return
        if found.done or one.solved:
            one.end = "done"
        elif len(one.rewards) >= (one.environment.max_turns or self.options.max_turns):
            one.end = "turns"
        else:
            more = self._following(found, ended=reason == "stop")
            if len(one.ids) + len(more) <= self.length:
                one.add(more)
            else:
                one.end = "cut"

    def _following(self, found: Step, ended: bool) -> list[int]:
        """The template's text between two turns of the policy, from what ends a turn on if that has not `ended`."""
        said = [
            _user("a"),
            {"role": "assistant", "content": "b"},
            {"role": found.role, "content": found.observation},
        ]
        start = len(encode_chat(self.tokenizer, said[:1], add_generation_prompt=True)[0])
        ids = encode_chat(self.tokenizer, said, add_generation_prompt=True)[0]
        for index in range(start, len(ids)):
            if ids[index] in self._stops:
                return ids[index + ended :]
        raise UserError(
            "the chat template does not end the assistant's turn with a token that stops generation"
        )

    def _advantages(self, episodes: Sequence[Episode], step: int) -> list[np.ndarray]:
        """For each episode the advantage of each of its turns."""
        options, turns = self.options, max(1, *(len(one.rewards) for one in episodes))
        rewards = np.zeros((len(episodes), turns))
        there = np.zeros((len(episodes), turns), bool)
        for row, one in enumerate(episodes):
            if one.valid:
                rewards[row, : len(one.rewards)], there[row, : len(one.rewards)] = one.rewards, True
        if options.shuffle_rewards:
            order = np.random.default_rng(_hash(self.seed, step)).permutation(len(episodes))
            rewards = np.where(
                there, rewards.sum(1)[order][:, None] / np.maximum(there.sum(1, keepdims=True), 1), 0
            )
        returns = np.flip(np.cumsum(np.flip(rewards, 1), 1), 1)
        if options.rewards == "episode":
            returns = np.broadcast_to(returns[:, :1], returns.shape)
            there = np.broadcast_to(there[:, :1], there.shape)
        shape = (-1, options.group_size)
        columns = [
            advantages(
                returns[:, turn].reshape(shape), there[:, turn].reshape(shape), options.algorithm
            ).reshape(-1)
            for turn in range(turns)
        ]
        return list(np.stack(columns, axis=1))

    def _arrays(self, episodes: Sequence[Episode], scored: Sequence[np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the mesh; the target at position t is the episode's id t + 1."""
        abstract = self.program.batch
        batch = {name: np.zeros(array.shape, array.dtype) for name, array in abstract.items()}
        for row, (one, score) in enumerate(zip(episodes, scored, strict=True)):
            count = len(one.ids) - 1
            if count < 1 or count > self.length:
                continue  # a task that does not fit
            turns, logprobs = np.array(one.turns[1:]), np.array(one.logprobs[1:])
            own = turns >= 0
            batch["tokens"][row, :count], batch["targets"][row, :count] = one.ids[:-1], one.ids[1:]
            batch["segment_ids"][row, :count], batch["positions"][row, :count] = 1, np.arange(count)
            trains = one.valid and not (self.options.mask_truncated and one.end == "cut")
            batch["loss_weights"][row, :count] = own & trains
            batch["sampling_logprobs"][row, :count] = np.where(own, logprobs, 0)
            batch["advantages"][row, :count] = np.where(own, score[np.maximum(turns, 0)], 0)
        return {
            name: jax.make_array_from_callback(array.shape, abstract[name].sharding, array.__getitem__)
            for name, array in batch.items()
        }


def engine_rows(episodes: int, ways: int) -> int:
    """Episodes in decode at a time."""
    return min(episodes, ENGINE_ROWS * ways)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _reason(error: Any, one: Episode) -> str:
    said = reason_of(error) if isinstance(error, BaseException) else f"it returned {error!r:.80}"
    return f"{one.environment.id}: {said}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _grouped(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


def _call(functions: Sequence[Callable[[], Any]], seconds: float) -> list[Any]:
    """What each returns, or its exception; a call that hangs is left behind in its thread."""
    results: list[Any] = [TimeoutError(f"no answer after {seconds:g} s") for _ in functions]

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:  # also SystemExit of an environment
            results[index] = error

    for indices in _grouped(range(len(functions)), AT_ONCE):
        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in indices]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
    return list(results)
