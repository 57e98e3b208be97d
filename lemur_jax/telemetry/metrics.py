"""The metrics of a run: `WORKDIR/metrics.jsonl`, one JSON object a line.

    {"step": 20, "kind": "train", "loss": 3.2, "learning_rate": 3e-4, "grad_norm": 0.9, "tokens": 81920}
    {"step": 20, "kind": "eval", "task": "python_docs", "loss": 3.3, "bits_per_byte": 1.6}

docs/metrics.md lists every key with its unit. JSON has no NaN and no infinity: they are written as null.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import is_object_store
from lemur_jax.telemetry.trackers import TensorBoard, WeightsAndBiases

METRICS_FILE = "metrics.jsonl"
# Keys whose values are no numbers.
_TEXTS = ("kind", "task", "commit", "host", "devices", "weights")
_LISTS = ("versions", "changes", "documents")
logger = logging.getLogger(__name__)

Record = dict[str, Any]


def read_metrics(workdir: epath.PathLike) -> list[Record]:
    """All records of a run as they were written; otherwise as `scan_metrics`."""
    return scan_metrics(workdir)[0]


def scan_metrics(workdir: epath.PathLike) -> tuple[list[Record], int]:
    """The records of a run, and how many lines could not be read, which is also logged.

    These are not UTF-8, not JSON, no record with a step, or have a value of another type than docs/metrics.md says.

    A last line without a newline was cut off by a kill, or is being written now, and is not counted.
    """
    path = epath.Path(workdir) / METRICS_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no {METRICS_FILE} in {os.fspath(workdir)}: give the --workdir of a `lemur train` that has made a step"
        ) from error
    *lines, last = data.split(b"\n")
    parsed = [_parse(line) for line in lines if line.strip()]
    records = [record for record in [*parsed, _parse(last)] if record is not None]
    if skipped := parsed.count(None):
        logger.warning("%s/%s: %d unreadable lines were skipped", os.fspath(workdir), METRICS_FILE, skipped)
    return records, skipped


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends records to `WORKDIR/metrics.jsonl`, each visible to readers when `write` returns.

    Only the first host has a writer. A run that resumes at `step` first calls `truncate_after(step)`; then no step is
    missing or doubled, provided that `sync()` was called before each checkpoint.

    While the disk refuses a write, records wait in memory and every `write` tries again; a kill loses them. Object
    stores cannot append: there `sync` and `close` write the whole object, so a kill loses the records after the last
    checkpoint.
    """

    def __init__(self, workdir: epath.PathLike, *, tensorboard: bool = False, wandb: bool = False):
        """Opens the file, local or gs://, which is created if missing, and removes a torn last line.

        `tensorboard`, `wandb`: also write every record there, from `truncate_after` on. Raises UserError if the file
        cannot be written.
        """
        self._path = epath.Path(workdir) / METRICS_FILE
        self._wants_tensorboard, self._wants_wandb = tensorboard, wandb
        self._trackers: list[TensorBoard | WeightsAndBiases] = []
        self._remote = is_object_store(self._path)
        self._pending = b""  # not written yet
        self._failing = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            data = self._path.read_bytes() if self._path.exists() else b""
            complete = _without_torn_line(data)
            self._file = self._open()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error
        self._written = complete if self._remote else b""
        if complete != data or self._remote:  # fails now if an object store cannot be written
            self._replace(complete)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record. Its values: strings, lists of them, integers, and anything that `float` takes."""
        plain = {key: _plain(value) for key, value in record.items()}
        self._pending += json.dumps(plain, allow_nan=False).encode() + b"\n"
        if not self._remote:
            self._flush()
        for tracker in self._trackers:
            tracker.write(plain)

    def truncate_after(self, step: int) -> None:
        """Drops the records of later steps than `step`, where the run resumes, and lines that cannot be read."""
        records, skipped = scan_metrics(self._path.parent)
        earlier = [record for record in records if record["step"] <= step]
        if skipped or len(earlier) < len(records):
            self._replace(b"".join(json.dumps(record).encode() + b"\n" for record in earlier))
        if self._wants_tensorboard:
            self._trackers.append(TensorBoard(self._path.parent, step))
        if self._wants_wandb:
            self._trackers.append(WeightsAndBiases(self._path.parent, fresh=not earlier))

    def sync(self) -> None:
        """Makes all records survive a crash of the machine."""
        self._flush()
        if self._file and not self._failing:
            os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Writes what is pending and closes, UserError if that fails."""
        error = self._flush()
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()
        if error:
            raise UserError(
                f"cannot write {self._path}: {getattr(error, 'strerror', None) or error}"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # else the first error is the one to show
                raise

    def _flush(self) -> Exception | None:
        """Writes what is pending; the rest of a line that a full disk refuses is written by the next attempt."""
        try:
            if self._file:
                while self._pending:
                    self._pending = self._pending[self._file.write(self._pending) :]
            else:
                self._path.write_bytes(self._written + self._pending)
                self._written, self._pending = self._written + self._pending, b""
        except Exception as error:  # clients of object stores have error classes of their own
            if not self._failing:
                reason = getattr(error, "strerror", None) or error
                logger.warning("cannot write %s: %s. Records wait in memory until it can", self._path, reason)
            self._failing = True
            return error
        if self._failing:
            logger.info("%s can be written again, and no record is missing", self._path)
        self._failing = False
        return None

    def _replace(self, data: bytes) -> None:
        """Replaces the contents of the file; a kill leaves the old or the new contents."""
        if self._file is None:
            self._path.write_bytes(data)
            self._written = data
            return
        temporary = self._path.with_name(METRICS_FILE + ".tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file.close()
        self._file = self._open()

    def _open(self) -> BinaryIO | None:
        return None if self._remote else open(self._path, "ab", buffering=0)


def _without_torn_line(data: bytes) -> bytes:
    """`data` without a torn last line; a complete last line that lacks its newline gets one."""
    body, newline, last = data.rpartition(b"\n")
    if not last:
        return data
    return data + b"\n" if _parse(last) is not None else body + newline


def _parse(line: bytes) -> Record | None:
    """The record in a line; None if the line is damaged."""
    try:
        record = json.loads(line.decode())  # of bytes, json would guess the encoding
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record and all(itertools.starmap(_is_valid, record.items())) else None


def _is_valid(key: str, value: Any) -> bool:
    """Whether a value has the type that docs/metrics.md gives: text, a list of texts, a finite number, or null."""
    if value is None:
        return key != "task"
    if key in _LISTS:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if key in _TEXTS:
        return isinstance(value, str)
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # false of NaN


def _plain(value: Any) -> Any:
    """A JSON value: NumPy and JAX scalars as Python's, numbers that are not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | list):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
