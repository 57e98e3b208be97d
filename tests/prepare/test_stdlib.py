"""What is read from the interpreter's installation."""

import ast
import inspect
import pydoc
import textwrap

import pytest

from lemur_jax.prepare import stdlib

SOURCE = '''"""A module.

Of two paragraphs.
"""
import os

if os.name:
    def guarded(a, *, b=1):
        """Does something under a condition."""
        return a + b

class Box:
    """Holds things."""

    @property
    def size(self):
        """How many things."""
        # A comment stays.
        return len(self.things)

    def empty(self):
        """Nothing but words."""

    def undocumented(self):
        return 1
'''


def test_files_are_sorted_and_real_modules_are_among_them():
    paths = [path for path, _ in stdlib.files()]
    assert paths == sorted(paths)
    assert {"json/decoder.py", "textwrap.py", "os.py"} <= set(paths)
    assert not [path for path in paths if "site-packages" in path or "_sysconfigdata" in path]


def test_the_file_that_holds_the_topics_is_no_code():
    assert "pydoc_data/topics.py" not in [path for path, _ in stdlib.files()]
    assert "pydoc_data/__init__.py" in [path for path, _ in stdlib.files()]


def test_text_files_are_licences_and_notes_and_no_test_data():
    paths = [path for path, _ in stdlib.files(text=True)]
    assert not [path for path in paths if "test" in path or path.endswith(".py")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "koi8-r", "latin-1"])
def test_a_source_is_read_in_the_encoding_that_it_declares(tmp_path, encoding):
    text = f"# -*- coding: {encoding} -*-\nx = {'ё' if encoding != 'latin-1' else 'é'!r}\n"
    path = tmp_path / "module.py"
    path.write_bytes(text.encode(encoding))
    assert stdlib.read_source(path) == text


def test_a_source_in_another_encoding_than_declared_stays_bytes(tmp_path):
    path = tmp_path / "module.py"
    path.write_bytes(b"x = '\xff\xfe'\n")
    assert stdlib.read_source(path) == b"x = '\xff\xfe'\n"


def test_read_module_finds_what_is_documented():
    module = stdlib.read_module("pack/box.py", SOURCE)
    assert module.name == "pack.box"
    assert module.docstring == "A module.\n\nOf two paragraphs."
    found = {item.name: item for item in module.definitions}
    assert list(found) == ["guarded", "Box", "Box.size", "Box.empty"]
    assert found["guarded"].signature == "(a, *, b=1)"
    assert found["guarded"].source == "def guarded(a, *, b=1):\n    return a + b"
    assert not found["guarded"].is_method
    assert found["Box"].signature == found["Box"].source == ""
    assert found["Box.size"].is_method
    assert found["Box.size"].source == (
        "@property\ndef size(self):\n    # A comment stays.\n    return len(self.things)"
    )
    assert found["Box.empty"].source == ""


def test_a_package_has_its_own_name():
    assert stdlib.read_module("json/__init__.py", SOURCE).name == "json"


def test_definitions_agree_with_inspect():
    definitions = {
        item.name: item for item in stdlib.read_module("w.py", inspect.getsource(textwrap)).definitions
    }
    assert definitions["wrap"].docstring == inspect.getdoc(textwrap.wrap)
    assert definitions["TextWrapper.fill"].docstring == inspect.getdoc(textwrap.TextWrapper.fill)
    expected = ast.parse(inspect.getsource(textwrap.wrap)).body[0]
    del expected.body[0]
    assert ast.dump(ast.parse(definitions["wrap"].source).body[0]) == ast.dump(expected)


def test_every_source_of_the_library_parses_without_its_docstring():
    sources = [item.source for module in stdlib.modules() for item in module.definitions if item.source]
    assert len(sources) > 3000
    for source in sources[::7]:
        (function,) = ast.parse(source).body
        assert function.body


def test_builtin_docstrings_agree_with_pydoc():
    pages = {name: (docstring, dict(named)) for name, docstring, named in stdlib.builtin_docstrings()}
    docstring, named = pages["builtins"]
    assert docstring == pydoc.getdoc(__import__("builtins"))
    assert named["len"] == pydoc.getdoc(len)
    assert named["str.join"] == pydoc.getdoc(str.join)


def test_topic_sections_are_split_at_underlined_titles():
    text = (
        "\nTitle\n*****\n\nFirst.\n\nMore:\n\n   a == b\n\nSecond part\n===========\n\nText.\n\nNone\n----\n"
    )
    assert list(stdlib.topic_sections(text)) == [
        ("Title", "First.\n\nMore:\n\n   a == b"),
        ("Second part", "Text."),
    ]
