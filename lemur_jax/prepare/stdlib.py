"""What every Python brings along: the sources of its standard library, their docstrings, its documentation.

Everything here is read from the running interpreter's own installation, in a fixed order.
"""

import ast
import functools
import inspect
import os
import re
import sys
import sysconfig
import textwrap
import tokenize
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Installed packages, compiled files, and lib2to3's collection of deliberately broken Python 2.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "lib-dynload", "__pycache__", "lib2to3/tests/data"}
)
# Written by the distributor for one machine; and the documentation topics, whose text is a corpus of its
# own and would leak through the file that holds it.
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py|pydoc_data/topics\.py")
# Licences, news and notes that lie between the sources; test data is not prose.
TEXT_FILES = re.compile(r"(?!.*test)(.*/)?((README|NEWS|LICENSE|HISTORY|CREDITS|TODO)[^/]*|[^/]+\.(txt|rst))")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A documented function, method or class."""

    name: str  # "JSONEncoder.encode"
    signature: str  # "(self, o)"; of a class: ""
    docstring: str
    source: str  # dedented, without the docstring; of a class: ""
    is_method: bool


@dataclass(frozen=True, kw_only=True)
class Module:
    """The documentation that a module carries."""

    path: str  # "json/encoder.py"
    name: str  # "json.encoder"
    docstring: str
    definitions: tuple[Definition, ...]


def root() -> Path:
    """The directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def files(*, text: bool = False) -> Iterator[tuple[str, Path]]:
    """(path relative to the library, path) of each Python file, tests included, sorted.

    Args:
      text: the licence, news and note files instead.
    """
    base = root()
    found = []
    for folder, subfolders, names in os.walk(base):
        here = Path(folder).relative_to(base)
        subfolders[:] = [
            name for name in subfolders if not {name, (here / name).as_posix()} & SKIPPED_FOLDERS
        ]
        found += [(here / name).as_posix() for name in names]
    for path in sorted(found):
        wanted = TEXT_FILES.fullmatch(path) if text else path.endswith(".py")
        if wanted and not SKIPPED_FILES.fullmatch(path) and os.path.isfile(base / path):
            yield path, base / path


def read_source(path: Path) -> str | bytes:
    """A Python file as text, in the encoding that it declares; as it lies where it is not that."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return path.read_bytes()


def is_test(path: str) -> bool:
    """Whether a path relative to the library belongs to its tests."""
    return any(part in ("test", "tests", "idle_test") or part.startswith("test_") for part in path.split("/"))


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module outside the tests with what it documents, in the order of `files`."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old sources
        for path, full_path in files():
            text = read_source(full_path)
            if is_test(path) or isinstance(text, bytes):
                continue
            try:
                found.append(read_module(path, text))
            except (SyntaxError, ValueError, RecursionError):
                continue  # a template or a sample, not a module
    return tuple(found)


def read_module(path: str, text: str) -> Module:
    """The documentation of one module.

    Raises:
      SyntaxError, ValueError: the text is not Python.
    """
    tree = ast.parse(text)
    lines = text.split("\n")  # not splitlines: ast knows no other line ends
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(
        path=path,
        name=name,
        docstring=ast.get_docstring(tree) or "",
        definitions=tuple(_definitions(tree, lines, "")),
    )


def _definitions(block: ast.AST, lines: list[str], prefix: str) -> Iterator[Definition]:
    for node in ast.iter_child_nodes(block):
        if isinstance(node, (ast.If, ast.Try)):
            yield from _definitions(node, lines, prefix)
        elif isinstance(node, ast.ClassDef):
            name = prefix + node.name
            docstring = ast.get_docstring(node)
            if docstring:
                yield Definition(name=name, signature="", docstring=docstring, source="", is_method=False)
            yield from _definitions(node, lines, f"{name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Definition(
                    name=prefix + node.name,
                    signature=f"({ast.unparse(node.args)})",
                    docstring=docstring,
                    source=_source_without_docstring(node, lines),
                    is_method=bool(prefix),
                )


def _source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function as it stands in the file, dedented; "" if nothing but its docstring is in it."""
    if len(node.body) == 1 or node.body[1].lineno <= (node.body[0].end_lineno or 0):
        return ""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[first - 1 : node.body[0].lineno - 1] + lines[node.body[0].end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip()


def builtin_docstrings() -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(module, its docstring, [(name, docstring)]) of the modules that are compiled into the interpreter."""
    for module_name in sorted(sys.builtin_module_names):
        try:
            module = __import__(module_name)
        except ImportError:
            continue
        named: list[tuple[str, Any]] = []
        for name, value in sorted(vars(module).items()):
            if isinstance(value, types.BuiltinFunctionType):
                named.append((name, value))
            elif isinstance(value, type):
                named.append((name, value))
                named += [
                    (f"{name}.{key}", member)
                    for key, member in sorted(vars(value).items())
                    if isinstance(member, (types.MethodDescriptorType, types.GetSetDescriptorType))
                ]
        documented = [(name, inspect.getdoc(value) or "") for name, value in named]
        yield module_name, inspect.getdoc(module) or "", [(name, text) for name, text in documented if text]


def topics() -> dict[str, str]:
    """The chapters of Python's reference that `help()` knows, by name; none where they are not installed."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return {}
    return {name: texts[name] for name in sorted(texts)}


def topic_sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, text) of the sections of a topic: a title is a line underlined with *, = or -."""
    parts = re.split(r"^(?=[^\n]+\n([*=-])\1{2,}$)", text.strip(), flags=re.MULTILINE)
    for part in parts[::2]:  # between the parts, re.split gives the captured underline character
        title, _, rest = part.partition("\n")
        body = rest.partition("\n")[2].strip()
        if body:
            yield title.strip(), body
