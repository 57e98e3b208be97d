"""The metrics of a run: `WORKDIR/metrics.jsonl`, one JSON object a line.

    {"step": 20, "kind": "train", "loss": 3.2, "learning_rate": 3e-4, "grad_norm": 0.9, "param_norm": 88.1,
     "tokens": 81920, "tokens_per_second": 4100.0, "seconds": 20.1, "loss/python_docs": 3.4}
    {"step": 20, "kind": "eval", "task": "python_docs", "loss": 3.3, "bits_per_byte": 1.6,
     "tokens": 51200, "bytes": 152000}

`step` is the number of updates made, losses are nats a target token; docs/metrics.md has every key with its
unit. A number that is not finite is
written as null, so that every reader of JSON can read the file.
"""

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.telemetry.tensorboard import TensorBoard
from lemur_jax.telemetry.weights_and_biases import WeightsAndBiases

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]


def read_metrics(workdir: epath.PathLike) -> list[Record]:
    """All records of a run, in the order in which they were written.

    A last line that a kill has torn is left out; an unreadable line elsewhere is left out with a
    warning in the log.

    Raises:
      UserError: there is no metrics file.
    """
    path = epath.Path(workdir) / METRICS_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"no {METRICS_FILE} in {os.fspath(workdir)}:"
            " give the --workdir of a `lemur train` that has made a step"
        ) from error
    return _parse(data, path)


class MetricsWriter:
    """Appends records to `WORKDIR/metrics.jsonl`, each visible to readers when `write` returns.

    Once the file is open, a full disk or a store that refuses to be written does not stop a run: records wait in memory
    for the next attempt, which every `write` is (on `gs://`: every `sync`), and `say` tells of it when it begins and
    when it is over. Only `close` raises where they cannot be written to the end. A kill meanwhile loses them.

    On a multi-host run the first host alone has a writer. A run that resumes at `step` calls
    `truncate_after(step)` first; the steps that it repeats then follow without a gap or a double,
    provided `sync()` was called before each checkpoint was committed.

    Object stores cannot append: on `gs://` the records are kept in memory and the object is written
    whole by `sync()` and `close()`, so a kill loses only what came after the last checkpoint.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        say: Callable[[str], None] = print,
        tensorboard: bool = False,
        wandb: bool = False,
    ):
        """Opens the file, which is made if need be, and cuts a torn last line off.

        Args:
          workdir: of the run, local or gs://.
          say: gets a line when records have to wait, and when they wait no more.
          tensorboard: also write every record for TensorBoard, from `truncate_after` on.
          wandb: also send every record to Weights & Biases, from `truncate_after` on.

        Raises:
          UserError: the file cannot be written; so do `truncate_after` and `close`.
        """
        self._path = epath.Path(workdir) / METRICS_FILE
        self._wants_board, self._wants_wandb = tensorboard, wandb
        self._boards: list[TensorBoard | WeightsAndBiases] = []
        self._say = say
        self._pending = b""  # what could not be written yet
        self._failing = False
        self._can_append = _can_append(self._path)
        with self._explained():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            data = self._path.read_bytes() if self._path.exists() else b""
            whole = _whole_lines(data)
            if whole != data or not self._can_append:  # an object store shows now whether it can be written
                self._replace(whole)
            self._file = self._open(whole)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record. Its values: strings, lists of them, integers, and anything that `float` takes."""
        plain = {key: _plain(value) for key, value in record.items()}
        line = json.dumps(plain, allow_nan=False)
        self._pending += line.encode() + b"\n"
        if self._can_append:  # else `sync` writes, and knows whether that is possible
            with self._reported():
                self._drain()
        for board in self._boards:
            with contextlib.suppress(OSError):  # the file is what counts
                board.write(plain)

    def truncate_after(self, step: int) -> None:
        """Drops the records of later steps than `step`; call it when a run resumes at `step`."""
        with self._explained():
            data = self._path.read_bytes() if self._can_append else self._contents()
            records = _parse(data, self._path)
            kept = [record for record in records if record.get("step", 0) <= step]
            if len(kept) < len(records):
                data = b"".join(json.dumps(record).encode() + b"\n" for record in kept)
                self._replace(data)
                self._file.close()
                self._file = self._open(data)
            if self._wants_board:
                self._boards.append(TensorBoard(self._path.parent, step))
            if self._wants_wandb:
                self._boards.append(WeightsAndBiases(self._path.parent))

    def sync(self) -> None:
        """Makes all records so far outlive a crash of the machine; call it before each checkpoint."""
        with self._reported():
            self._sync()
        for board in self._boards:
            with contextlib.suppress(OSError):
                board.flush()

    def close(self) -> None:
        """Syncs and closes; may be called twice."""
        if self._file.closed:
            return
        try:
            with self._explained():
                self._sync()
        finally:
            self._file.close()
            for board in self._boards:
                with contextlib.suppress(OSError):
                    board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # What went wrong first is what to tell.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(UserError):
            self.close()

    def _open(self, data: bytes) -> BinaryIO:
        """A file that continues after `data`, which lies there already."""
        if self._can_append:
            return open(self._path, "ab", buffering=0)
        memory = io.BytesIO()
        memory.write(data)
        return memory

    def _drain(self) -> None:
        """Writes what is pending; what a full disk does not take stays, so that the next attempt ends a torn line."""
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def _sync(self) -> None:
        if self._can_append:
            self._drain()
            os.fsync(self._file.fileno())
        else:
            self._path.write_bytes(self._contents())

    def _contents(self) -> bytes:
        assert isinstance(self._file, io.BytesIO)
        self._drain()
        return self._file.getvalue()

    def _replace(self, data: bytes) -> None:
        """Puts `data` in the file's place; a kill leaves the old file or the new one, never half."""
        if not self._can_append:
            self._path.write_bytes(data)
            return
        temporary = self._path.with_name(METRICS_FILE + ".tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            with self._explained():
                yield
        except UserError as error:
            if not self._failing:
                self._say(
                    f"WARNING: {error}. Its next lines wait in memory and will be written when that is possible"
                )
            self._failing = True
        else:
            if self._failing:
                self._say(f"{self._path} can be written again, and nothing is missing")
            self._failing = False

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Clients of object stores have error classes of their own.
            if isinstance(error, OSError) or not self._can_append:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"cannot write {self._path}: {reason}") from error
            raise


def _can_append(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _whole_lines(data: bytes) -> bytes:
    """`data` without a torn last line; a last line that only lost its newline gets it back."""
    body, newline, last = data.rpartition(b"\n")
    if not last:
        return data
    return data + b"\n" if _record(last) is not None else body + newline


def _parse(data: bytes, path: epath.Path) -> list[Record]:
    lines = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):  # the last one has no newline: torn by a kill, or being written now
            logging.getLogger(__name__).warning("%s: line %d is unreadable and left out", path, number)
    return records


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return record if isinstance(record, dict) else None


def _plain(value: Any) -> Any:
    """A JSON value: NumPy and JAX scalars as Python's, what is not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | list):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
