"""Held-out loss of each task over its whole validation store, compared with that before training."""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from lemur_jax.checkpoint.config import CheckpointConfig
from lemur_jax.cluster.hosts import any_host, inform, is_primary
from lemur_jax.data.config import DataConfig
from lemur_jax.data.loader import chosen_rows, held_out_batches
from lemur_jax.data.mixture import open_rows
from lemur_jax.data.rows import Rows
from lemur_jax.parallel.rules import batch_sharding, batch_shards
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.balance import balance, group_ratios
from lemur_jax.train.config import EvalConfig, InitConfig
from lemur_jax.train.history import RunHistory
from lemur_jax.train.saves import due
from lemur_jax.train.step import Program

# Batches in flight on the devices: enough to keep them busy, few enough to stop soon.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The validation rows of one task."""

    task: str
    rows: Rows  # every row is scored once, in order
    num_bytes: int  # UTF-8 bytes of the text that the targets of the scored rows stand for


def open_held_out(data: DataConfig, options: EvalConfig, tokenizer: Tokenizer) -> list[HeldOut]:
    """The validation stores of `config.eval.tasks`: chat packed whole, text as one stream.

    The bytes of all rows are the store's; those of `eval.max_rows` of them are counted by decoding their targets.
    """
    held_out = []
    for task in options.tasks:
        rows = open_rows(data, tokenizer, task, "validation")
        chosen = chosen_rows(len(rows), options.max_rows)
        is_complete = len(chosen) == len(rows) and not rows.truncated
        num_bytes = rows.store.manifest.bytes if is_complete else count_bytes(rows, chosen, tokenizer)
        held_out.append(HeldOut(task=task, rows=rows, num_bytes=num_bytes))
    return held_out


def count_bytes(rows: Rows, chosen: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the supervised targets of rows; a character split by the end of a row counts approximately."""

    def size(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, skip_special=True).encode())

    count = 0
    for row in chosen:
        batch = rows.read(row[None])
        tokens, targets = batch["tokens"][0], batch["targets"][0]
        supervised = batch["loss_weights"][0] > 0
        for run in np.split(np.arange(rows.length), np.flatnonzero(np.diff(supervised)) + 1):
            if supervised[run[0]]:
                # Decoded after the previous token, a run keeps its leading space.
                previous = [int(tokens[run[0]])]
                count += size(previous + targets[run].tolist()) - size(previous)
    return count


@dataclasses.dataclass(frozen=True)
class EvaluationSteps:
    """After which updates a run is scored."""

    options: EvalConfig
    checkpoint: CheckpointConfig
    init: InitConfig
    last: int  # the last update

    def is_regular(self, step: int) -> bool:
        """Whether every run of this config is scored at this step, regardless of earlier requests to stop."""
        if not step:
            return bool(self.init.checkpoint)
        compared_every = self.checkpoint.every_steps if self.checkpoint.keep_best else 0
        return step == self.last or due(step, compared_every) or due(step, self.options.every_steps)


def evaluate(
    program: Program,
    params: Any,
    held_out: HeldOut,
    batch_rows: int,
    max_rows: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Scores one task: `task`, `loss` (nats a target token), `bits_per_byte`, `tokens`, `bytes`; None if stopped.

    `batch_rows` is rounded up to what the mesh divides; `max_rows` are chosen by `data.loader.chosen_rows` (0: all).
    `should_stop` is called before every batch, equally often on all hosts.
    """
    shards = batch_shards(program.mesh)
    batch_rows = math.ceil(batch_rows / shards) * shards
    sums: list[Any] = []
    with contextlib.closing(
        held_out_batches(held_out.rows, batch_rows, batch_sharding(program.mesh), max_rows=max_rows)
    ) as batches:
        for batch in batches:
            if should_stop():
                return None
            result = program.score(params, batch)
            sums.append((result.loss, result.weight))
            if len(sums) > _IN_FLIGHT:
                jax.block_until_ready(sums[-1 - _IN_FLIGHT])
    sums = jax.device_get(sums)
    loss = math.fsum(float(rows.astype("float64").sum()) for rows, _ in sums)
    tokens = int(math.fsum(float(weights.astype("float64").sum()) for _, weights in sums))
    return {
        "task": held_out.task,
        "loss": loss / max(tokens, 1),
        "bits_per_byte": loss / math.log(2) / max(held_out.num_bytes, 1),
        "tokens": tokens,
        "bytes": held_out.num_bytes,
    }


class Evaluations:
    """The held-out evaluations of a run: scored, recorded, and compared with the one before step 1.

    `history` has the scores of earlier processes; `should_stop` is called before every batch, equally often on all
    hosts.
    """

    def __init__(
        self,
        program: Program,
        batch_rows: int,
        steps: EvaluationSteps,
        held_out: Sequence[HeldOut],
        history: RunHistory,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self._program, self._options, self._steps, self._held_out = program, steps.options, steps, held_out
        self._writer = history.writer
        self._batch_rows = steps.options.batch_rows or batch_rows
        self._should_stop = should_stop
        # Bits per byte by step and task. Those of step 0 only if they are of the same text: `eval.max_rows` or a
        # validation store may have changed since.
        self._bits: dict[int, dict[str, float]] = collections.defaultdict(dict)
        sizes = {task.task: task.num_bytes for task in held_out}
        for record in history.records:
            if record.get("kind") == "eval" and (
                record["step"] or record.get("bytes") == sizes.get(record["task"])
            ):
                self._bits[record["step"]][record["task"]] = record["bits_per_byte"]

    def unscored(self, step: int) -> list[str]:
        """Tasks that must be scored before the run continues from a step; all hosts call it and get the same.

        There are some at the first start, and after a request to stop that came during an evaluation.
        """
        scored = self._bits[step]
        needed = is_primary() and (bool(scored) or self._steps.is_regular(step))
        return [task.task for task in self._held_out if any_host(needed and task.task not in scored)]

    def due(self, step: int, save_is_regular: bool) -> bool:
        """Whether to score after this update.

        `save_is_regular`: a checkpoint is saved after it, which `keep_best` may compare with others.
        """
        if not self._held_out:
            return False
        return self._steps.is_regular(step) or (save_is_regular and bool(self._steps.checkpoint.keep_best))

    def score(self, params: Any, step: int, only: Collection[str] | None = None) -> dict[str, float]:
        """Scores the tasks; losses (nats a target token) by task, of fewer tasks after a request to stop.

        `only`: these tasks; the others were scored at this step before.
        """
        losses: dict[str, float] = {}
        initial, current = self._bits[0], self._bits[step]
        for task in self._held_out:
            if only is not None and task.task not in only:
                continue
            record = evaluate(
                self._program, params, task, self._batch_rows, self._options.max_rows, self._should_stop
            )
            if record is None:
                is_repeated = bool(current) or self._steps.is_regular(step)
                consequence = (
                    "repeated at the next start" if is_repeated else "its checkpoint is not among the best"
                )
                inform(f"step {step}: held-out evaluation stopped; {consequence}")
                return losses
            losses[task.task], current[task.task] = record["loss"], record["bits_per_byte"]
            figures = f"{record['loss']:.4f} nats/token, {record['bits_per_byte']:.4f} bits/byte"
            if step and (initial_value := initial.get(task.task)):
                record["change"] = record["bits_per_byte"] / initial_value - 1
                figures += f" ({record['change']:+.1%} since the start)"
            if self._writer:
                self._writer.write({"step": step, "kind": "eval", **record})
            inform(f"step {step}: held-out {task.task}: {figures}")
        if step and (ratios := group_ratios(initial, current, self._options.task_groups)):
            self._write_balance(ratios, step)
        return losses

    def _write_balance(self, ratios: dict[str, float], step: int) -> None:
        score = balance(ratios)
        changes = {f"change/{name}": ratio - 1 for name, ratio in ratios.items()}
        if self._writer:
            self._writer.write({"step": step, "kind": "balance", "balance": score, **changes})
        summary = ", ".join(f"{name} {ratio - 1:+.1%}" for name, ratio in ratios.items())
        inform(f"step {step}: balance {score:+.1%} ({summary} bits/byte)")
