"""Documents out of files, without TensorFlow: JSON Lines, text and Parquet, local or on gs://.

Two steps. `rows` gives what stands in a file, row by row, with the place of each; `documents` makes the
string features of a document of each by a field map. A row that cannot be used does not raise and does
not vanish: it becomes a document with a reason in `error`, which `prepare` counts and puts aside.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
MAX_GATHERED = 10_000  # rows of one document
_READ_BYTES = 1 << 20
_BATCH_ROWS = 64
EXCERPT = 500  # bytes of a bad record that are kept

Row = Mapping[str, Any]
Document = dict[str, bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Where in a row the parts of a document are; a dot goes into nested fields (`meta.repo`).

    Attributes:
      text: the field that holds the text.
      messages: for chat, instead of text: a function from a row to messages, e.g. `chat_sources.sharegpt`.
      id: the document's name; "": its file and position.
      meta: fields kept as metadata, under their own names; filters and code layout read them.
      group: documents with the same value here are held out together, e.g. a repository's; "": each alone.
      gather: rows that follow each other with the same value here are one document, for `messages`: its
        row is the first one with all of them as `rows`. "": each row is one.
    """

    text: str = "text"
    messages: Callable[[Row], Sequence[Mapping[str, Any]]] | None = None
    id: str = ""
    meta: tuple[str, ...] = ()
    group: str = ""
    gather: str = ""

    @property
    def content(self) -> str:
        return "text" if self.messages is None else "messages"


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
            found |= {path} if not path.is_dir() else {file for file in path.glob("*") if not file.is_dir()}
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


def documents(
    path: str, found: Iterable[tuple[str, Row | Bad]], fields: Fields
) -> Iterator[tuple[Document, bytes]]:
    """(document, key that decides whether it is held out) of each row.

    A document has the string features `text` or `messages`, `id`, `meta` (JSON), `where`, and `error`:
    empty, or JSON with the reason why it cannot be used and how many records that stands for.
    """
    for position, row in gather(found, fields.gather) if fields.gather else found:
        where = f"{path}: {position}"
        if isinstance(row, Bad):
            bad = row
        else:
            try:
                yield _document(row, fields, where)
                continue
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
                bad = Bad(reason=_reason(error), excerpt=repr(row)[:EXCERPT].encode("utf-8", "replace"))
        failure = json.dumps({"reason": bad.reason, "records": bad.records})
        features = {fields.content: bad.excerpt, "id": where, "meta": "{}", "where": where, "error": failure}
        yield {key: _bytes(value) for key, value in features.items()}, where.encode()


def gather(found: Iterable[tuple[str, Row | Bad]], name: str) -> Iterator[tuple[str, Row | Bad]]:
    """Rows that follow each other with the same value in a field as one, at the place of the first.

    Bad rows, those without the field among them, come out as they are.
    """
    held: list[Row] = []
    place, value, count = "", None, 0
    for position, row in found:
        if isinstance(row, Bad) or name not in row:
            yield position, row if isinstance(row, Bad) else Bad(reason=f"no field {name!r}")
            continue
        if count and row[name] != value:
            yield place, _joined(held, count, name)
            held, count = [], 0
        if not count:
            place, value = position, row[name]
        count += 1
        if count <= MAX_GATHERED:
            held.append(row)
    if count:
        yield place, _joined(held, count, name)


def _joined(rows: Sequence[Row], count: int, name: str) -> Row | Bad:
    if count > MAX_GATHERED:
        return Bad(reason=f"{count:,} rows have one {name!r}, more than {MAX_GATHERED:,}", records=count)
    return {**rows[0], "rows": rows}


def is_held_out(key: bytes, share: float) -> bool:
    """Whether a document with this key is among the `share` that is kept from training."""
    digest = hashlib.sha256(key).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _document(row: Row, fields: Fields, where: str) -> tuple[Document, bytes]:
    if fields.messages is not None:
        content = json.dumps(list(fields.messages(row)), ensure_ascii=False).encode()
    else:
        content = _text(_look_up(row, fields.text), fields.text)
    id = _look_up(row, fields.id) if fields.id else where
    meta = {name: _plain(_look_up(row, name, None)) for name in fields.meta}
    key = (
        _bytes(str(_look_up(row, fields.group))) if fields.group else hashlib.sha256(content.strip()).digest()
    )
    features = {
        fields.content: content,
        "id": id if isinstance(id, str | bytes) else str(id),
        "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True, default=str),
        "where": where,
        "error": "",
    }
    return {name: _bytes(value) for name, value in features.items()}, key


_NOTHING = object()


def _look_up(row: Row, name: str, default: Any = _NOTHING) -> Any:
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if isinstance(value, str) and value.startswith("{"):  # RedPajama's Parquet spells metadata as JSON
            value = json.loads(value)
        if not isinstance(value, Mapping) or part not in value:
            if default is _NOTHING:
                raise ValueError(f"no field {name!r}; there are {', '.join(map(str, row))}")
            return default
        value = value[part]
    return value


def _text(value: Any, name: str) -> bytes:
    if isinstance(value, bytes):
        value.decode("utf-8")
        return value
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, not a string")
    return value.encode("utf-8")


def _plain(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace")


def _reason(error: Exception) -> str:
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
        reason = _reason(error)
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
            Bad(reason=f"the file cannot be read on: {_reason(error)}", excerpt=held[:EXCERPT]),
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
        return Bad(reason=f"the file cannot be read on: {_reason(error)}", excerpt=data[:EXCERPT])
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
            yield "file", Bad(reason=f"not Parquet: {_reason(error)}")
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
                yield f"row {row}", Bad(reason=f"row group {group}: {_reason(error)}", records=end - row)
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
