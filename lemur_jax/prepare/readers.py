"""Rows out of files, without TensorFlow: JSON Lines, text and Parquet, local or on gs://.

A row comes with its place in the file. What cannot be read does not raise and does not vanish: it is a `Bad`
row, of which `data.fields` makes a document with a reason, as of each row that cannot be used.
"""

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError

FORMATS = ("jsonl", "text", "lines", "parquet", "tfrecord")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".tfrecord": "tfrecord",
}
MAX_BYTES = 2 << 20  # of one record: tokenizing takes up to 150 times as much memory (conversations)
_READ_BYTES = 1 << 20
_BATCH_ROWS = 64
EXCERPT = 500  # bytes of a bad record that are kept

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bad:
    """What stands at a place that cannot be read.

    Attributes:
      reason: in a few words.
      records: how many records are lost with it.
      excerpt: the beginning of what stands there.
    """

    reason: str
    records: int = 1
    excerpt: bytes = b""


def find_files(patterns: str | Iterable[str]) -> list[str]:
    """The files that match globs, sorted; a directory stands for all files in it. Local or gs://.

    Raises:
      UserError: a pattern with `**`.
    """
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "**" in pattern:  # thousands of requests on gs://
            raise UserError(f"{pattern}: ** is not understood; write one * for each directory")
        path = epath.Path(pattern)
        if "*" not in pattern and "?" not in pattern and "[" not in pattern:
            inside = (file for file in path.glob("*") if not file.is_dir()) if path.is_dir() else [path]
            found |= {file for file in inside if file.exists()}
            continue
        # epath globs below a directory only: begin at the last one without a wildcard.
        parts = path.parts
        first = next(index for index, part in enumerate(parts) if any(sign in part for sign in "*?["))
        found |= set(epath.Path(*parts[:first]).glob("/".join(parts[first:])))
    return sorted(str(path) for path in found if path.name[0] not in "._")


def format_of(path: str) -> str:
    """The format by the file's name, compression apart.

    Raises:
      UserError: the name does not say.
    """
    name = epath.Path(path).name
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix) or (kind == "tfrecord" and ".tfrecord-" in name):
            return kind
    raise UserError(f"cannot tell the format of {path} by its name: name one of {', '.join(FORMATS)}")


def rows(
    path: str, kind: str, columns: Sequence[str] | None = None, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[str, Row | Bad]]:
    """(position in the file, row or what is bad there), in the file's order.

    Args:
      path: a file.
      kind: "jsonl" (an object a line), "lines" (a text a line), "text" (the file is one text), "parquet".
      columns: of Parquet, those to read; None: all.
      max_bytes: longer lines and files are bad.
    """
    if kind == "parquet":
        yield from _parquet(path, columns)
        return
    if kind == "text":
        yield "file", _whole(path, max_bytes)
        return
    for position, line in _lines(path, max_bytes):
        if isinstance(line, Bad):
            yield position, line
        elif line.strip():
            yield position, {"text": line.rstrip(b"\r\n")} if kind == "lines" else _object(line)


def reason_of(error: Exception) -> str:
    """What was wrong, for people, in a few words."""
    if isinstance(error, UnicodeError):
        return "invalid UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deep"
    text = f"no field {error}" if isinstance(error, KeyError) else str(error)
    return text.partition("\n")[0] or type(error).__name__


def _object(line: bytes) -> Row | Bad:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = reason_of(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"not JSON: {reason}"
        return Bad(reason=reason, excerpt=line[:EXCERPT])
    if not isinstance(row, dict):
        return Bad(reason=f"the line is a JSON {type(row).__name__}, not an object", excerpt=line[:EXCERPT])
    return row


def _chunks(path: str) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    import pyarrow

    compression = next((kind for suffix, kind in COMPRESSIONS.items() if path.endswith(suffix)), None)
    with epath.Path(path).open("rb") as file:
        stream: Any = file
        if compression:
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), compression)
        while chunk := stream.read(_READ_BYTES):
            yield bytes(chunk)


def _lines(path: str, max_bytes: int) -> Iterator[tuple[str, bytes | Bad]]:
    """(position, line), never with more than `max_bytes` and one chunk in memory."""
    number, held, length = 1, b"", 0  # `held`: the line so far, as long as it is short enough
    try:
        for chunk in _chunks(path):
            for part in io.BytesIO(chunk):  # cut after line feeds alone
                length += len(part)
                held = held + part if length <= max_bytes else (held[:EXCERPT] + part[:EXCERPT])[:EXCERPT]
                if part.endswith(b"\n"):
                    yield f"line {number}", _bounded(held, length, max_bytes)
                    number, held, length = number + 1, b"", 0
    except (OSError, EOFError, ValueError) as error:
        yield (
            f"line {number}",
            Bad(reason=f"the file cannot be read on: {reason_of(error)}", excerpt=held[:EXCERPT]),
        )
        return
    if length:
        yield f"line {number}", _bounded(held, length, max_bytes)


def _bounded(line: bytes, length: int, max_bytes: int) -> bytes | Bad:
    if length <= max_bytes:
        return line
    return Bad(reason=f"{length:,} bytes long, more than {max_bytes:,}", excerpt=line[:EXCERPT])


def _whole(path: str, max_bytes: int) -> Row | Bad:
    data = b""
    try:
        for chunk in _chunks(path):
            data += chunk
            if len(data) > max_bytes:
                return Bad(reason=f"longer than {max_bytes:,} bytes", excerpt=data[:EXCERPT])
    except (OSError, EOFError, ValueError) as error:
        return Bad(reason=f"the file cannot be read on: {reason_of(error)}", excerpt=data[:EXCERPT])
    return {"text": data}


def _parquet(path: str, columns: Sequence[str] | None) -> Iterator[tuple[str, Row | Bad]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    with epath.Path(path).open("rb") as source:
        try:
            # Through a small buffer, page by page: a row group may be larger than memory.
            file = pyarrow.parquet.ParquetFile(
                source, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except (OSError, pyarrow.ArrowException) as error:
            yield "file", Bad(reason=f"not Parquet: {reason_of(error)}")
            return
        there = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.metadata.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            try:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=there, use_threads=False)
                for batch in batches:
                    for item in _batch_rows(batch):
                        yield f"row {row}", item
                        row += 1
            except (OSError, pyarrow.ArrowException) as error:
                yield f"row {row}", Bad(reason=f"row group {group}: {reason_of(error)}", records=end - row)
            row = end


def _batch_rows(batch: Any) -> Iterator[Row | Bad]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # one of them: find it
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Bad(reason="invalid UTF-8")
