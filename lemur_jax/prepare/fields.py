"""Rows to documents: where in a row its text, name and metadata are.

A row that cannot be used becomes a document with a reason in `error`, which `prepare` counts and puts aside.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.prepare.encoding import conversation_text
from lemur_jax.prepare.readers import EXCERPT, BadRow, Row, Rows, bad_reason

logger = logging.getLogger(__name__)

MAX_GATHERED = 10_000  # rows of one document

Document = dict[str, bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Where in a row the parts of a document are; a dot selects nested fields (`meta.repo`).

    Attributes:
      text: the field of the text.
      messages: for chat, instead of text: a function from a row to messages, e.g. `conversation_formats.sharegpt`, or
        to {"messages": messages, "tools": OpenAI's tools, "chat_template_kwargs": variables of the chat template};
        bytes in the row, which TFDS and TFRecord have, are strings where they are UTF-8.
      preferences: instead of both: a function from a row to {"chosen": messages, "rejected": messages}, or one of them,
        e.g. `conversation_formats.preference`.
      id: the document's name; "", or null in a row: its file and position.
      meta: fields kept as metadata under their own names, for filters and code layout.
      group: documents with the same value are held out together, e.g. a repository's; "", or null in a row: each
        by itself.
      gather: consecutive rows with the same value are one document, for `messages`: the first row, with all of them
        as `rows`. "": each row is one.
    """

    text: str = "text"
    messages: Callable[[Row], Sequence[Mapping[str, Any]] | Mapping[str, Any]] | None = None
    preferences: Callable[[Row], Mapping[str, Any]] | None = None
    id: str = ""
    meta: tuple[str, ...] = ()
    group: str = ""
    gather: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.meta, str):
            raise UserError(f"Fields(meta={self.meta!r}) is a string: write a tuple, ({self.meta!r},)")
        if self.messages is not None and self.preferences is not None:
            raise UserError("Fields has messages and preferences: name one, a task has one content")
        if self.gather and self.content == "text":
            raise UserError(
                f"Fields(gather={self.gather!r}) would keep the text of each document's first row alone: name a"
                " function in messages that joins its `rows`"
            )

    @property
    def content(self) -> str:
        if self.preferences is not None:
            return "preferences"
        return "text" if self.messages is None else "messages"


def to_documents(path: str, rows: Rows, fields: Fields) -> Iterator[tuple[Document, bytes]]:
    """(document, key that decides whether it is held out) of each row.

    A document has the string features `text` or `messages`, `id`, `meta` (JSON), `where`, and `error`: empty, or JSON
    with the reason and the number of records that it stands for.
    """
    absent, is_read = set(fields.meta), False
    for position, row in gather(rows, fields.gather) if fields.gather else rows:
        where = f"{path}: {position}"
        if isinstance(row, BadRow):
            bad = row
        else:
            try:
                absent -= {name for name in absent if _look_up(row, name, _ABSENT) is not _ABSENT}
                is_read = True
                yield _document(row, fields, where)
                continue
            except OSError:
                raise
            except Exception as error:  # functions of the user may raise anything
                bad = BadRow(reason=bad_reason(error), excerpt=repr(row)[:EXCERPT].encode("utf-8", "replace"))
        failure = json.dumps({"reason": bad.reason, "records": bad.records})
        features = {fields.content: bad.excerpt, "id": where, "meta": "{}", "where": where, "error": failure}
        yield {key: _bytes(value) for key, value in features.items()}, where.encode()
    if absent and is_read:
        _warn_of_absent(", ".join(sorted(absent)))


@functools.cache  # once, not for each of many files
def _warn_of_absent(names: str) -> None:
    logger.warning("no row of a file has the metadata field %s: is it misspelled in Fields(meta=...)?", names)


def gather(rows: Rows, name: str) -> Rows:
    """Merges consecutive rows with the same value in a field, at the place of the first; passes bad rows on."""
    group: list[Row] = []
    start, value, count = "", None, 0
    for position, row in rows:
        if not isinstance(row, BadRow) and _is_missing(row.get(name)):
            row = BadRow(reason=f"no field {name!r}, or it is empty")
        if isinstance(row, BadRow):
            yield position, row
            continue
        if count and row[name] != value:
            yield start, _joined(group, count, name)
            group, count = [], 0
        if not count:
            start, value = position, row[name]
        count += 1
        if count <= MAX_GATHERED:
            group.append(row)
    if count:
        yield start, _joined(group, count, name)


def _joined(rows: Sequence[Row], count: int, name: str) -> Row | BadRow:
    if count > MAX_GATHERED:
        return BadRow(reason=f"{count:,} rows have one {name!r}, more than {MAX_GATHERED:,}", records=count)
    return {**rows[0], "rows": rows}


def is_held_out(key: bytes, share: float) -> bool:
    """Whether a document with this key belongs to the held-out `share`."""
    digest = hashlib.sha256(key).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _document(row: Row, fields: Fields, where: str) -> tuple[Document, bytes]:
    if convert := fields.preferences or fields.messages:
        converted = convert(_plain(row))
        converted = converted if isinstance(converted, Mapping) else list(converted)
        content, text = json.dumps(converted, ensure_ascii=False).encode(), conversation_text(converted)
    else:
        text = _look_up(row, fields.text)
        text = text.decode() if isinstance(text, bytes) else text
        if not isinstance(text, str):
            raise ValueError(f"field {fields.text!r} is {type(text).__name__}, not a string")
        content = text.encode()
    id = _look_up(row, fields.id) if fields.id else None
    meta = {name: _plain(_look_up(row, name, None)) for name in fields.meta}
    group = _look_up(row, fields.group) if fields.group else None
    # As `exact_duplicates` compares texts, whatever they stand with (sides of preferences, tools).
    key = hashlib.sha256(text.strip().encode()).digest() if _is_missing(group) else _bytes(str(group))
    features = {
        fields.content: content,
        "id": where if _is_missing(id) else id if isinstance(id, str | bytes) else str(id),
        "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True, default=_as_text),
        "where": where,
        "error": "",
    }
    return {name: _bytes(value) for name, value in features.items()}, key


def _is_missing(value: Any) -> bool:
    """Whether a value is null, NaN (pandas' null) or empty."""
    return value is None or value != value or value in ("", b"", [])


_NOTHING, _ABSENT = object(), object()


def _look_up(row: Row, name: str, default: Any = _NOTHING) -> Any:
    value: Any = row
    for key in [name] if name in row else name.split("."):
        if isinstance(value, str) and value.startswith("{"):  # RedPajama's Parquet has metadata as JSON
            value = json.loads(value)
        if not isinstance(value, Mapping) or key not in value:
            if default is _NOTHING:
                raise ValueError(f"no field {name!r}; there are {', '.join(map(str, row))}")
            return default
        value = value[key]
    return value


def _plain(value: Any) -> Any:
    """A value with text in place of the bytes that TFDS and TFRecord have, where they are UTF-8, and null for NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    return value if value == value else None  # NaN is pandas' null


def _as_text(value: Any) -> str:
    """Values that JSON has no type for, as text: bytes and times."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace")
