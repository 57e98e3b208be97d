"""The quickstart's corpora, and above all: nothing of what is held out is trained on."""

import ast
import collections
import importlib
import inspect
import json
import random
import textwrap

import pytest

from lemur_jax.config import load
from lemur_jax.prepare import digests, tasks

load("configs/quickstart_base.py")  # makes the modules beside it importable
corpora = importlib.import_module("quickstart_tasks")

SPLITS = ("train", "validation")


def read(name):
    return [(split, document) for split in SPLITS for document in corpora.documents(name, split)]


def texts_of(document):
    if "text" in document:
        return [document["text"]]
    return [turn["content"] for turn in json.loads(document["messages"]) if turn["role"] == "assistant"]


def words(seed, count=8):
    generator = random.Random(repr(seed))
    return " ".join("".join(generator.choices("abcdefghij", k=7)) for _ in range(count))


def source(seed):
    parts = [f'"""About {words(seed, 60)}."""\n']
    for index in range(3):
        body = "\n".join(f"    v{line} = {words((seed, index, line), 2)!r}" for line in range(8))
        parts.append(f'def f{index}(a):\n    """Do {words((seed, index), 20)}."""\n{body}\n    return a\n')
    return "\n\n".join(parts)


@pytest.fixture
def library(monkeypatch):
    """library({path: source}): a standard library of these modules alone."""

    def replace(sources):
        modules = tuple(corpora.read_module(path, text) for path, text in sources.items())
        monkeypatch.setattr(corpora, "modules", lambda: modules)
        monkeypatch.setattr(corpora, "chapters", dict)
        corpora._held_out_passages.cache_clear()

    yield replace
    corpora._held_out_passages.cache_clear()


@pytest.mark.parametrize(
    ("name", "documents", "characters"),
    [("python_stdlib", 300, 6e6), ("python_docs", 300, 1.5e6), ("python_chat", 3000, 1.5e6)],
)
def test_each_corpus_is_a_task_of_a_useful_size(name, documents, characters):
    found = read(name)
    texts = [text for _, document in found for text in texts_of(document)]
    assert len(found) > documents
    assert sum(map(len, texts)) > characters
    assert len({document["id"] for _, document in found}) == len(found)
    assert len(set(texts)) == len(texts)
    held_out = sum(len(text) for split, item in found for text in texts_of(item) if split == "validation")
    assert 0.08 < held_out / sum(map(len, texts)) < 0.2
    (first,) = list(tasks.examples(tasks.find_task(name), "validation"))[:1]
    assert first["id"].decode() == next(item["id"] for split, item in found if split == "validation")


def test_no_passage_that_is_held_out_is_trained_on():
    sides = collections.defaultdict(set)
    for name in corpora.CORPORA:
        for split, document in read(name):
            for text in texts_of(document):
                lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
                for start in range(len(lines) - 9):
                    sides["\n".join(lines[start : start + 10])].add(split)
                if name == "python_chat":
                    sides[text].add(split)
    assert not [passage for passage, splits in sides.items() if len(splits) > 1]


def test_copies_of_what_is_held_out_are_left_out(library):
    sources = {}
    for index in range(50):
        sources[f"module{index}.py"] = source(index)
        sources[f"copy{index}.py"] = source(index) + "\n\n"
        sources[f"partial{index}.py"] = source(-index - 1) + source(index)[source(index).index("def f0") :]
    library(sources)
    sides = collections.defaultdict(set)
    for name in corpora.CORPORA:
        for split, document in read(name):
            for index in range(50):
                if any(words((index, 1), 20) in text for text in texts_of(document)):
                    sides[index].add(split)
    assert len(sides) == 50
    assert {tuple(splits) for splits in sides.values()} == {("train",), ("validation",)}


def test_what_packages_add_or_distributions_leave_out_is_not_read():
    found = {module.path for module in corpora.modules()}
    assert {"json/decoder.py", "unittest/case.py"} <= found
    tests = ("unittest/test/test_case.py", "test/test_json.py")
    packages = ("site-packages/numpy/version.py", "tkinter/ttk.py", "pydoc_data/topics.py")
    for path in (*tests, *packages, "_sysconfigdata__linux_x86_64-linux-gnu.py"):
        assert corpora.EXCLUDED.fullmatch(path)
        assert path not in found


def test_the_twins_of_a_module_have_one_origin():
    paths = ("decimal.py", "_pydecimal.py", "_decimal/__init__.py", "json/decoder.py", "__future__.py")
    origins = [corpora.read_module(path, "x = 1\n").origin for path in paths]
    assert origins == ["decimal", "decimal", "decimal", "json", "__future__"]


def test_definitions_agree_with_inspect():
    found = {item.name: item for item in corpora.read_module("w.py", inspect.getsource(textwrap)).definitions}
    assert found["wrap"].docstring == inspect.getdoc(textwrap.wrap)
    assert found["TextWrapper.fill"].docstring == inspect.getdoc(textwrap.TextWrapper.fill)
    assert found["TextWrapper"].signature == found["TextWrapper"].source == ""
    expected = ast.parse(inspect.getsource(textwrap.wrap)).body[0]
    del expected.body[0]
    assert ast.dump(ast.parse(found["wrap"].source).body[0]) == ast.dump(expected)


def test_conversations_alternate_and_answer_what_is_asked(library):
    library({f"module{index}.py": source(index) for index in range(40)})
    talks = [json.loads(document["messages"]) for _, document in read("python_chat")]
    for talk in talks:
        turns = talk[1:] if talk[0]["role"] == "system" else talk
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if answer["content"].startswith("```python\n"):
                (function,) = ast.parse(answer["content"][10:-4]).body
                assert f"{function.name}(a)" in question["content"]
                assert ast.get_docstring(function) is None
    assert {len(talk) // 2 for talk in talks} == {1, 2, 3}
    assert 0.2 < sum(talk[0]["role"] == "system" for talk in talks) / len(talks) < 0.5


def test_a_section_of_a_chapter_is_asked_for_by_its_title(monkeypatch):
    text = 'The "assert" statement\n**********************\n\n' + "It inserts a debugging assertion. " * 3
    monkeypatch.setattr(corpora, "chapters", lambda: {"assert": text})
    monkeypatch.setattr(corpora, "modules", tuple)
    ((question, answer),) = next(corpora.conversations()).parts
    assert 'the "assert" statement' in question
    assert answer.startswith("It inserts")


def test_the_input_digest_follows_the_library(library):
    task, found = tasks.find_task("python_docs"), []
    for number in range(2):
        library({"one.py": f"x = {number}\n"})
        found += [digests.input_digest(task, split) for split in SPLITS]
    assert len(set(found)) == 4
