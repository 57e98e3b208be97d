"""Held-out loss of each task, over its whole validation store."""

import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from lemur_jax.data.loader import held_out_batches
from lemur_jax.data.mixture import open_rows
from lemur_jax.data.rows import Rows
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.parallel.rules import batch_sharding
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
      UserError: a store is missing or of another tokenizer.
    """
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
