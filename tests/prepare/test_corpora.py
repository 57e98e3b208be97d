"""The corpora of the interpreter's own material, and above all: nothing leaks into validation."""

import collections
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from lemur_jax.prepare import corpora, stdlib


def clear_caches():
    for function in (stdlib.modules, corpora._texts, corpora._families, corpora.count):
        function.cache_clear()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty standard library on a machine without system documents; `write(path, text)` fills it."""
    monkeypatch.setattr(stdlib, "root", lambda: tmp_path / "lib")
    monkeypatch.setattr(stdlib, "topics", lambda: {})
    monkeypatch.setattr(corpora, "SYSTEM_DOCUMENTS", tmp_path / "doc")
    monkeypatch.setattr(corpora, "SYSTEM_LICENSES", tmp_path / "common-licenses")
    clear_caches()

    def write(path, data):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())

    yield write
    clear_caches()


def words(seed, count=8):
    generator = random.Random(repr(seed))
    return " ".join("".join(generator.choices("abcdefghij", k=7)) for _ in range(count))


def module_source(seed, functions=3):
    parts = [f'"""About {words(seed, 60)}."""\n']
    for index in range(functions):
        body = "\n".join(f"    v{line} = {words((seed, index, line))!r}" for line in range(12))
        parts.append(f'def f{index}(a):\n    """Do {words((seed, index), 20)}."""\n{body}\n    return a\n')
    return "\n\n".join(parts)


def read_all(name):
    return [(split, document) for split in corpora.SPLITS for document in corpora.read(name, split)]


@pytest.mark.parametrize("name", sorted(corpora.CORPORA))
def test_no_document_is_there_twice(name):
    documents = [document for _, document in read_all(name)]
    for values in ([d["id"] for d in documents], [corpora.content_digest(d) for d in documents]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("name", "documents", "characters"),
    [("python_stdlib", 300, 5e6), ("python_docs", 300, 1e6), ("python_chat", 3000, 1e6)],
)
def test_the_corpora_are_of_the_expected_size(name, documents, characters):
    found = read_all(name)
    texts = [str(document.get("text") or document.get("messages")) for _, document in found]
    assert len(texts) > documents
    assert sum(map(len, texts)) > characters
    held_out = sum(split == "validation" for split, _ in found)
    assert 0.02 < held_out / len(found) < 0.12
    assert [corpora.count(name, split) for split in corpora.SPLITS] == [len(found) - held_out, held_out]


def test_an_origin_is_on_one_side_in_all_corpora_together():
    sides = collections.defaultdict(set)
    for name in corpora.CORPORA:
        for split, document in read_all(name):
            sides[document["origin"]].add(split)
    assert not [origin for origin, splits in sides.items() if len(splits) > 1]


def plain_lines(document):
    texts = [document["text"]] if "text" in document else [m["content"] for m in document["messages"]]
    stripped = (line.strip() for text in texts if isinstance(text, str) for line in text.splitlines())
    return [line for line in stripped if len(line) > 3]


def test_no_passage_of_a_held_out_document_is_trained_on():
    documents = [
        (split, plain_lines(document)) for name in corpora.CORPORA for split, document in read_all(name)
    ]
    trained_on = "\n".join("\n".join(lines) for split, lines in documents if split == "train")
    held_out = [lines for split, lines in documents if split == "validation" and len(lines) >= 10]
    generator = random.Random(0)
    for lines in generator.choices(held_out, k=30):
        start = generator.randrange(len(lines) - 9)
        assert "\n".join(lines[start : start + 10]) not in trained_on


def test_a_module_and_what_is_said_about_it_lie_on_one_side():
    side = {document["id"]: split for split, document in read_all("python_stdlib")}
    checked = set()
    for name in ("python_docs", "python_chat"):
        for split, document in read_all(name):
            kind, _, rest = document["id"].partition("/")
            path = rest.split("/")[0].replace(".", "/")
            for file in (f"{path}.py", f"{path}/__init__.py"):
                if kind == "module" and file in side:
                    assert side[file] == split
                    checked.add((name, split))
    assert len(checked) == 4


def test_planted_copies_never_lie_on_both_sides(library):
    for index in range(50):
        library(f"lib/module{index:03d}.py", module_source(index))
        library(f"lib/copies/exact{index:03d}.py", module_source(index) + "\n\n")
        library(f"lib/copies/partial{index:03d}.py", module_source(-index - 1) + module_source(index)[600:])
    sides = collections.defaultdict(set)
    for name in corpora.CORPORA:
        for split, document in read_all(name):
            texts = [document["text"]] if "text" in document else [m["content"] for m in document["messages"]]
            for index in range(50):
                if words((index, 1), 20) in "\n".join(texts):
                    sides[index].add(split)
    assert len(sides) == 50
    assert all(len(splits) == 1 for splits in sides.values())
    assert {next(iter(splits)) for splits in sides.values()} == set(corpora.SPLITS)
    ids = [document["id"] for _, document in read_all("python_stdlib")]
    assert not [name for name in ids if "module" in name and name.replace("module", "copies/exact") in ids]


def test_the_twins_of_a_module_have_one_origin(library):
    for path in ("decimal.py", "_pydecimal.py", "_decimal/__init__.py", "email/_decimal.py", "__future__.py"):
        library(f"lib/{path}", f"# {path}\n")
    origins = {document["id"]: document["origin"] for document in corpora.python_stdlib()}
    assert origins["decimal.py"] == origins["_pydecimal.py"] == origins["_decimal/__init__.py"]
    assert len(set(origins.values())) == 3


def test_split_of_is_a_hash_of_the_name_alone():
    expected = int(hashlib.sha256(b"module:textwrap").hexdigest()[:16], 16) / 2**64 < corpora.VALIDATION_SHARE
    assert corpora.split_of("module:textwrap") == ("validation" if expected else "train")
    share = sum(corpora.split_of(str(n)) == "validation" for n in range(10_000)) / 10_000
    assert share == pytest.approx(corpora.VALIDATION_SHARE, abs=0.01)


def test_link_joins_what_shares_enough_lines():
    passage = "\n".join(f"shared line {n}" for n in range(4))
    texts = [
        ("a", f"one of a\n{passage}\nend of a"),
        ("b", f"one of b\n\n   {passage}\nend of b"),
        ("c", passage.rpartition("\n")[0] + "\nbut c"),
        ("d", "nothing in common"),
    ]
    families = {}
    corpora.link(texts, 4, families)
    assert [corpora._root(families, origin) for origin in "abcd"] == ["a", "a", "c", "d"]
    corpora.link(texts, 3, families)
    assert [corpora._root(families, origin) for origin in "abcd"] == ["a", "a", "a", "d"]


def test_a_file_that_is_not_text_is_passed_on_as_it_is(library):
    library("lib/bad.py", b"x = '\xff'\n")
    library("lib/good.py", "x = 1\n")
    library("lib/empty.py", "\n")
    texts = {document["id"]: document["text"] for _, document in read_all("python_stdlib")}
    assert texts == {"bad.py": b"x = '\xff'\n", "good.py": "x = 1\n"}


def test_system_documents_are_prose_of_bounded_size(library, monkeypatch):
    prose = "\n\n".join(words(n, 40) for n in range(30))
    monkeypatch.setattr(corpora, "SYSTEM_FILE_LIMIT", 4000)
    library("doc/bash/README", prose)
    library("doc/bash/NEWS.gz", gzip.compress(prose[::-1].encode()))
    library("doc/bash/README.latin", prose.encode() + b"\xff")
    library("doc/bash/copyright", prose[5:])
    library("doc/libbash5/NEWS.html", prose[6:])
    library("doc/table/README", "1 2 3 | 4 5 6\n" * 100)
    library("doc/broken/NEWS.gz", b"not compressed")
    library("common-licenses/GPL-3", prose[50:])
    documents = {
        document["id"]: document for _, document in read_all("python_docs") if "system" in document["id"]
    }
    assert sorted(documents) == [
        "system/common-licenses/GPL-3",
        "system/doc/bash/NEWS.gz",
        "system/doc/bash/README",
    ]
    text = documents["system/doc/bash/README"]["text"]
    assert prose.startswith(text)
    assert 3000 < len(text) <= 4000
    assert prose[len(text) : len(text) + 2] == "\n\n"
    assert documents["system/doc/bash/README"]["origin"] == documents["system/doc/bash/NEWS.gz"]["origin"]


def test_everything_works_without_system_documents(library):
    library("lib/one.py", module_source(1))
    assert [document["id"] for document in corpora.python_stdlib()] == ["one.py"]
    assert "module/one" in [document["id"] for document in corpora.python_docs()]
    assert list(corpora.python_chat())


def test_the_fingerprint_follows_the_files(library):
    library("lib/one.py", "x = 1\n")
    first = corpora.fingerprint("python_stdlib")
    assert corpora.fingerprint("python_stdlib") == first
    library("lib/two.py", "x = 2\n")
    second = corpora.fingerprint("python_stdlib")
    os.utime(stdlib.root() / "one.py", (1, 1))
    assert len({first, second, corpora.fingerprint("python_stdlib")}) == 3


def digest_of_everything():
    digest = hashlib.sha256()
    for name in sorted(corpora.CORPORA):
        for split, document in read_all(name):
            digest.update(json.dumps([split, document], default=repr, sort_keys=True).encode())
    return digest.hexdigest()


def test_another_process_reads_the_same(library):
    for index in range(40):
        library(f"lib/module{index}.py", module_source(index % 30))
    command = f"""if True:
        import pathlib
        from lemur_jax.prepare import corpora, stdlib
        from tests.prepare import test_corpora

        stdlib.root = lambda: pathlib.Path({str(stdlib.root())!r})
        stdlib.topics = dict
        corpora.SYSTEM_DOCUMENTS = corpora.SYSTEM_LICENSES = pathlib.Path("nowhere")
        print(test_corpora.digest_of_everything())"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", command], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest_of_everything()
