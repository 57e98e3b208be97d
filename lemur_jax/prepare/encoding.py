"""Documents to token ids, in worker processes.

The processes are spawned, and import neither TensorFlow nor JAX. Results come in the order of the records for any
number of workers, and only a few chunks are in memory.
"""

import array
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import digest_of
from lemur_jax.data.manifest import REJECTED
from lemur_jax.prepare.cleaning import NO_STEPS, Removed, filters
from lemur_jax.prepare.code_layout import encode_pieces, layout, separators
from lemur_jax.text.chat_template import THOUGHTS, encode_chat, is_trained
from lemur_jax.text.tokenizer import Tokenizer

# The features of one document of a task; a None among records ends a shard.
Record = Mapping[str, bytes]
Records = Iterable[Record | None]

_CONTENT_KEYS = (*THOUGHTS, "content", "tool_calls")  # of a message
_BESIDE_MESSAGES = ("tools", "chat_template_kwargs")
_KEPT = ("text", "messages", "preferences", "id", "source", "meta")  # of a bad record
CHUNK_BYTES = 1 << 18
CHUNK_RECORDS = 256
_SPAWN = multiprocessing.get_context("spawn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """A document for a store."""

    id: str
    tokens: np.ndarray  # uint32 [n]; for text between the separators
    mask: np.ndarray | None  # uint8 [n], 1 on supervised targets; None for text
    # UTF-8 bytes of the text and its repository header; of a conversation, those of its supervised tokens
    n_bytes: int
    fingerprints: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # of `Filters.fingerprints`
    label: str = ""  # the value of its label field


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that cannot be used; `where`: file and position, `records`: how many it stands for."""

    id: str
    reason: str
    record: dict[str, str]
    where: str = ""
    records: int = 1


Result = Encoded | BadRecord | Removed
Results = Iterator[Result | None]


def encode(tokenizer: Tokenizer, record: Record, steps: str = NO_STEPS) -> Result:
    """Cleans and tokenizes one document: string features as UTF-8 bytes; `steps` as of `cleaning.parse_steps`."""
    name = record.get("id", b"").decode("utf-8", "backslashreplace")
    if record.get("error"):
        return _bad_record(record, name, **json.loads(record["error"]))
    try:
        content, messages, text = read_content(record)
        if content == "text" and not text.strip():  # e.g. an empty __init__.py
            return Removed(step="empty_texts", reason="nothing but space", id=name, excerpt="")
        meta = json.loads(record.get("meta") or b"{}")
        if not isinstance(meta, dict):
            raise ValueError("meta is not a JSON object")
        cleaning = filters(steps)
        removed = cleaning.remove(name, text, meta)
        if removed is not None:
            return removed
        extra: dict[str, Any] = {}
        if cleaning.steps:
            sides = messages if content == "preferences" and isinstance(messages, dict) else {"": messages}
            said = {f"{side}{_context(each)}": conversation_text(each) for side, each in sides.items()}
            texts = {"": text} if content == "text" else said
            extra = {"fingerprints": cleaning.fingerprints(texts), "label": cleaning.label(meta)}
        if content == "preferences":
            return _encode_preferences(tokenizer, messages, name, extra)
        if content == "messages":
            return _encode_messages(tokenizer, messages, name, extra)
    except (ValueError, UserError) as error:
        return _bad_record(record, name, "invalid UTF-8" if isinstance(error, UnicodeError) else str(error))
    pieces = layout(text, meta, name, cleaning.steps)
    begin, end = separators(tokenizer, cleaning.steps)
    ids = [*begin, *encode_pieces(tokenizer, pieces), *end]
    # NumPy takes three times as long for a list as for a Python array.
    tokens = np.frombuffer(array.array("I", ids), np.uint32)
    n_bytes = sum(len(piece.encode()) for piece, is_control in pieces if not is_control)
    return Encoded(id=name, tokens=tokens, mask=None, n_bytes=n_bytes, **extra)


def read_content(record: Record) -> tuple[str, Any, str]:
    """(which feature has a document's content, its JSON value, the text); ValueError: it is not UTF-8 or JSON."""
    for content in ("messages", "preferences"):
        if content in record:
            messages = _messages(record[content])
            return content, messages, conversation_text(messages)
    return "text", None, record["text"].decode("utf-8")


def _bad_record(record: Record, name: str, reason: str, records: int = 1) -> BadRecord:
    fields = {key: value.decode("utf-8", "backslashreplace") for key, value in record.items() if key in _KEPT}
    where = record.get("where", b"").decode("utf-8", "backslashreplace")
    return BadRecord(id=name, reason=reason, record=fields, where=where, records=records)


def _messages(data: bytes) -> Any:
    try:
        messages = json.loads(data.decode("utf-8"))
        json.dumps(messages, ensure_ascii=False).encode()  # refuses lone surrogates
    except json.JSONDecodeError as error:
        raise ValueError(f"messages are not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("messages are nested too deep") from error
    return messages


def conversation_text(messages: Any) -> str:
    """The text of a conversation with thoughts and calls (without random ids); "" if malformed (refused later)."""
    if isinstance(messages, Mapping):
        sides = [value for key, value in messages.items() if key not in _BESIDE_MESSAGES]
        return "\n\n".join(map(conversation_text, sides))
    if not isinstance(messages, list | tuple):
        return ""
    said = [message.get(key) for message in messages if isinstance(message, Mapping) for key in _CONTENT_KEYS]
    parts = (part if isinstance(part, str) else _calls(part) for part in said if part)
    return "\n\n".join(parts).strip()


def _context(conversation: Any) -> str:
    """A digest of what changes a conversation's tokens or targets beside its text; "": nothing does."""
    given = conversation if isinstance(conversation, Mapping) else {"messages": conversation}
    context = {key: given[key] for key in _BESIDE_MESSAGES if given.get(key)}
    messages = given.get("messages")
    turns = [turn for turn in messages if isinstance(turn, Mapping)] if isinstance(messages, list) else []
    context["untrained"] = [index for index, turn in enumerate(turns) if not is_trained(turn)]
    context["names"] = [turn["name"] for turn in turns if turn.get("name")]
    return digest_of(context) if any(context.values()) else ""


def _calls(calls: Any) -> str:
    items = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function", call) if isinstance(call, dict) else call for call in items]
    return json.dumps(functions, ensure_ascii=False)


def _encode_messages(tokenizer: Tokenizer, messages: Any, name: str, extra: Mapping[str, Any]) -> Encoded:
    beside: dict[str, Any] = {}
    if isinstance(messages, dict) and set(messages) <= {"messages", *_BESIDE_MESSAGES}:
        beside = {key: messages[key] for key in _BESIDE_MESSAGES if messages.get(key)}
        messages = messages.get("messages")
    ids, mask = encode_chat(tokenizer, messages, **beside)
    for message in messages:
        has_content = message["content"].strip() or message.get("tool_calls")
        if message["role"] == "assistant" and is_trained(message) and not has_content:
            raise ValueError("a turn of the assistant is empty")
    supervised = [index for index, flag in zip(ids, mask, strict=True) if flag]
    n_bytes = len(tokenizer.decode(supervised, skip_special=True).encode())
    tokens, flags = np.array(ids, np.uint32), np.array(mask, np.uint8)
    return Encoded(id=name, tokens=tokens, mask=flags, n_bytes=n_bytes, **extra)


def _encode_preferences(tokenizer: Tokenizer, pair: Any, name: str, extra: Mapping[str, Any]) -> Encoded:
    """The chosen conversation, then the rejected one, whose first mask entry is `REJECTED`: it is no target."""
    keys = [key for key in ("chosen", "rejected") if isinstance(pair, dict) and pair.get(key)]
    if not keys or pair.get("chosen") == pair.get("rejected"):
        raise ValueError("preferences need a chosen or a rejected conversation, which differ")
    conversations = {key: _encode_messages(tokenizer, pair[key], name, {}) for key in keys}
    tokens = np.concatenate([conversation.tokens for conversation in conversations.values()])
    mask = np.concatenate([np.asarray(conversation.mask) for conversation in conversations.values()])
    if "rejected" in conversations:
        mask[-len(conversations["rejected"].tokens)] = REJECTED
    n_bytes = sum(conversation.n_bytes for conversation in conversations.values())
    return Encoded(id=name, tokens=tokens, mask=mask, n_bytes=n_bytes, **extra)


# encode(records, steps): results in order; a None is passed on.
Encode = Callable[[Records, str], Results]


@contextlib.contextmanager
def encoder(tokenizer: Tokenizer, workers: int) -> Iterator[Encode]:
    """A function that cleans and tokenizes records, in order, in `workers` processes (1: in this one).

    It raises UserError when a worker process died.
    """
    if workers == 1:
        yield lambda records, steps=NO_STEPS: _encode_records(tokenizer, records, steps)
        return
    processes: list[tuple[BaseProcess, Connection]] = []
    local = threading.local()

    def encode_chunk(chunk: list[Record | None], steps: str) -> list[Result | None]:
        """Runs in a thread, which has a process of its own: a ProcessPoolExecutor would wait forever for the rest
        of a result if a process died while writing it."""
        if not hasattr(local, "pipe"):
            local.pipe, worker_pipe = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_run_worker, args=(worker_pipe, tokenizer), daemon=True)
            process.start()
            worker_pipe.close()
            processes.append((process, local.pipe))
        try:
            local.pipe.send((chunk, steps))
            return local.pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                "a process that tokenizes documents died; if it says nothing above, most likely for lack of memory:"
                f" lower prepare.workers (now {workers})"
            ) from error

    def encode_all(records: Records, steps: str = NO_STEPS) -> Results:
        pending: collections.deque[Future] = collections.deque()
        for chunk in _chunks(records):
            pending.append(threads.submit(encode_chunk, chunk, steps))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    threads = ThreadPoolExecutor(workers)
    try:
        yield encode_all
    finally:
        threads.shutdown(cancel_futures=True)
        for process, pipe in processes:
            pipe.close()
            process.join()


def _encode_records(tokenizer: Tokenizer, records: Records, steps: str) -> Results:
    for record in records:
        yield None if record is None else encode(tokenizer, record, steps)


def _chunks(records: Records) -> Iterator[list[Record | None]]:
    """The records in chunks of about `CHUNK_BYTES`."""
    chunk: list[Record | None] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += sum(map(len, record.values())) if record is not None else 0
        if size >= CHUNK_BYTES or len(chunk) == CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _run_worker(pipe: Connection, tokenizer: Tokenizer) -> None:
    """A worker process: encodes chunks until its parent closes the pipe, or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops its workers
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            chunk, steps = pipe.recv()
            pipe.send(list(_encode_records(tokenizer, chunk, steps)))
