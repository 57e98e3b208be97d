"""Held-out loss of each task, over its whole validation store, and what it was before training."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from lemur_jax.data.loader import held_out_batches
from lemur_jax.data.mixture import open_rows
from lemur_jax.data.rows import Rows
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.parallel.rules import batch_sharding
from lemur_jax.telemetry.metrics import MetricsWriter, Record
from lemur_jax.train.balance import balance, check_groups, group_ratios
from lemur_jax.train.step import Program


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


def open_held_out(config: ConfigDict, tokenizer: Tokenizer) -> list[HeldOut]:
    """The validation stores of `config.eval.tasks`: chat packed whole, text as one stream.

    Raises:
      UserError: a store is missing or of another tokenizer, or a group names a task that is not there.
    """
    check_groups(config.eval.groups, config.eval.tasks)
    found = []
    for task in config.eval.tasks:
        rows = open_rows(config, tokenizer, task, "validation")
        manifest = rows.store.manifest
        ratio = manifest.bytes / max(manifest.supervised_tokens, 1)
        found.append(HeldOut(task=task, rows=rows, bytes_per_target=ratio))
    return found


def evaluate(
    program: Program, params: Any, held_out: HeldOut, batch_rows: int, max_rows: int
) -> dict[str, Any]:
    """Scores one task.

    Args:
      program: for its `score` function and mesh.
      params: current parameters.
      held_out: the task.
      batch_rows: rows B of a batch; rounded up to what the mesh divides.
      max_rows: rows scored at most; 0: all. With fewer, bytes are estimated from the store's ratio.

    Returns:
      `task, loss` (nats a target token)`, bits_per_byte, tokens, bytes`.
    """
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    batch_rows = math.ceil(batch_rows / ways) * ways
    batches = held_out_batches(held_out.rows, batch_rows, batch_sharding(program.mesh), max_rows=max_rows)
    sums = [program.score(params, batch) for batch in batches]
    sums = jax.device_get([(s.loss, s.weight) for s in sums])
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
      records: of this run so far; of a resumed one they hold what was scored at step 0.
    """

    def __init__(
        self,
        program: Program,
        config: ConfigDict,
        held_out: Sequence[HeldOut],
        writer: MetricsWriter | None,
        say: Callable[[str], None],
        records: Sequence[Record] = (),
    ):
        self._program, self._held_out = program, held_out
        self._writer, self._say = writer, say
        self._rows = config.eval.batch_rows or config.train.batch_rows // config.train.microbatches
        self._max_rows = config.eval.max_rows
        self._groups = check_groups(config.eval.groups, config.eval.tasks)
        at_start = [record for record in records if record.get("kind") == "eval" and record["step"] == 0]
        self._first = {record["task"]: record["bits_per_byte"] for record in at_start}

    def score(self, params: Any, step: int) -> dict[str, float]:
        """Scores every task; the losses (nats a target token) by task."""
        losses, bits = {}, {}
        for task in self._held_out:
            record = evaluate(self._program, params, task, self._rows, self._max_rows)
            losses[task.task], bits[task.task] = record["loss"], record["bits_per_byte"]
            figures = f"{record['loss']:.4f} nats/token, {record['bits_per_byte']:.4f} bits/byte"
            if step and (before := self._first.get(task.task)):
                record["change"] = record["bits_per_byte"] / before - 1
                figures += f" ({record['change']:+.1%} since the start)"
            if self._writer:
                self._writer.write({"step": step, "kind": "eval", **record})
            self._say(f"step {step}: held-out {task.task}: {figures}")
        if not step:
            self._first = bits
        elif ratios := group_ratios(self._first, bits, self._groups):
            self._write_balance(ratios, step)
        return losses

    def _write_balance(self, ratios: dict[str, float], step: int) -> None:
        score = balance(ratios)
        changes = {f"change/{name}": ratio - 1 for name, ratio in ratios.items()}
        if self._writer:
            self._writer.write({"step": step, "kind": "balance", "balance": score, **changes})
        shown = ", ".join(f"{name} {ratio - 1:+.1%}" for name, ratio in ratios.items())
        self._say(f"step {step}: balance {score:+.1%} ({shown} bits/byte)")
