"""The corpora that every machine has: code, prose and conversations from Python's own installation.

A corpus is a generator of documents in a fixed order. Every document has an origin, the file or chapter
that its text comes from, and the origin alone decides between training and validation: a module's code,
its docstrings and the conversations about it fall on the same side. Origins that share whole passages
(a copied class, two packages with the same news) are treated as one, and of equal documents only the
first is kept.
"""

import functools
import gzip
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from lemur_jax.prepare import conversations, stdlib

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.05  # of the origins

SYSTEM_DOCUMENTS = Path("/usr/share/doc")
SYSTEM_LICENSES = Path("/usr/share/common-licenses")
SYSTEM_FILE_LIMIT = 1 << 16  # bytes of one file; a change log of 30 years says little new after that
SYSTEM_TOTAL_LIMIT = 8 << 20
SHORTEST_PROSE = 300  # characters
PROSE_LETTERS = 0.75  # share of letters and spaces below which a text is a table or a picture

# Lines in a row that make two origins one. Code repeats itself more innocently than prose does.
SHARED_CODE_LINES = 10
SHARED_PROSE_LINES = 4


class Document(TypedDict):
    """One document. `text` is bytes where a file is not valid in its own encoding: `prepare` counts those."""

    id: str
    origin: str
    source: str
    meta: dict[str, str]
    text: NotRequired[str | bytes]
    messages: NotRequired[list[dict[str, str]]]


def python_stdlib() -> Iterator[Document]:
    """Code: the files of the standard library, tests included."""
    for path, full_path in stdlib.files():
        text = stdlib.read_source(full_path)
        if text.strip():
            yield _document(path, _module_origin(path), "python-stdlib", text=text)


@functools.cache
def _texts() -> tuple[Document, ...]:
    return (*_topics(), *_module_pages(), *_builtin_pages(), *_interpreter_texts(), *_system_texts())


def python_docs() -> Iterator[Document]:
    """Text: the language reference, docstrings, licence and news texts, documents of the system."""
    yield from _texts()


def python_chat() -> Iterator[Document]:
    """Conversations about the modules of the standard library and about the language reference."""
    seen: set[str] = set()
    for name, text in stdlib.topics().items():
        for index, messages in enumerate(conversations.about_topic(name, text, seen)):
            yield _document(
                f"topic/{name}/{index}",
                f"topic:{name}",
                "python-topics",
                messages=messages,
            )
    for module in stdlib.modules():
        for index, messages in enumerate(conversations.about_module(module, seen)):
            yield _document(
                f"module/{module.name}/{index}",
                _module_origin(module.path),
                "python-docstrings",
                messages=messages,
            )


CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
    "python_stdlib": python_stdlib,
    "python_docs": python_docs,
    "python_chat": python_chat,
}


def read(name: str, split: str) -> Iterator[Document]:
    """The documents of one split of a corpus, in order, none twice.

    Args:
      name: a key of `CORPORA`.
      split: "train" or "validation".
    """
    families = _families()
    for document in distinct(CORPORA[name]()):
        if split_of(families.get(document["origin"], document["origin"])) == split:
            yield document


@functools.cache
def count(name: str, split: str) -> int:
    """The number of documents that `read` gives."""
    return sum(1 for _ in read(name, split))


def split_of(family: str) -> str:
    """ "train" or "validation" for a family of origins: a hash of its name, nothing else."""
    digest = hashlib.sha256(family.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64 else "train"


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without those whose content came before."""
    seen = set()
    for document in documents:
        digest = content_digest(document)
        if digest not in seen:
            seen.add(digest)
            yield document


def content_digest(document: Document) -> bytes:
    """sha256 of what a document says, apart from space around it."""
    text = document["text"] if "text" in document else json.dumps(document["messages"])
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data.strip()).digest()


def link(documents: Iterable[tuple[str, str]], lines: int, families: dict[str, str]) -> None:
    """Joins origins whose texts share `lines` lines in a row, blank and very short lines apart.

    Args:
      documents: (origin, text).
      lines: how many consecutive equal lines make two origins one.
      families: origin -> name of its family, a member's; updated, `_root` reads it.
    """
    first_seen: dict[int, str] = {}
    for origin, text in documents:
        families.setdefault(origin, origin)
        hashes = [hash(line) for line in map(str.strip, text.splitlines()) if len(line) > 3]
        for start in range(len(hashes) - lines + 1):
            other = first_seen.setdefault(hash(tuple(hashes[start : start + lines])), origin)
            if other != origin:
                a, b = sorted((_root(families, origin), _root(families, other)))
                families[b] = a


def _root(families: dict[str, str], origin: str) -> str:
    while families[origin] != origin:
        families[origin] = families[families[origin]]
        origin = families[origin]
    return origin


@functools.cache
def _families() -> dict[str, str]:
    """Origin -> name of its family, over code and prose together."""
    families: dict[str, str] = {}
    for corpus, lines in ((python_stdlib, SHARED_CODE_LINES), (python_docs, SHARED_PROSE_LINES)):
        texts = ((document["origin"], document["text"]) for document in corpus())
        link(((origin, text) for origin, text in texts if isinstance(text, str)), lines, families)
    return {origin: _root(families, origin) for origin in families}


def fingerprint(name: str) -> str:
    """Changes whenever the corpus may have: with its files, the interpreter or the code that reads it."""
    digest = hashlib.sha256(f"{name} {platform.python_version()}".encode())
    for module in (stdlib, conversations, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    inputs = [*stdlib.files(), *stdlib.files(text=True), *_system_files()]
    for path, full_path in inputs:
        status = full_path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _document(
    id: str,
    origin: str,
    source: str,
    *,
    text: str | bytes = "",
    messages: list[dict[str, str]] | None = None,
    license: str = "PSF-2.0",
) -> Document:
    meta = {"license": license, "python": platform.python_version()}
    document = Document(id=id, origin=origin, source=source, meta=meta)
    if messages is None:
        document["text"] = text
    else:
        document["messages"] = messages
    return document


def _module_origin(path: str) -> str:
    """One origin for a module, its package file and its twins in C and in Python (`_io`, `_pyio`, `io`)."""
    stem = path.removesuffix(".py").removesuffix("/__init__")
    folder, _, name = stem.rpartition("/")
    twin = re.sub(r"^_(py(?=[a-z]))?(?!_)", "", name)
    return "module:" + (f"{folder}/{twin}" if folder else twin)


def _topics() -> Iterator[Document]:
    for name, text in stdlib.topics().items():
        yield _document(f"topic/{name}", f"topic:{name}", "python-topics", text=text.strip())


def _module_pages() -> Iterator[Document]:
    """One page a module: its docstring, then those of its classes and functions, each text once."""
    seen: set[str] = set()
    for module in stdlib.modules():
        named = [(item.name + item.signature, item.docstring) for item in module.definitions]
        text = _page(module.name, module.docstring, named, seen)
        if len(text) >= SHORTEST_PROSE:
            origin = _module_origin(module.path)
            yield _document(f"module/{module.name}", origin, "python-docstrings", text=text)


def _builtin_pages() -> Iterator[Document]:
    seen: set[str] = set()
    for name, docstring, named in stdlib.builtin_docstrings():
        text = _page(name, docstring, named, seen)
        if len(text) >= SHORTEST_PROSE:
            origin = _module_origin(name)
            yield _document(f"builtin/{name}", origin, "python-docstrings", text=text)


def _page(title: str, introduction: str, named: Iterable[tuple[str, str]], seen: set[str]) -> str:
    parts = [title, introduction] if introduction else [title]
    for name, docstring in named:
        if len(docstring) >= conversations.SHORTEST_ANSWER and docstring not in seen:
            seen.add(docstring)
            parts.append(f"{name}\n\n{docstring}")
    return "\n\n\n".join(parts) if len(parts) > 1 else ""


def _interpreter_texts() -> Iterator[Document]:
    for path, full_path in stdlib.files(text=True):
        text = _prose(full_path)
        if text:
            yield _document(f"text/{path}", f"text:{path}", "python-texts", text=text)


def _system_texts() -> Iterator[Document]:
    total = 0
    for path, full_path in _system_files():
        text = _prose(full_path)
        total += len(text.encode())
        if total > SYSTEM_TOTAL_LIMIT:
            return
        if text:
            package = re.sub(r"^lib", "", path.split("/")[1])
            name = re.split(r"[^a-zA-Z]", package)[0] or package  # python3.11-doc, python3-yaml: one origin
            yield _document(
                f"system/{path}", f"system:{name}", "system-documents", text=text, license="various"
            )


def _system_files() -> list[tuple[str, Path]]:
    """(path below /usr/share, path) of the README and NEWS files and licences that the system installs."""
    found = []
    for base, pattern in ((SYSTEM_DOCUMENTS, r"(README|NEWS)(?!.*\.html?\b).*"), (SYSTEM_LICENSES, r".*")):
        for folder, _, names in os.walk(base):
            for path in (Path(folder) / name for name in names):
                if re.fullmatch(pattern, path.name) and os.path.isfile(path) and not path.is_symlink():
                    found.append((f"{base.name}/{path.relative_to(base).as_posix()}", path))
    return sorted(found)


def _prose(path: Path) -> str:
    """The beginning of a text file up to its last whole paragraph; "" if it is unreadable or not prose."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            data = file.read(SYSTEM_FILE_LIMIT + 1)
        if len(data) > SYSTEM_FILE_LIMIT:
            data = data[: max(data.rfind(b"\n\n"), data.rfind(b"\n", 0, SYSTEM_FILE_LIMIT // 2), 0)]
        text = data.decode("utf-8").strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return text if len(text) >= SHORTEST_PROSE and letters >= PROSE_LETTERS * len(text) else ""
