"""TFDS sets as tasks."""

import json

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.prepare import digests, tasks
from lemur_jax.prepare.fields import Fields

# After tasks, which keeps TensorFlow quiet.
import seqio  # isort: skip
import tensorflow as tf  # isort: skip
import tensorflow_datasets as tfds  # isort: skip


def test_the_task_digest_follows_slices_of_tfds():
    found = set()
    for slices in ("train[1%:]", "train[2%:]", "train"):
        task = tasks.add_tfds("t_slices", "tiny:1.0.0", splits={"train": slices})
        found.add(digests.task_digest(task))
        seqio.TaskRegistry.remove("t_slices")
    assert len(found) == 3


def test_a_tfds_set_with_a_slice_held_out(tmp_path):
    texts = [f"Text {n}" for n in range(50)]
    examples = {"text": texts, "stars": list(range(50))}
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "stars": tf.int64})
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny",
        version="1.0.0",
        features=features,
        split_datasets={"train": tf.data.Dataset.from_tensor_slices(examples)},
        data_dir=str(tmp_path),
    )
    task = tasks.add_tfds(
        "t_tfds",
        "tiny:1.0.0",
        Fields(id="stars", meta=("stars",)),
        splits={"train": "train[20%:]", "validation": "train[:20%]"},
        data_dir=str(tmp_path),
    )
    splits = {split: list(tasks.examples(task, split)) for split in ("train", "validation")}
    assert [len(splits["train"]), len(splits["validation"])] == [40, 10]
    assert {e["text"].decode() for found in splits.values() for e in found} == set(texts)
    example = splits["train"][0]
    assert example["text"].decode() == f"Text {example['id'].decode()}"
    assert json.loads(example["meta"]) == {"stars": int(example["id"])}
    assert tasks.count_shards(task, "train") == 1


def test_examples_of_several_tfds_files_have_names_of_their_own(tmp_path):
    texts = [f"Text {n}" for n in range(20)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="two",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_datasets={"train": tf.data.Dataset.from_tensor_slices({"text": texts})},
        data_dir=str(tmp_path),
        download_config=tfds.download.DownloadConfig(num_shards=2),
    )
    task = tasks.add_tfds("t_two", "two:1.0.0", data_dir=str(tmp_path))
    assert tasks.count_shards(task, "train") == 2
    found = [example for shard in range(2) for example in tasks.examples(task, "train", shard, 2)]
    assert {e["text"].decode() for e in found} == set(texts)
    assert len({e["id"] for e in found}) == 20
    assert found[0]["id"] == b"00000/000000000"


class Trees(tfds.core.GeneratorBasedBuilder):
    """Messages of trees, in the order of the trees, with lists in lists."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        labels = tfds.features.Sequence(tfds.features.Sequence(text))
        features = tfds.features.FeaturesDict({"tree": text, "text": text, "labels": labels})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, (tree, text) in enumerate([("a", "1"), ("a", "2"), ("b", "3")]):
            yield number, {"tree": tree, "text": text, "labels": [["x"], [], ["y", "é"]]}


def test_tfds_examples_with_lists_in_lists_and_rows_that_are_one_document(tmp_path):
    Trees(data_dir=str(tmp_path)).download_and_prepare()
    options = {"data_dir": str(tmp_path)}
    task = tasks.add_tfds("t_lists", "trees:1.0.0", Fields(meta=("labels",)), **options)
    found = [json.loads(example["meta"]) for example in tasks.examples(task, "train")]
    assert found == [{"labels": [["x"], [], ["y", "é"]]}] * 3

    def messages(row):
        assert row["tree"] == "a", "another tree"
        return [{"role": "assistant", "content": each["text"]} for each in row["rows"]]

    task = tasks.add_tfds("t_trees", "trees:1.0.0", Fields(messages=messages, gather="tree"), **options)
    first, second = tasks.examples(task, "train")
    assert [turn["content"] for turn in json.loads(first["messages"])] == ["1", "2"]
    assert json.loads(second["error"])["reason"] == "another tree"


@pytest.mark.parametrize(("name", "message"), [("none:1.0.0", "none not found"), (None, "Could not read")])
def test_a_tfds_set_that_is_not_there_is_one_line(tmp_path, name, message):
    task = tasks.add_tfds("t_absent", name, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"cannot read the train split of task 't_absent': .*{message}"):
        tasks.check_files(task, "train")
