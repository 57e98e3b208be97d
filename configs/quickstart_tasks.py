"""The quickstart's corpora as seqio tasks: code, prose and conversations out of Python's standard library.

    python_stdlib   code: the library's source files
    python_docs     prose: chapters of the language reference, as `help()` shows them, and docstrings
    python_chat     conversations: questions about modules, functions and chapters, answered from these
    python_pairs    preferences: the first answer of each conversation, and as rejected that of the one before

The documents depend on the version of Python alone. What distributions package separately (tests, tkinter and
others) is left out, so that installing a package changes nothing.

Held out for validation are whole modules with their code, docstrings and conversations, and whole chapters. A
training document that repeats a passage or an answer of these is left out.

To write tasks of your own in this way, copy `add_generator` at the end; files need no code (`add_files`, docs/data.md).
"""

import ast
import functools
import hashlib
import json
import platform
import random
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from lemur_jax.prepare.fields import is_held_out
from lemur_jax.prepare.tasks import add_generator
from lemur_jax.rl.games import MOVES, tasks

VALIDATION_SHARE = 0.1  # of the modules and chapters
# A training document that shares this many consecutive lines with a held-out one is left out.
SHARED_LINES = 6

# Tests, what distributions package separately or add, tables, and the file that holds the chapters.
EXCLUDED = re.compile(
    r"(.*/)?(test|tests|idle_test|site-packages|dist-packages|__pycache__)/.*"
    r"|(distutils|encodings|ensurepip|idlelib|lib2to3|pydoc_data|tkinter|turtledemo)/.*"
    r"|turtle\.py|_sysconfigdata.*|(site|user)customize\.py"
)

SHORTEST_ANSWER = 40  # characters
LONGEST_ANSWER = 900
LONGEST_TASK = 400
LONGEST_CONVERSATION = 1500  # nine of ten are shorter than 512 tokens of a 4,000-piece BPE

SYSTEM = (
    "You are Lemur, an assistant who knows natural language and code.",
    "You are a helpful assistant for Python programmers.",
    "Answer questions about Python's standard library, briefly and exactly.",
    "You are an experienced Python developer. Give working code when code is asked for.",
)
ASK_MODULE = (
    "What is the Python module `{module}` for?",
    "Describe the module `{module}` of Python's standard library.",
    "What does the `{module}` module provide?",
    "I came across `{module}` in Python. What is it?",
)
ASK_EXPLANATION = (
    "What does `{name}{signature}` in Python's `{module}` module do?",
    "Explain `{module}.{name}{signature}`.",
    "How is `{name}{signature}` from the module `{module}` meant to be used?",
    "I am reading the module `{module}`. What is `{name}{signature}`?",
)
ASK_CODE = (
    "Write a Python {kind} `{name}{signature}`: {task}",
    "Implement this Python {kind}.\n\n`{name}{signature}`\n\n{task}",
    "I need a {kind} `{name}{signature}` in Python. {task}",
    "Complete the {kind} `{name}{signature}` with this docstring:\n\n{task}",
)
ASK_CHAPTER = (
    "What does Python's documentation say about {title}?",
    "Explain this topic of the Python language reference: {title}.",
    "I want to understand {title} in Python. What does the reference say?",
)

Choice = TypeVar("Choice")


class Document(NamedTuple):
    """A document before it is written out.

    Attributes:
      origin: its module or chapter, which decides whether it is held out.
      id: its name.
      parts: (heading or question, text) each; a part that repeats another document's is left out.
    """

    origin: str
    id: str
    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A function, method or class with a docstring; `source`, without the docstring, is "" for a class."""

    name: str  # "JSONEncoder.encode"
    signature: str  # "(self, o)"
    docstring: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Module:
    """A source file of the library."""

    path: str  # "json/encoder.py"
    text: str
    docstring: str
    definitions: tuple[Definition, ...]

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def origin(self) -> str:
        """The top package, the same for twins such as `_pydecimal` and `decimal`."""
        top = self.name.partition(".")[0]
        return re.sub(r"^(_(py(?=[a-z]))?|c(?=Profile))(?!_)", "", top).lower()


@functools.cache
def modules() -> tuple[Module, ...]:
    """The modules of the standard library, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root).as_posix()
        if not EXCLUDED.fullmatch(path):
            with tokenize.open(file) as opened:  # in the encoding that the file declares
                found.append(read_module(path, opened.read()))
    return tuple(sorted((module for module in found if module.text.strip()), key=lambda module: module.path))


def read_module(path: str, text: str) -> Module:
    """Parses a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old sources
        tree = ast.parse(text)
    definitions = tuple(_definitions(tree, text.split("\n"), ""))
    return Module(path=path, text=text, docstring=ast.get_docstring(tree) or "", definitions=definitions)


def _definitions(block: ast.AST, lines: Sequence[str], prefix: str) -> Iterator[Definition]:
    for node in ast.iter_child_nodes(block):
        if isinstance(node, ast.If | ast.Try):
            yield from _definitions(node, lines, prefix)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name, signature, source = prefix + node.name, "", ""
            if not isinstance(node, ast.ClassDef):
                signature, source = f"({ast.unparse(node.args)})", _without_docstring(node, lines)
            if docstring := ast.get_docstring(node):
                yield Definition(name=name, signature=signature, docstring=docstring, source=source)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, lines, f"{name}.")


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """A function as it stands in the file, dedented; "" if it has no more than a docstring."""
    if len(node.body) == 1 or node.body[1].lineno <= (node.body[0].end_lineno or 0):
        return ""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = [*lines[first - 1 : node.body[0].lineno - 1], *lines[node.body[0].end_lineno : node.end_lineno]]
    return textwrap.dedent("\n".join(kept)).strip()


@functools.cache
def chapters() -> dict[str, str]:
    """The chapters of the language reference that `help()` shows, by name."""
    from pydoc_data.topics import topics

    return {name: topics[name].strip() for name in sorted(topics)}


def code() -> Iterator[Document]:
    """A document a source file."""
    for module in modules():
        yield Document(module.origin, module.path, [("", module.text)])


def prose() -> Iterator[Document]:
    """A document a chapter, and one a module: its docstring, then those of its classes and functions."""
    for name, text in chapters().items():
        yield Document(f"chapter {name}", f"chapter/{name}", [("", text)])
    for module in modules():
        parts = [(module.name, module.docstring)]
        parts += [(item.name + item.signature, item.docstring) for item in module.definitions]
        parts = [part for part in parts if len(part[1]) >= SHORTEST_ANSWER]
        yield Document(module.origin, f"module/{module.name}", parts)


def conversations() -> Iterator[Document]:
    """One question and answer about a section of a chapter, or one to three about a module."""
    for name, text in chapters().items():
        for title, body in _sections(text):
            title = re.sub(r"^(The|A|An)\b", lambda match: match[0].lower(), title)
            turn = _choose(ASK_CHAPTER, title).format(title=title), first_paragraphs(body, LONGEST_ANSWER)
            if len(turn[1]) >= SHORTEST_ANSWER:
                yield Document(f"chapter {name}", f"chapter/{name}/{title}", [turn])
    for module in modules():
        turns = list(_turns(module))
        while turns:
            chosen, length = turns[:1], len("".join(turns[0]))
            for turn in turns[1 : 1 + _choose((0, 0, 0, 1, 1, 2), f"{module.path} {turns[0][0]}")]:
                length += len("".join(turn))
                if length > LONGEST_CONVERSATION:
                    break
                chosen.append(turn)
            turns = turns[len(chosen) :]
            yield Document(module.origin, f"module/{module.name}/{len(turns)}", chosen)


def _turns(module: Module) -> Iterator[tuple[str, str]]:
    """(question, answer): what a module is for, what its parts do, how they are written."""
    introduction = first_paragraphs(module.docstring, LONGEST_ANSWER)
    if len(introduction) >= SHORTEST_ANSWER:
        yield _choose(ASK_MODULE, module.path).format(module=module.name), introduction
    for item in module.definitions:
        key = f"{module.path} {item.name}"
        explanation, task = (first_paragraphs(item.docstring, n) for n in (LONGEST_ANSWER, LONGEST_TASK))
        kind = "method" if "." in item.name else "function"
        words = {"module": module.name, "name": item.name, "signature": item.signature, "kind": kind}
        if len(explanation) >= SHORTEST_ANSWER and _choose((True, True, False), f"explain {key}"):
            yield _choose(ASK_EXPLANATION, key).format(**words), explanation
        writes = task and SHORTEST_ANSWER <= len(item.source) <= LONGEST_ANSWER
        if writes and _choose((True, True, False), f"write {key}"):
            yield _choose(ASK_CODE, key).format(**words, task=task), f"```python\n{item.source}\n```"


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, text) of the sections of a chapter; a title is a line underlined with *, = or -."""
    parts = re.split(r"^(?=[^\n]+\n([*=-])\1{2,}$)", text, flags=re.MULTILINE)
    for part in parts[::2]:  # between the parts, re.split gives the character of the underline
        title, _, rest = part.partition("\n")
        yield title.strip(), rest.partition("\n")[2].strip()


def first_paragraphs(text: str, limit: int) -> str:
    """As many whole paragraphs from the beginning as fit into `limit` characters; "" if not even one."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > limit:
            return re.sub(r"\n\n[^\n]*(\n[^\n]+)*:$", "", kept)  # not one that announces what was cut off
        kept = longer
    return kept


def _choose(options: Sequence[Choice], key: str) -> Choice:
    """An option by a hash of `key`: the corpora are the same in every process."""
    digest = hashlib.sha256(key.encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


CORPORA = {"python_stdlib": code, "python_docs": prose, "python_chat": conversations}


def _held_out(document: Document) -> bool:
    return is_held_out(document.origin.encode(), VALIDATION_SHARE)


def _passages(text: str) -> set[int]:
    """Hashes of the text itself and of each run of `SHARED_LINES` lines, very short lines apart."""
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) > 3]
    runs = {hash(tuple(lines[start:][:SHARED_LINES])) for start in range(len(lines) - SHARED_LINES + 1)}
    return runs | {hash(text.strip())}


@functools.cache
def _held_out_passages() -> frozenset[int]:
    """Passages of all three corpora that no training document may have."""
    held_out = (document for corpus in CORPORA.values() for document in corpus() if _held_out(document))
    return frozenset().union(*(_passages(text) for document in held_out for _, text in document.parts))


def documents(name: str, split: str) -> Iterator[dict[str, str]]:
    """The documents of a split of a corpus, as a task gives them; no part comes twice."""
    seen = set(_held_out_passages()) if split == "train" else set[int]()
    for document in CORPORA[name]():
        if _held_out(document) != (split == "validation"):
            continue
        parts = []
        for part in document.parts:
            if not seen & _passages(part[1]):
                seen.add(hash(part[1].strip()))
                parts.append(part)
        if not parts:
            continue
        if name == "python_chat":
            yield {"id": document.id, "messages": json.dumps(_messages(document.id, parts))}
        else:
            text = "\n\n\n".join(f"{heading}\n\n{text}" if heading else text for heading, text in parts)
            yield {"id": document.id, "text": text}


def _messages(id: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": _choose(SYSTEM, id)}] * _choose((True, False, False), id)
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def pairs(split: str) -> Iterator[dict[str, str]]:
    """Each first question with its own answer and, as rejected, with the answer of the conversation before."""
    before = ""
    for document in documents("python_chat", split):
        messages = json.loads(document["messages"])
        last = next(number for number, turn in enumerate(messages) if turn["role"] == "assistant")
        chosen = messages[: last + 1]
        answer = chosen[-1]["content"]
        if before and before != answer:
            rejected = [*chosen[:-1], {"role": "assistant", "content": before}]
            yield {"id": document["id"], "preferences": json.dumps({"chosen": chosen, "rejected": rejected})}
        before = answer


def fingerprint() -> str:
    """Changes with the version of Python, with the library's files and with this one."""
    digest = hashlib.sha256(platform.python_version().encode() + Path(__file__).read_bytes())
    for text in (*(f"{module.path}\n{module.text}" for module in modules()), *chapters().values()):
        digest.update(text.encode())
    return digest.hexdigest()


for _name in CORPORA:
    add_generator(
        _name,
        functools.partial(documents, _name),
        content="messages" if _name == "python_chat" else "text",
        splits=("train", "validation"),
        fingerprint=fingerprint,
    )

add_generator(
    "python_pairs",
    pairs,
    content="preferences",
    splits=("train", "validation"),
    fingerprint=fingerprint,
)


def lamp_play(split: str) -> Iterator[dict[str, str]]:
    """Conversations of a careless player, who goes north half of the time and else follows the light."""
    for number, game in enumerate(tasks("lamp")[split != "train"] * 4):
        rng = random.Random(number)
        messages = [{"role": "user", "content": game.reset()}]
        for _ in range(game.max_turns):
            seen = messages[-1]["content"].split()
            move = "north" if rng.random() < 0.5 else next(move for move in MOVES if f"{move}." in seen)
            messages.append({"role": "assistant", "content": move})
            step = game.step(move)
            messages.append({"role": "user", "content": step.observation})
            if step.reward == 1:
                break
        yield {"id": f"{game.id}/{number}", "messages": json.dumps(messages[:-1])}


add_generator("lamp_play", lamp_play, content="messages", splits=("train", "validation"))
