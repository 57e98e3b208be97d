"""Held-out loss of each task, over its whole validation store, and what it was before training."""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from lemur_jax.config import RunConfig
from lemur_jax.data.config import DataConfig
from lemur_jax.data.loader import held_out_batches
from lemur_jax.data.mixture import open_rows
from lemur_jax.data.rows import Rows
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.telemetry.metrics import MetricsWriter, Record
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.balance import balance, group_ratios
from lemur_jax.train.saves import due
from lemur_jax.train.step import Program

# Batches that the devices have got and not answered: enough to keep them busy, few enough to stop soon.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The validation rows of one task.

    Attributes:
      task: its name.
      rows: every row is scored once, in order.
      bytes_per_target: UTF-8 bytes of predicted text for each predicted token.
    """

    task: str
    rows: Rows
    bytes_per_target: float


def open_held_out(data: DataConfig, tasks: Sequence[str], tokenizer: Tokenizer) -> list[HeldOut]:
    """The validation stores of `config.eval.tasks`: chat packed whole, text as one stream.

    Raises:
      UserError: a store is missing or of another tokenizer.
    """
    found = []
    for task in tasks:
        rows = open_rows(data, tokenizer, task, "validation")
        manifest = rows.store.manifest
        ratio = manifest.bytes / max(manifest.supervised_tokens, 1)
        found.append(HeldOut(task=task, rows=rows, bytes_per_target=ratio))
    return found


def unscored(config: RunConfig, records: Sequence[Record], step: int) -> set[str]:
    """Tasks that a run must score before it goes on from a step: where it starts, or SIGTERM came in between.

    Args:
      config: a run config.
      records: of the run.
      step: updates done; 0: scored where the parameters come from a checkpoint.
    """
    scored = {r["task"] for r in records if r.get("kind") == "eval" and r["step"] == step}
    return set(config.eval.tasks) - scored if scored or _is_regular(config, step) else set()


def _is_regular(config: RunConfig, step: int) -> bool:
    """Whether every run of this config is scored at this step, whatever came in between."""
    if not step:
        return bool(config.init.checkpoint)
    compared = config.checkpoint.keep_best and due(step, config.checkpoint.every_steps)
    return step == config.train.steps or bool(compared) or due(step, config.eval.every_steps)


def evaluate(
    program: Program,
    params: Any,
    held_out: HeldOut,
    batch_rows: int,
    max_rows: int,
    give_up: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Scores one task.

    Args:
      program: for its `score` function and mesh.
      params: current parameters.
      held_out: the task.
      batch_rows: rows B of a batch; rounded up to what the mesh divides.
      max_rows: rows scored at most; 0: all. With fewer, bytes are estimated from the store's ratio.
      give_up: asked before every batch, equally often on all hosts.

    Returns:
      `task, loss` (nats a target token)`, bits_per_byte, tokens, bytes`; None where it was given up.
    """
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    batch_rows = math.ceil(batch_rows / ways) * ways
    sums: list[Any] = []
    with contextlib.closing(
        held_out_batches(held_out.rows, batch_rows, batch_sharding(program.mesh), max_rows=max_rows)
    ) as batches:
        for batch in batches:
            if give_up():
                return None
            found = program.score(params, batch)
            sums.append((found.loss, found.weight))
            if len(sums) > _IN_FLIGHT:
                jax.block_until_ready(sums[-1 - _IN_FLIGHT])
    sums = jax.device_get(sums)
    loss = math.fsum(float(rows.astype("float64").sum()) for rows, _ in sums)
    tokens = int(math.fsum(float(weights.astype("float64").sum()) for _, weights in sums))
    num_bytes = round(tokens * held_out.bytes_per_target)
    return {
        "task": held_out.task,
        "loss": loss / max(tokens, 1),
        "bits_per_byte": loss / math.log(2) / max(num_bytes, 1),
        "tokens": tokens,
        "bytes": num_bytes,
    }


class Evaluations:
    """The held-out evaluations of a run: scored, written down, and compared with the one before step 1.

    Args:
      program, config: of the run.
      held_out: the tasks.
      writer: where records go; None on hosts that do not write.
      say: told in words.
      records: of this run so far; of a resumed one they hold what was scored before.
      give_up: asked before every batch whether to stop scoring, equally often on all hosts.
    """

    def __init__(
        self,
        program: Program,
        config: RunConfig,
        held_out: Sequence[HeldOut],
        writer: MetricsWriter | None,
        say: Callable[[str], None],
        records: Sequence[Record] = (),
        give_up: Callable[[], bool] = lambda: False,
    ):
        self._program, self._config, self._held_out = program, config, held_out
        self._writer, self._say = writer, say
        self._rows = config.eval.batch_rows or config.train.batch_rows // config.train.microbatches
        self._max_rows = config.eval.max_rows
        self._groups = config.eval.task_groups
        self._give_up = give_up
        # Bits per byte by step and task.
        self._bits: dict[int, dict[str, float]] = collections.defaultdict(dict)
        for record in records:
            if record.get("kind") == "eval":
                self._bits[record["step"]][record["task"]] = record["bits_per_byte"]

    def score(self, params: Any, step: int, only: Collection[str] | None = None) -> dict[str, float]:
        """Scores the tasks; the losses (nats a target token) by task, of fewer tasks where it was given up.

        Args:
          params: current parameters.
          step: updates done.
          only: of these tasks; the others were scored at this step before. None: of all.
        """
        losses: dict[str, float] = {}
        first, bits = self._bits[0], self._bits[step]
        for task in self._held_out:
            if only is not None and task.task not in only:
                continue
            record = evaluate(self._program, params, task, self._rows, self._max_rows, self._give_up)
            if record is None:
                later = bits or _is_regular(self._config, step)
                self._say(
                    f"step {step}: the held-out evaluation is given up"
                    + (
                        ", and will be made at the next start"
                        if later
                        else "; its checkpoint is not among the best"
                    )
                )
                return losses
            losses[task.task], bits[task.task] = record["loss"], record["bits_per_byte"]
            figures = f"{record['loss']:.4f} nats/token, {record['bits_per_byte']:.4f} bits/byte"
            if step and (before := first.get(task.task)):
                record["change"] = record["bits_per_byte"] / before - 1
                figures += f" ({record['change']:+.1%} since the start)"
            if self._writer:
                self._writer.write({"step": step, "kind": "eval", **record})
            self._say(f"step {step}: held-out {task.task}: {figures}")
        if step and (ratios := group_ratios(first, bits, self._groups)):
            self._write_balance(ratios, step)
        return losses

    def _write_balance(self, ratios: dict[str, float], step: int) -> None:
        score = balance(ratios)
        changes = {f"change/{name}": ratio - 1 for name, ratio in ratios.items()}
        if self._writer:
            self._writer.write({"step": step, "kind": "balance", "balance": score, **changes})
        shown = ", ".join(f"{name} {ratio - 1:+.1%}" for name, ratio in ratios.items())
        self._say(f"step {step}: balance {score:+.1%} ({shown} bits/byte)")
