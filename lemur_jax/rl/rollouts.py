"""Episodes of a policy as batches, and updates on them: a function of (parameters, seed, step).

Axis legend: B episode (a row of the batch), T position.
"""

import base64
import collections
import copy
import dataclasses
import functools
import io
import logging
import time
import types
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import digest_of
from lemur_jax.infer.engine import Engine
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import make_session
from lemur_jax.models import decoder
from lemur_jax.parallel.adapted import is_adapted
from lemur_jax.parallel.rules import batch_shards
from lemur_jax.rl import games
from lemur_jax.rl.config import RlConfig
from lemur_jax.rl.episodes import Episode, Player, seed_of
from lemur_jax.rl.objective import advantages
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.objectives import token_logprobs
from lemur_jax.train.state import TrainState
from lemur_jax.train.step import Program

logger = logging.getLogger(__name__)
ENGINE_ROWS = 64  # most episodes in decode, for each shard of rows on the mesh
GAP_ROWS = 8  # episodes per shard whose log-probabilities are compared while off-policy
STEPS_NAMED = 1000  # steps whose tasks are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The episodes of an update.

    Attributes:
      arrays: the batch, on the host.
      figures: metrics of the update.
      tasks: of each row.
    """

    arrays: dict[str, np.ndarray]
    figures: dict[str, float]
    tasks: list[str]

    def to_json(self) -> dict[str, Any]:
        file = io.BytesIO()
        np.savez_compressed(file, **self.arrays)  # type: ignore[arg-type]
        content = base64.b64encode(file.getvalue()).decode()
        return {"arrays": content, "figures": self.figures, "tasks": self.tasks}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RolloutBatch":
        with np.load(io.BytesIO(base64.b64decode(value["arrays"]))) as arrays:
            return cls(arrays=dict(arrays), figures=value["figures"], tasks=value["tasks"])


class Rollouts:
    """Plays episodes and trains on them, and takes the place of the mixture and its loader in the training loop.

    On-policy, an update trains on episodes of its own parameters. With `options.off_policy` they are of the parameters
    before the previous update, and are sampled during that update.

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
            raise UserError("lemur rl runs on one host: several would have to share what environments answer")
        self.sources = (types.SimpleNamespace(name="episodes"),)  # the one source of the batches, for metrics
        self.batch_rows, self.length = program.batch["tokens"].shape
        options.check_rows(self.batch_rows)
        self.options, self.seed, self.tokenizer, self.program = options, seed, tokenizer, program
        self.last_step = steps
        self._tasks, self._held_out = games.tasks(options.environment, options.data)
        if not self._tasks:
            raise UserError(
                f"config.rl.environment {options.environment!r} has fewer than two tasks, and the first is held out:"
                " name one with more"
            )
        self._slots = min(self.length + 1, program.model.max_position_embeddings)
        self._player = Player(options, tokenizer, self._slots)
        self._engine: Engine | None = None
        # (step, tasks of its batch) of the last steps: a bad one is noticed up to `log.every_steps` later.
        self._trained: collections.deque[tuple[int, list[str]]] = collections.deque(maxlen=STEPS_NAMED)
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._ahead: Future[RolloutBatch] | None = None  # the episodes of the next update

        def logprobs(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
            return token_logprobs(decoder.bind(program.model, program.compute, params), batch)

        self._logprobs = jax.jit(logprobs)

    def digests(self) -> dict[str, str]:
        """Digests of the tasks, which are taken by index, and of what turns them into ids."""
        tokenizer = self.tokenizer
        return {
            "tasks": digest_of(
                [[task.id, task.content] if task.content else task.id for task in self._tasks]
            ),
            "chat template and tokenizer": digest_of([tokenizer.chat_template, tokenizer.digest]),
        }

    def documents(self, step: int, rows: Sequence[int]) -> list[str]:
        """The tasks of rows of the batch of a step, one of the last `STEPS_NAMED`."""
        tasks = dict(self._trained).get(step)
        return list(dict.fromkeys(tasks[row] for row in rows)) if tasks else []

    def iterate(self, start_step: int, stop_step: int) -> Generator[tuple[int, Any], None, None]:
        """(step, step): the second stands for the batch, which `update` makes, as it needs the parameters."""
        yield from ((step, step) for step in range(start_step, stop_step))

    def update(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state after the update of a step, and its metrics; the old state is donated.

        Raises:
          UserError: the environment failed in every episode; or log-probabilities while sampling differ from those of
            the training forward with the same parameters by more than `options.max_logprob_gap`.
        """
        params = self.program.weights(state)
        with jax.transfer_guard("allow"):
            played = self._ahead.result() if self._ahead else self.play(step, params)
            batch = self._on_mesh(played.arrays)
            sample_ahead = self.options.off_policy and step + 1 < self.last_step
            params = _copy(params, self.program.compute.dtype) if sample_ahead else None
        self._trained.append((step, played.tasks))
        state, metrics = self.program.step(state, batch)
        # Only now, so that on every device the programs of the engine run after the update.
        self._ahead = self._thread.submit(self.play, step + 1, params) if sample_ahead else None
        metrics |= {f"objective/{name}": np.float32(value) for name, value in played.figures.items()}
        gap, limit = float(jax.device_get(metrics["objective/logprob_gap"])), self.options.max_logprob_gap
        if not gap <= limit:
            raise UserError(
                f"step {step + 1}: log-probabilities of the update and of sampling differ by {gap:.3g} nats a token,"
                f" more than config.rl.max_logprob_gap {limit:g}; the last checkpoint is intact"
            )
        return state, metrics

    def pending(self) -> dict[str, Any] | None:
        """The episodes that are sampled ahead, for a checkpoint; waits for them."""
        return self._ahead.result().to_json() if self._ahead else None

    def restore(self, pending: Mapping[str, Any] | None) -> None:
        """Takes `pending` of a checkpoint; with None, the next update samples with its own parameters."""
        if self._ahead:
            self._ahead.result()
        self._ahead = None
        if pending and self.options.off_policy:
            self._ahead = Future()
            self._ahead.set_result(RolloutBatch.from_json(pending))

    def play(self, step: int, params: Any) -> RolloutBatch:
        """The episodes of a step with these parameters, as from `Program.weights`.

        Raises:
          UserError: the environment failed in every episode.
        """
        with jax.transfer_guard("allow"):
            started = time.perf_counter()
            engine = self._with(params)
            figures = self._held_out_success(engine, step)
            episodes = self._groups(engine, step)
            scores = self._advantages(episodes, step)
            figures |= self._figures(episodes, scores, step)
            arrays = self._arrays(episodes, scores)
            engine.release()  # the update needs the memory of cache and cast parameters
            params, engine.session = engine.session.params, dataclasses.replace(engine.session, params=None)
            if self.options.off_policy:
                figures["logprob_gap"] = self._gap(params, arrays)
            figures["sampling_seconds"] = time.perf_counter() - started
        return RolloutBatch(arrays=arrays, figures=figures, tasks=[one.environment.id for one in episodes])

    def _gap(self, params: Any, arrays: Mapping[str, np.ndarray]) -> float:
        """Mean |difference| of the policy's log-probabilities between sampling and the training forward."""
        rows = min(self.batch_rows, GAP_ROWS * batch_shards(self.program.mesh))
        batch = {name: array[:rows] for name, array in arrays.items()}
        own = batch["loss_weights"] > 0
        logprobs = np.asarray(self._logprobs(params, self._on_mesh(batch)))
        return _mean(np.abs(logprobs - batch["sampling_logprobs"])[own])

    def _held_out_success(self, engine: Engine, step: int) -> dict[str, float]:
        period = self.options.eval_every_steps
        if not period or (step % period and step + 1 != self.last_step):
            return {}
        held_out = self._held_out[: self.options.eval_tasks]
        episodes = [Episode(environment=copy.copy(one), seed=0) for one in held_out]
        self._player.play(engine, episodes, Sampling())
        solved = [one.solved for one in episodes if one.valid]
        return {"held_out_success": _mean(solved)} if solved else {}

    def _figures(self, episodes: Sequence[Episode], scores: np.ndarray, step: int) -> dict[str, float]:
        ends = collections.Counter(one.end for one in episodes)
        if ends["failed"] == len(episodes):
            raise UserError(f"step {step + 1}: the environment failed in every episode: {episodes[0].error}")
        valid = [one for one in episodes if one.valid]
        if not valid:
            text = "step %d changes nothing: no task leaves room for an answer in config.data.sequence_length"
            logger.warning(text, step + 1)
        groups = scores.reshape(len(episodes) // self.options.group_size, -1)
        return {
            "reward": _mean([sum(one.rewards) for one in valid]),
            "success": _mean([one.solved for one in valid]),
            "turns": _mean([len(one.rewards) for one in valid]),
            "equal_groups": int(np.sum(~np.any(groups, axis=1))),
            **{f"episodes/{name}": ends[name] for name in ("failed", "long", "cut")},
        }

    def _with(self, params: Any) -> Engine:
        """The engine with these parameters: the same arrays, where the dtype is the same."""
        program = self.program
        session = make_session(
            program.model, params, program.mesh, program.compute.dtype, tokenizer=self.tokenizer
        )
        if not self._engine:
            rows = engine_rows(self.batch_rows, batch_shards(program.mesh))
            self._engine = Engine(session, rows, 1 << 30, self._slots)
        self._engine.session = session
        return self._engine

    def _groups(self, engine: Engine, step: int) -> list[Episode]:
        """Episodes of all groups; those whose rewards are equal are replaced while there are rounds left."""
        options, members = self.options, range(self.options.group_size)
        num_groups = self.batch_rows // len(members)
        accepted: list[list[Episode]] = []
        for round_index in range(options.max_rounds):
            keys = [(self.seed, step, round_index, group) for group in range(num_groups - len(accepted))]
            tasks = [self._tasks[seed_of(*key) % len(self._tasks)] for key in keys]
            groups = [
                [Episode(environment=copy.copy(task), seed=seed_of(*key, n)) for n in members]
                for key, task in zip(keys, tasks, strict=True)
            ]
            self._player.play(engine, [one for group in groups for one in group], Sampling(temperature=1.0))
            is_last = round_index + 1 == options.max_rounds
            accepted += [group for group in groups if is_last or self._advantages(group, step).any()]
            if len(accepted) == num_groups:
                break
        return [one for group in accepted for one in group]

    def _advantages(self, episodes: Sequence[Episode], step: int) -> np.ndarray:
        """The advantage of each turn of each episode [B, turns]."""
        options, turns = self.options, max(1, *(len(one.rewards) for one in episodes))
        rewards = np.zeros((len(episodes), turns))
        mask = np.zeros((len(episodes), turns), bool)
        for row, one in enumerate(episodes):
            if one.valid:
                rewards[row, : len(one.rewards)], mask[row, : len(one.rewards)] = one.rewards, True
        if options.shuffle_rewards:
            order = np.random.default_rng(seed_of(self.seed, step)).permutation(len(episodes))
            rewards = np.where(
                mask, rewards.sum(1)[order][:, None] / np.maximum(mask.sum(1, keepdims=True), 1), 0
            )
        returns = np.flip(np.cumsum(np.flip(rewards, 1), 1), 1)
        if options.rewards == "episode":
            returns = np.broadcast_to(returns[:, :1], returns.shape)
            mask = np.broadcast_to(mask[:, :1], mask.shape)
        shape = (-1, options.group_size, turns)
        return advantages(returns.reshape(shape), mask.reshape(shape), options.algorithm).reshape(-1, turns)

    def _arrays(self, episodes: Sequence[Episode], scores: np.ndarray) -> dict[str, np.ndarray]:
        """The batch; the target at position t is the episode's id t + 1."""
        batch = {name: np.zeros(array.shape, array.dtype) for name, array in self.program.batch.items()}
        for row, (episode, score) in enumerate(zip(episodes, scores, strict=True)):
            count = len(episode.ids) - 1
            if not episode.valid:
                continue  # the environment failed, or the task does not fit
            turns, logprobs = np.array(episode.turns[1:]), np.array(episode.logprobs[1:])
            own = turns >= 0
            batch["tokens"][row, :count], batch["targets"][row, :count] = episode.ids[:-1], episode.ids[1:]
            batch["segment_ids"][row, :count], batch["positions"][row, :count] = 1, np.arange(count)
            trains = not (self.options.mask_truncated and episode.end == "cut")
            batch["loss_weights"][row, :count] = own & trains
            batch["sampling_logprobs"][row, :count] = np.where(own, logprobs, 0)
            batch["advantages"][row, :count] = np.where(own, score[np.maximum(turns, 0)], 0)
        return batch

    def _on_mesh(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        abstract = self.program.batch
        return {
            name: jax.make_array_from_callback(array.shape, abstract[name].sharding, array.__getitem__)
            for name, array in batch.items()
        }


@functools.partial(jax.jit, static_argnames="dtype")
def _copy(params: Any, dtype: Any) -> Any:
    """A copy of the parameters as the engine reads them: the update donates the arrays of the state."""
    adapted = is_adapted(params)
    return jax.tree.map(lambda x: jnp.copy(x) if adapted else jnp.copy(x).astype(dtype), params)


def engine_rows(episodes: int, ways: int) -> int:
    """Episodes in decode at a time."""
    return min(episodes, ENGINE_ROWS * ways)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
