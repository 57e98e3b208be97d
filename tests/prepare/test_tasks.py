"""Reading documents out of seqio tasks."""

import functools
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import re
import sys
import zlib

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.prepare import digests, tasks
from lemur_jax.prepare.fields import Fields
from lemur_jax.text import conversation_formats
from tests.helpers.list_source import function_source, write_tfrecord

# After tasks, which keeps TensorFlow quiet.
import seqio  # isort: skip
import tensorflow as tf  # isort: skip

OWN_MODULE = """
import seqio
import tensorflow as tf

seqio.TaskRegistry.add(
    "own_lines",
    source=seqio.TextLineDataSource({{"train": {path!r}}}),
    preprocessors=[lambda dataset: dataset.map(lambda line: {{"text": line}})],
    output_features={{"text": seqio.Feature(seqio.PassThroughVocabulary(0), dtype=tf.string, rank=0)}},
)
"""


def register(name, source, preprocessors=()):
    return seqio.TaskRegistry.add(
        name, source=source, preprocessors=list(preprocessors), output_features={}, metric_fns=[]
    )


@pytest.fixture
def generated():
    """A task of a function that yields documents, and what it yields."""
    documents = {"train": [{"id": "a", "text": "Grüße"}], "validation": [{"id": "b", "text": b"\xff\x00x"}]}
    return tasks.add_generator("t_generated", documents.get, splits=tuple(documents)), documents


def test_a_function_is_an_ordinary_seqio_task(generated):
    task, _ = generated
    assert list(tasks.examples(task, "train")) == [{"text": "Grüße".encode(), "id": b"a"}]
    assert list(tasks.examples(task, "validation")) == [{"text": b"\xff\x00x", "id": b"b"}]
    dataset = seqio.get_mixture_or_task("t_generated").get_dataset(None, split="train", shuffle=False)
    assert [example["text"].decode() for example in dataset.as_numpy_iterator()] == ["Grüße"]


@pytest.mark.parametrize("document", [{"id": "b", "text": None}, {"id": "b"}, {"id": 1, "text": "b"}])
def test_a_document_of_a_function_that_is_no_string_is_one_line(document):
    def documents(split):
        yield {"text": "a\ud800"}  # a record that is bad by itself
        yield document
        raise AssertionError("read on")

    found = tasks.examples(tasks.add_generator("t_strings", documents), "train")
    assert next(found) == {"id": b"000000000", "text": b"a\xed\xa0\x80"}
    wrong = "id" if document.get("text") else "text"
    with pytest.raises(UserError, match=rf"'{wrong}' of document 1 of a function's train split .*a string"):
        next(found)


def test_a_function_that_gives_no_documents_is_one_line():
    assert not list(tasks.examples(tasks.add_generator("t_none", lambda split: None), "train"))
    task = tasks.add_generator("t_nothing", lambda split: ["a"])
    with pytest.raises(UserError, match="0 of a function's train split is 'a': it must be a mapping"):
        list(tasks.examples(task, "train"))


def test_the_error_of_a_function_is_its_own():
    def documents(split):
        yield {"id": "a", "text": 1 / 0}

    with pytest.raises(ZeroDivisionError):
        list(tasks.examples(tasks.add_generator("t_fails", documents), "train"))


def test_an_unknown_task_names_the_nearest(generated):
    with pytest.raises(UserError, match=r"'t_generate'.*did you mean 't_generated'"):
        tasks.find_task("t_generate")


def test_a_module_of_ones_own_registers_tasks(tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    (tmp_path / "own_tasks.py").write_text(OWN_MODULE.format(path=str(tmp_path / "lines.txt")))
    monkeypatch.syspath_prepend(tmp_path)
    task = tasks.find_task("own_lines", ["own_tasks"])
    found = [(e["text"], e["id"]) for e in tasks.examples(task, "train")]
    assert found == [(b"one", b"000000000"), (b"two", b"000000001")]
    del sys.modules["own_tasks"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import json\n\njson.loads('{')\n", r"JSONDecodeError: .* \(line 3 of .*bad_tasks\.py\)$"),
        ("import sys\nsys.exit('no data')\n", r"SystemExit: no data \(line 2 of .*bad_tasks\.py\)$"),
        ("x = (\n", r"SyntaxError: .*\(bad_tasks\.py, line 1\)$"),
        ("import no_such_module\n", r"No module named .* \(line 1 of .*bad_tasks\.py\); install it"),
        (
            "from lemur_jax.prepare import tasks\n\ntasks.add_files('a-b', 'x')\n",
            r"cannot import 'bad_tasks' of data\.modules: ValueError: .*a-b.* \(line 3 of .*bad_tasks\.py\)$",
        ),
        (
            "from lemur_jax.prepare import tasks\ntasks.add_files('a', 'x', held_out=10)\n",
            r"data\.modules: held_out is 10: it must be a share, .* \(line 2 of .*bad_tasks\.py\)$",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line_with_its_place(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad_tasks.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        tasks.find_task("any", ["bad_tasks"])


def test_a_split_that_is_not_there_names_those_that_are():
    task = register("t_split", function_source({"text": ["a"]}, ["train", "test"]))
    with pytest.raises(UserError, match=r"'t_split' has no split 'validation'; it has test, train"):
        list(tasks.examples(task, "validation"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": ["a"], "targets": ["b"]}, "none of messages, preferences, text but inputs, targets"),
        ({"text": [1]}, "`text` as int32"),
        ({"text": [["a", "b"]]}, "`text` as string"),
        ({"messages": ["[]"], "id": [3]}, "`id` as int32"),
    ],
)
def test_features_of_another_kind_are_one_line(values, message):
    task = register("t_kind", function_source(values))
    with pytest.raises(UserError, match=message):
        list(tasks.examples(task, "train"))


def test_a_missing_file_is_one_line(tmp_path):
    source = seqio.TextLineDataSource({"train": str(tmp_path / "nothing.txt")})
    task = register("t_missing", source, [to_text])
    with pytest.raises(UserError, match=r"'t_missing'.*nothing\.txt"):
        list(tasks.examples(task, "train"))


def to_text(dataset):
    return dataset.map(lambda line: {"text": line})


def upper(dataset, suffix="!"):
    return dataset.map(lambda example: {"text": tf.strings.upper(example["text"]) + suffix})


def test_the_task_digest_follows_the_definition(tmp_path):
    sources = [function_source({"text": ["a"]}), function_source({"text": ["a"]}, ["train", "test"])]
    pipelines = [[], [upper], [functools.partial(upper, suffix="?")]]
    found = set()
    for index, (source, pipeline) in enumerate(itertools.product(sources, pipelines)):
        del index
        task = register("t_digest", source, pipeline)
        found.add(digests.task_digest(task))
        assert digests.task_digest(task) == digests.task_digest(task)
        seqio.TaskRegistry.remove("t_digest")
    assert len(found) == 6


def reading_functions():
    """Two functions of one name, and one of this package."""

    def turns(row):
        return row["turns"]

    first = turns

    def turns(row):
        return row["turns"][1:]

    return first, turns, conversation_formats.sharegpt


@pytest.mark.parametrize("add", [tasks.add_files, tasks.add_tfds])
@pytest.mark.parametrize("name", ["messages", "preferences"])
def test_the_task_digest_follows_ones_own_functions(add, name):
    def register(function):
        task = add("t_digest", "tiny:1.0.0", Fields(**{name: function}), **options)
        seqio.TaskRegistry.remove("t_digest")
        return task

    options = {"splits": {"train": "train"}} if add is tasks.add_tfds else {}
    first, second, ours = (register(function) for function in reading_functions())
    found = [digests.task_digest(task) for task in (first, second, register(reading_functions()[0]))]
    assert found[0] != found[1]
    assert found[0] == found[2]
    if add is tasks.add_files:  # stores that the functions of this package made are still current
        source = re.sub(r" at 0x\w+", "", repr(ours.source))
        described = json.dumps(["t_digest", source, "id", name])
        assert digests.task_digest(ours) == hashlib.sha256(described.encode()).hexdigest()


def test_a_file_that_appears_waits_for_the_next_run(tmp_path):
    for name in "bd":
        (tmp_path / f"{name}.txt").write_text(name)
    task = tasks.add_files("t_listed", str(tmp_path))
    tasks.check_files(task, "train")
    before, shards = digests.input_digest(task, "train"), tasks.count_shards(task, "train")
    found = [example["text"] for example in tasks.examples(task, "train", 0, shards)]
    (tmp_path / "a.txt").write_text("a")
    found += [example["text"] for example in tasks.examples(task, "train", 1, shards)]
    assert found == [b"b", b"d"]
    assert digests.input_digest(task, "train") == before
    tasks.check_files(task, "train")
    assert digests.input_digest(task, "train") != before
    assert [example["text"] for example in tasks.examples(task, "train")] == [b"a", b"b", b"d"]


def test_the_input_digest_follows_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    task = register("t_input", seqio.TextLineDataSource({"train": str(tmp_path / "*.txt")}), [to_text])
    found = [digests.input_digest(task, "train")]
    assert digests.input_digest(task, "train") == found[0]
    os.utime(file, (1, 1))
    found.append(digests.input_digest(task, "train"))
    file.write_text("one and more\n")
    os.utime(file, (1, 1))
    found.append(digests.input_digest(task, "train"))
    assert len(set(found)) == 3


def test_tensorflow_leaves_the_accelerator_alone():
    assert tf.config.get_visible_devices("GPU") == []


def test_files_are_shards_that_can_be_read_alone(tmp_path):
    for index in range(3):
        lines = [json.dumps({"body": f"{index}/{line}"}) + "\n" for line in range(4)]
        (tmp_path / f"{index}.jsonl").write_text("".join(lines))
    task = tasks.add_files("t_files", f"{tmp_path}/*.jsonl", Fields(text="body"))
    assert tasks.count_shards(task, "train") == 3
    parts = [[e["text"].decode() for e in tasks.examples(task, "train", shard, 3)] for shard in range(3)]
    assert parts == [[f"{index}/{line}" for line in range(4)] for index in range(3)]
    assert [e["text"].decode() for e in tasks.examples(task, "train")] == [*itertools.chain(*parts)]
    first = next(tasks.examples(task, "train"))
    assert first["where"].decode() == f"{tmp_path}/0.jsonl: line 1"
    assert first["error"] == b""


def test_tfrecords_of_tf_example(tmp_path):
    path = tmp_path / "a.tfrecord-00000-of-00001"
    rows = [("Grüße".encode(), [3]), (b"\xff", [1, 2]), (b"z", [])]
    write_tfrecord(path, [{"body": [text], "stars": stars} for text, stars in rows])
    with path.open("ab") as file:
        file.write(b"half a record")
    task = tasks.add_files("t_records", str(path), Fields(text="body", meta=("stars",)))
    found = list(tasks.examples(task, "train"))
    assert [e["text"].decode() for e in found if not e["error"]] == ["Grüße", "z"]
    assert json.loads(found[0]["meta"]) == {"stars": 3}
    errors = [json.loads(e["error"]) for e in found if e["error"]]
    assert "invalid UTF-8" in errors[0]["reason"]
    assert errors[1] == {"reason": "cannot be read on: corrupted record at 151", "records": 1}
    assert found[1]["where"].decode() == f"{path}: record 2"


def test_a_tfrecord_file_in_gzip_that_is_cut_off(tmp_path):
    """TensorFlow gives some of the records before the cut, and says nothing."""
    path = tmp_path / "a.tfrecord"
    bodies = [random.Random(n).randbytes(20).hex().encode() for n in range(200)]
    write_tfrecord(path, [{"body": [body], "stars": [n]} for n, body in enumerate(bodies)])
    packed = gzip.compress(path.read_bytes())[:4000]
    (tmp_path / "b.tfrecord.gz").write_bytes(packed)
    whole = zlib.decompressobj(31).decompress(packed)
    (tmp_path / "c.tfrecord.xz").write_bytes(lzma.compress(path.read_bytes()))
    task = tasks.add_files("t_xz", str(tmp_path / "c.tfrecord.xz"), Fields(text="body"))
    assert [example["text"] for example in tasks.examples(task, "train")] == bodies
    task = tasks.add_files("t_cut", str(tmp_path / "b.tfrecord.gz"), Fields(text="body"))
    found = list(tasks.examples(task, "train"))
    count = len(whole) // (path.stat().st_size // 200 + 1)
    assert count - 2 <= sum(not e["error"] for e in found) <= count + 2
    (error,) = [json.loads(e["error"]) for e in found if e["error"]]
    assert "gzip stream ends early" in error["reason"]
    assert error["records"] == len(found) - 1


def test_held_out_documents_are_in_one_split_alone(tmp_path):
    rows = [{"text": f"document {n % 200}", "repo": f"r{n % 20}"} for n in range(400)]  # each text twice
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{bad\n")
    for group in ("", "repo"):
        task = tasks.add_files(f"t_held{group}", str(tmp_path), Fields(group=group), held_out=0.3)
        splits = {split: list(tasks.examples(task, split)) for split in ("train", "validation")}
        assert sum(map(len, splits.values())) == 401  # the bad one too is in one split
        texts = {split: {e["text"] for e in found} for split, found in splits.items()}
        assert not texts["train"] & texts["validation"]
        assert 20 < len(texts["validation"]) < 120
        if group:
            numbers = {int(text.split()[1]) % 20 for text in texts["validation"] if b"document" in text}
            assert len(texts["validation"]) in (10 * len(numbers), 10 * len(numbers) + 1)


def test_stores_of_conversations_that_were_divided_otherwise_are_not_current(tmp_path):
    """Those of earlier versions: a new held-out store could share documents with an old one that is trained on."""
    talks = Fields(messages=conversation_formats.openai)
    for share, fields, says in ((0.0, talks, False), (0.1, Fields(), False), (0.1, talks, True)):
        task = tasks.add_files("t_divided", str(tmp_path), fields, held_out=share)
        assert ("held out by text" in repr(task.source)) == says
        seqio.TaskRegistry.remove("t_divided")


def test_a_source_without_files_or_of_no_known_format(tmp_path):
    task = tasks.add_files("t_none", f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match=r"no file matches .*\*\.jsonl"):
        list(tasks.examples(task, "train"))
    with pytest.raises(UserError, match=r"no format 'jason'.*jsonl"):
        tasks.add_files("t_kind", str(tmp_path), kind="jason")
    with pytest.raises(UserError, match=r"held_out has no effect beside files of the validation split"):
        tasks.add_files("t_split", {"train": "a.jsonl", "validation": "b.jsonl"}, held_out=0.1)


def test_files_to_train_on_that_are_held_out_too_are_named(tmp_path, caplog):
    for name in ("a", "val"):
        (tmp_path / f"{name}.txt").write_text(name)
    apart = {"train": f"{tmp_path}/a.txt", "validation": f"{tmp_path}/val.txt"}
    tasks.check_files(tasks.add_files("t_apart", apart), "validation")
    assert not caplog.records
    tasks.check_files(tasks.add_files("t_both", {**apart, "train": str(tmp_path)}), "validation")
    assert caplog.messages == [f"held-out files that are trained on too: 1, e.g. {tmp_path}/val.txt"]
