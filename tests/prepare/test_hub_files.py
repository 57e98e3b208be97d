"""Files of a data set on the hub, from a server on this machine that speaks its API."""

import json
import os
import subprocess
import sys
import types

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import local_file
from lemur_jax.prepare import digests, readers
from tests.helpers.hub import SHA, serve_hub

SCRIPT = """
import json, sys
from lemur_jax.common.errors import UserError
from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.files import Files

for pattern in json.loads(sys.argv[1]):
    try:
        files = Files(patterns={"train": pattern}, fields=Fields(text="text"))
        documents = [each for _ in range(2) for each in files.documents("train", files.list("train"))]
        print(json.dumps([files.list("train"), [[each[k].decode() for k in ("text", "where")] for each in documents]]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.process
def test_files_of_a_data_set_are_downloaded_once_as_they_are_read(tmp_path):
    corpus = tmp_path / "corpus"
    for name in ("data/b.jsonl", "data/a.jsonl", "data/deep/d.jsonl", "d.jsonl", "README.md"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(json.dumps({"text": f"text of {name}"}) + "\n")
    patterns = [f"org/corpus{end}" for end in ("/data/*.jsonl", "@v1/data", "/d.jsonl", "/*/*/*.jsonl")]
    patterns += ["org/corpus/none/*", "org/corpus@v9/data", "org/closed/d.jsonl", "org/none/d.jsonl", "org"]
    repositories = {"datasets/org/corpus": corpus, "datasets/org/closed": corpus}
    with serve_hub(repositories, gated={"datasets/org/closed"}) as (address, requests):
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([f"hf://datasets/{pattern}" for pattern in patterns])],
            env=os.environ | variables | {"HF_HUB_DISABLE_XET": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [["data/a.jsonl", "data/b.jsonl"]] * 2 + [["d.jsonl"], ["data/deep/d.jsonl"]]
    for (files, documents), names in zip(answers, expected, strict=False):
        assert files == [f"hf://datasets/org/corpus@{SHA}/{name}" for name in names]
        once = [[f"text of {n}", f"{file}: line 1"] for n, file in zip(names, files, strict=True)]
        assert documents == once * 2
    errors = answers[len(expected) :]
    assert errors[0].startswith("no file matches hf://datasets/org/corpus/none/*")
    assert errors[1] == "org/corpus has no revision v9 on the hub"
    assert errors[2].startswith("org/closed is gated: accept its terms")
    assert errors[3].startswith("there is no data set org/none on the hub")
    assert errors[4].startswith("cannot read hf://datasets/org: files of the hub are hf://datasets/ORG/NAME")
    loaded = [path for method, path, _ in requests if method == "GET" and "/resolve/" in path]
    assert sorted(path.partition(SHA)[2] for path in loaded if "corpus" in path) == [
        "/d.jsonl", "/data/a.jsonl", "/data/b.jsonl", "/data/deep/d.jsonl",
    ]  # fmt: skip
    assert sum(path.startswith("/api/datasets/org/corpus") for _, path, _ in requests) <= 3


def test_without_the_hub_it_is_one_line():
    with pytest.raises(UserError, match="org/corpus cannot be had from the hub"):
        readers.find_files("hf://datasets/org/corpus/*.jsonl")
    assert local_file("gs://a/b.jsonl") == "gs://a/b.jsonl"


def test_a_store_of_another_commit_is_another_one():
    def digest(commit):
        file = f"hf://datasets/org/corpus@{commit}/a.jsonl"
        source = types.SimpleNamespace(list_shards=lambda split: [file])
        return digests.input_digest(types.SimpleNamespace(source=source), "train")

    assert digest("a") == digest("a") != digest("b")
