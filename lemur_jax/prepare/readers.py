"""Rows of files, without TensorFlow: JSON Lines, JSON arrays, text and Parquet, local or on gs://.

Each row comes with its position in the file. What cannot be read becomes a `BadRow`, which `fields.to_documents`
turns into a document with a reason; missing rows are counted.
"""

import codecs
import dataclasses
import io
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import dataset_files
from lemur_jax.prepare.streams import COMPRESSIONS, Unreadable, compression_of, read_utf8

logger = logging.getLogger(__name__)

FORMATS = ("jsonl", "text", "lines", "parquet", "tfrecord")
_SUFFIXES = dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl") | dict.fromkeys((".txt", ".md"), "text")
_SUFFIXES |= {".parquet": "parquet", ".tfrecord": "tfrecord"}
MAX_BYTES = 2 << 20  # of one record; tokenizing a conversation takes up to 150 times as much memory
_BUFFER_BYTES = 1 << 20  # of Parquet
_BATCH_ROWS = 64
_MAX_ELEMENT = 1 << 24  # characters of one element of a JSON array in memory
_SEPARATOR = re.compile(r"\s*,?\s*")
EXCERPT = 500  # bytes of a bad record that are kept
_POINTER = b"version https://git-lfs.github.com/spec/"
_IS_POINTER = "a pointer of Git LFS in place of the file: run `git lfs pull`"

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRow:
    """A position that cannot be read; `records`: how many are lost, `excerpt`: its beginning."""

    reason: str
    records: int = 1
    excerpt: bytes = b""


# (position in the file, row), in the order of the file.
Rows = Iterable[tuple[str, Row | BadRow]]


def find_files(patterns: str | Iterable[str]) -> list[str]:
    """The files that match globs, sorted, local, gs:// or hf://datasets/; a directory stands for its files.

    Hidden files and marker files such as `_SUCCESS` are left out. UserError for `**`.
    """
    paths: set[epath.Path] = set()
    on_hub: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "**" in pattern:  # thousands of requests on gs://
            raise UserError(f"{pattern}: ** is not understood; write one * for each directory")
        if pattern.startswith("hf://"):
            on_hub += dataset_files(pattern)
            continue
        path = epath.Path(pattern).expanduser()
        has_wildcard = [any(sign in part for sign in "*?[") for part in path.parts]
        if not any(has_wildcard) or path.exists():  # names may have brackets
            # A dangling link stays, so that reading it fails.
            found = set(path.glob("*")) if path.is_dir() else {path} if path.exists() else set()
            folders = {entry for entry in found if entry.is_dir()}
            paths |= found - folders
            if names := sorted(folder.name for folder in folders if not folder.name.startswith(".")):
                logger.warning("%s: %d directories in it, e.g. %s, are not read", path, len(names), names[0])
            continue
        # epath globs below a directory only: begin at the last one without a wildcard.
        index = has_wildcard.index(True)
        paths |= set(epath.Path(*path.parts[:index]).glob("/".join(path.parts[index:])))
    return sorted(path for path in [*map(str, paths), *dict.fromkeys(on_hub)] if not _is_marker(path))


def _is_marker(path: str) -> bool:
    """Whether a file is hidden, or a marker of another program: `.crc`, `_SUCCESS`, but not `__init__.py`."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or (name.startswith("_") and "." not in name)


def format_of(path: str) -> str:
    """The format by the file's name, ignoring compression; UserError if the name has no known suffix."""
    name = epath.Path(path).name
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix) or (kind == "tfrecord" and ".tfrecord-" in name):
            return kind
    raise UserError(
        f"cannot tell the format of {path} by its name: name one of {', '.join(FORMATS)} as `kind`, or convert it to"
        " one of these, e.g. CSV and Arrow to Parquet"
    )


def read_rows(
    path: str,
    kind: str,
    columns: Sequence[str] | None = None,
    required: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
) -> Rows:
    """(position in the file, row), in the file's order.

    Args:
      path: a file.
      kind: "jsonl" (an object per line), "lines" (a text per line), "text" (the file is one text), "parquet".
      columns: Parquet columns to read, those that are there; None: all.
      required: fields that a Parquet file must have; a dot selects nested ones.
      max_bytes: longer lines, elements of arrays and text files are bad.
    """
    if kind == "parquet":
        yield from _parquet(path, columns, required)
        return
    if not epath.Path(path).stat().length and not compression_of(path):
        logger.warning("%s is empty", path)
    chunks = read_utf8(path)
    if kind == "text":
        rows = _whole_text(chunks, max_bytes)
    else:
        rows = _lines(chunks, max_bytes) if kind == "lines" else _json(chunks, max_bytes)
    yield from up_to_damage(path, rows)


def up_to_damage(path: str, rows: Rows) -> Rows:
    """The rows of a file, and at its damage a bad row for the missing ones."""
    location, count = "file", 0
    try:
        for position, row in rows:
            yield position, row
            location, count = f"after {position}", count + 1
    except Unreadable as error:
        yield location, BadRow(reason=f"cannot be read on: {error}", records=error.count_lost(count, path))


def bad_reason(error: Exception) -> str:
    """A short reason for people."""
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): Latin-1 or another encoding?"
    if isinstance(error, UnicodeError):
        return "invalid UTF-8: half of a surrogate pair"
    if isinstance(error, RecursionError):
        return "nested too deep"
    text = f"no field {error}" if isinstance(error, KeyError) else str(error)
    return text.partition("\n")[0] or type(error).__name__


def _lines(chunks: Iterable[bytes], max_bytes: int) -> Rows:
    """The text of each line that is not blank, with at most `max_bytes` and one chunk in memory."""
    number, line, length = 1, b"", 0  # `line`: the line so far; of a long one its beginning
    for chunk in itertools.chain(chunks, [None]):
        for piece in [b""] if chunk is None else io.BytesIO(chunk):  # BytesIO divides at line feeds only
            length += len(piece)
            line = line + piece if length <= max_bytes else (line[:EXCERPT] + piece[:EXCERPT])[:EXCERPT]
            if piece.endswith(b"\n") or chunk is None:
                if line.strip() or length > max_bytes:
                    yield f"line {number}", _text_row(line.rstrip(b"\r\n"), length, max_bytes)
                number, line, length = number + 1, b"", 0


def _whole_text(chunks: Iterable[bytes], max_bytes: int) -> Rows:
    data = b""
    for chunk in chunks:
        data += chunk
        if len(data) > max_bytes:
            break
    yield "file", _text_row(data, len(data), max_bytes)


def _text_row(text: bytes, length: int, max_bytes: int) -> Row | BadRow:
    if text.startswith(_POINTER):
        return BadRow(reason=_IS_POINTER, excerpt=text[:EXCERPT])
    if length > max_bytes:
        return BadRow(reason=f"longer than {max_bytes:,} bytes", excerpt=text[:EXCERPT])
    if b"\0" in text:
        reason = "NUL bytes: UTF-16 without a byte-order mark, a compression without its suffix, or no text"
        return BadRow(reason=reason, excerpt=text[:EXCERPT])
    return {"text": text}


def _json(chunks: Iterator[bytes], max_bytes: int) -> Rows:
    """An object per line, or the elements of one array."""
    head = b""
    while not head.strip() and (chunk := next(chunks, b"")):
        head += chunk
    chunks = itertools.chain([head], chunks)
    parse = _elements if head.lstrip().startswith(b"[") else _lines
    for position, row in parse(chunks, max_bytes):
        yield position, row if isinstance(row, BadRow) else _object(row["text"])


def _object(source: bytes) -> Row | BadRow:
    try:
        row = json.loads(source.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        reason = bad_reason(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"not JSON: {reason}"
        if source.strip() == b"{":
            reason += "; an object may not go on over several lines (jq -c . writes one a line)"
        return BadRow(reason=reason, excerpt=source[:EXCERPT])
    if not isinstance(row, dict):
        return BadRow(reason=f"a JSON {type(row).__name__}, not an object", excerpt=source[:EXCERPT])
    return row


def _elements(chunks: Iterator[bytes], max_bytes: int) -> Rows:
    """The text of each element of a JSON array, with no more than one and a chunk in memory."""
    parse = json.JSONDecoder().raw_decode
    # Invalid UTF-8 passes here: each element is checked by itself.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text = decode(next(chunks))
    position, number = text.index("[") + 1, 1
    while True:
        separator = _SEPARATOR.match(text, position)
        start = separator.end() if separator else position
        if text.startswith("]", start):
            break
        try:
            _, position = parse(text, start)
        except (ValueError, RecursionError) as error:
            more = next(chunks, b"")  # the element may continue there
            if not more or len(text) - start > _MAX_ELEMENT:
                raise Unreadable(f"element {number} of its JSON array: {bad_reason(error)}") from error
            text, position = text[start:] + decode(more), 0
            continue
        source = text[start:position].encode("utf-8", "surrogateescape")
        yield f"element {number}", _text_row(source, len(source), max_bytes)
        number += 1
    if text[start + 1 :].strip() or any(chunk.strip() for chunk in chunks):
        raise Unreadable("it is a JSON array, and more follows")


def _parquet(path: str, columns: Sequence[str] | None, required: Sequence[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    row = 0
    with epath.Path(path).open("rb") as source:
        try:
            # With a small buffer, page by page: a row group may be larger than memory.
            file = pyarrow.parquet.ParquetFile(
                source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except (OSError, pyarrow.ArrowException) as error:
            lost = _damage(error).count_lost(0, path)
            source.seek(0)
            is_pointer = source.read(len(_POINTER)) == _POINTER
            reason = f"not Parquet: {_IS_POINTER if is_pointer else bad_reason(error)}"
            yield "file", BadRow(reason=reason, records=lost)
            return
        names = file.schema_arrow.names
        there = None if columns is None else [name for name in columns if name in names]
        missing = [name for name in required if not {name, name.partition(".")[0]} & set(names)]
        if missing and file.metadata.num_rows:
            reason = f"no column {missing[0]!r}; there are {', '.join(names)}"
            yield "file", BadRow(reason=reason, records=file.metadata.num_rows)
            return
        for group in range(file.metadata.num_row_groups):
            end, reason = row + file.metadata.row_group(group).num_rows, "it ends early"
            try:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=there, use_threads=False)
                for batch in batches:
                    for item in _batch_rows(batch):
                        yield f"row {row}", item
                        row += 1
            except (OSError, pyarrow.ArrowException) as error:
                reason = str(_damage(error))
            if row < end:
                yield f"row {row}", BadRow(reason=f"row group {group}: {reason}", records=end - row)
            row = end


def _damage(error: Exception) -> Unreadable:
    """Damage reported by pyarrow; disk and network errors, which have an errno, are raised again."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return Unreadable(bad_reason(error))


def _batch_rows(batch: Any) -> Iterator[Row | BadRow]:
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except Exception:  # Python cannot hold a value; time zone libraries raise many types
        for index in range(batch.num_rows):
            yield _row({name: batch.column(name)[index] for name in batch.schema.names})


def _row(scalars: Mapping[str, Any]) -> Row | BadRow:
    from pyarrow import types

    row = {}
    for name, scalar in scalars.items():
        try:
            row[name] = scalar.as_py(maps_as_pydicts="strict")
        except Exception as error:
            if not types.is_temporal(scalar.type):
                return BadRow(reason=f"column {name!r}: {bad_reason(error)}")
            # Outside the years 1 to 9999, or an unknown time zone: the stored number.
            row[name] = f"{scalar.value} {scalar.type}"
    return row
