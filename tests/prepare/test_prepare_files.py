"""Preparing from files: bad records with their place, cleaning, and going on after a kill."""

import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare import encoding as documents
from lemur_jax.prepare import prepare as prepare_module
from lemur_jax.prepare import readers, rejects, tasks
from lemur_jax.prepare.code_layout import FIM_TOKENS, layout
from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.prepare import prepare
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend
from tests.helpers.list_source import files_of, planted_texts, run

SHARDS = 6
STEPS = {"length": {"min_chars": 40}, "exact_duplicates": {}, "near_duplicates": {}}

# Runs in a process of its own: prepares, and kills itself at the record with a number.
PREPARE = """if True:
    import itertools, json, os, signal, sys
    if __name__ == "__main__":
        pattern, config, kill_after = sys.argv[1:]
        from lemur_jax.config import from_json
        from lemur_jax.prepare import prepare, tasks
        prepare.SAVE_SECONDS, add, number = 0, prepare._add_result, itertools.count(1)
        tasks.add_files("files", pattern)

        def add_or_die(*arguments):
            if next(number) == int(kill_after):
                os.kill(os.getpid(), signal.SIGKILL)
            add(*arguments)

        prepare._add_result = add_or_die
        prepare.prepare(from_json(json.loads(config)))
"""


@pytest.fixture
def corpus(tmp_path):
    """Six files of 100 lines: copies of earlier documents, near copies, short and bad ones among them."""
    generator, earlier = random.Random(0), []
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in range(SHARDS):
        lines = [json.dumps({"text": text}) for text in planted_texts(generator, earlier)]
        lines[50] = "{bad"
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_config(make_config):
    return lambda **options: make_config("files", **{"prepare.max_bad_share": 0.02, **options})


def register(patterns, **options):
    patterns = patterns if isinstance(patterns, dict) else str(patterns)
    return tasks.add_files("files", patterns, **options)


def test_after_a_kill_it_goes_on_and_no_byte_differs(tmp_path, corpus, make_config):
    """Killed with one worker, left alone with two: the stores are the same."""
    register(corpus)

    def config(name, workers):
        stores = {"data.stores": str(tmp_path / name), "prepare.workers": workers}
        return make_config(**stores, **{"prepare.steps": {"files": STEPS}})

    (tmp_path / "run.py").write_text(PREPARE)
    words = [sys.executable, tmp_path / "run.py", corpus, json.dumps(config("killed", 1).to_json()), "250"]
    killed = subprocess.run(words, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    saved = json.loads((tmp_path / "killed/files/.train.draft/progress.json").read_text())
    assert saved["state"]["rejects"]["records"] == 200  # whole shards
    prepare(config("killed", 1))
    prepare(config("whole", 2))
    results = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "killed") == results
    assert "files/train/manifest.json" in results
    assert set(json.loads(results["files/train.removed.json"])) == set(STEPS)
    assert not [name for name in results if "work" in name or "partial" in name]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_goes_on_within_a_file(tmp_path, corpus, make_config, monkeypatch, workers):
    """Stopped with 230 of the 600 lines of one file done, then with 410, then while what stays is copied."""
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0)
    monkeypatch.setattr(prepare_module, "SAVE_RECORDS", 100)
    monkeypatch.setattr(documents, "CHUNK_RECORDS", 7)
    one = tmp_path / "one.jsonl"
    one.write_bytes(b"".join(file.read_bytes() for file in sorted(corpus.iterdir())))
    register(one)
    shown = []

    class Progress(prepare_module.Progress):
        stop = ("", 0)

        def __enter__(self):
            shown.append(self)
            return self

        def update(self, n=1):
            self.first = self.first if self.n else n
            super().update(n)
            if (self.desc, self.n) == Progress.stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "Progress", Progress)

    def options(name):
        stores = {"data.stores": str(tmp_path / name), "prepare.workers": workers}
        return make_config(**stores, **{"prepare.steps": {"files": STEPS}})

    for Progress.stop in (("files/train", 230), ("files/train", 410), ("files/train: duplicates", 534)):
        with pytest.raises(KeyboardInterrupt):
            prepare(options("stopped"))
    Progress.stop = ("", 0)
    prepare(options("stopped"))
    attempts = [progress for progress in shown if progress.desc == "files/train"]
    assert [progress.first for progress in attempts[1:]] == [200, 400, 600]
    assert attempts[-1].n == 600  # no line was tokenized again
    prepare(options("whole"))
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("steps", [STEPS, {"length": {"min_chars": 40}}])
def test_a_kill_just_after_the_store_is_complete(tmp_path, corpus, make_config, monkeypatch, steps):
    class Killed(StoreWriter):
        def __exit__(self, *error):
            super().__exit__(*error)
            if not self.is_draft:
                raise KeyboardInterrupt

    register(corpus)
    killed, whole = (
        make_config(**{"data.stores": str(tmp_path / name), "prepare.steps": {"files": steps}})
        for name in ("killed", "whole")
    )
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "StoreWriter", Killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(killed)
    assert run(killed)[0].endswith("unchanged")
    prepare(whole)
    results = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "killed") == results
    assert {"files/train.removed.json", "files/train.quarantine.jsonl"} < set(results)
    assert not list((tmp_path / "killed/files").glob(".*"))


def test_what_steps_remove_is_counted_with_examples(tmp_path, corpus, make_config):
    register(corpus)
    said = run(make_config(**{"prepare.steps": {"files": STEPS}}))
    removed = json.loads((tmp_path / "stores/files/train.removed.json").read_text())
    lines = [line for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in lines if line != "{bad"]
    short = texts.count("short")
    assert removed["length"]["documents"] == short == 60
    distinct = set(texts) - {"short"}
    originals = {text for text in distinct if not text.endswith(" more")}
    assert removed["exact_duplicates"]["documents"] == len(texts) - short - len(distinct)
    assert removed["near_duplicates"]["documents"] == len(distinct) - len(originals)
    store = TokenStore.open(tmp_path / "stores/files/train")
    assert store.num_documents == len(originals)
    assert store.manifest.bytes == sum(len(text.encode()) for text in originals)
    example = removed["near_duplicates"]["examples"][0]
    assert example["reason"].startswith("similar to ")
    assert example["excerpt"] in " ".join(texts)
    assert f"length removed {short}" in said[0]
    assert len(removed["length"]["examples"]) == rejects.EXAMPLES


def test_all_files_are_looked_for_before_the_first_store_is_written(tmp_path, corpus, make_config):
    register({"train": f"{corpus}/*", "validation": "nowhere/*.jsonl"})
    with pytest.raises(UserError, match=r"no file matches nowhere.*split validation"):
        run(make_config(**{"eval.tasks": ("files",)}))
    (corpus / "x.bin").write_text("x")
    with pytest.raises(UserError, match=r"cannot tell the format of .*x\.bin"):
        run(make_config())
    assert not (tmp_path / "stores").exists()


GOOD = b'{"text": "one good record, and more"}\n' * 100
BAD_LINES = {
    "encoding": (b'{"text": "caf\xe9"}\n', "invalid UTF-8 (byte 0xe9 at 13): Latin-1 or another encoding?"),
    "field": (b'{"content": "x"}\n', "no field 'text'; there are content"),
    "long": (b'{"text": "' + b"x" * 3000 + b'"}\n', "longer than 2,000 bytes"),
    "type": (b'{"text": ["x"]}\n', "field 'text' is list, not a string"),
}


def test_each_way_to_be_bad_is_counted_and_put_aside_with_its_place(tmp_path, make_config):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, (line, _) in BAD_LINES.items():
        (folder / f"{name}.jsonl").write_bytes(GOOD + line + GOOD)
    (folder / "truncated.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-20])
    register(folder, max_bytes=2000)
    with pytest.raises(UserError, match=r"25 of 8\d\d records cannot be used, more than .* = 0\.01"):
        run(make_config(**{"prepare.max_bad_share": 0.01}))
    said = run(make_config(**{"prepare.max_bad_share": 0.1}))
    assert f"refused 25 records, the first ({folder}/encoding.jsonl: line 101: invalid UTF-8" in said[0]
    lines = (tmp_path / "stores/files/train.quarantine.jsonl").read_text().splitlines()
    found = {entry["where"].removeprefix(f"{folder}/"): entry for entry in map(json.loads, lines)}
    assert found["encoding.jsonl: line 101"]["record"]["text"] == '{"text": "caf\\xe9"}'
    for name, (_, reason) in BAD_LINES.items():
        entry = found.pop(f"{name}.jsonl: line 101")
        assert entry["id"] == entry["record"]["id"] == entry["where"]
        assert (entry["reason"], entry["records"]) == (reason, 1)
        assert 0 < len(entry["record"]["text"]) <= readers.EXCERPT
    ((where, truncated),) = found.items()
    assert where == "truncated.jsonl.gz: after line 21"
    assert truncated["reason"] == "cannot be read on: its gzip stream ends early"
    assert truncated["records"] == 21


@pytest.mark.parametrize(
    "steps",
    [
        {"repository": {"name": "repo", "path": "pth"}},
        {"label": {"field": "pth"}},
        {"label": {"field": "meta/lang"}},  # only keys of `metadata` are written so
        {"metadata": {"pth": ("x",)}},
    ],
)
def test_a_step_that_reads_a_field_which_is_not_kept_is_refused(tmp_path, corpus, make_config, steps):
    register(corpus, fields=Fields(meta=("repo", "path", "meta.lang")))
    with pytest.raises(
        UserError,
        match=r"steps\.files\.\w+ reads the metadata field '(pth|meta/lang)'; .* keeps repo, path, meta.lang:",
    ):
        run(make_config(**{"prepare.steps": {"files": steps}}))
    assert not (tmp_path / "stores").exists()


def test_a_store_of_code_turned_for_filling_in(tmp_path, corpus, make_config, tokenizer_dir):
    register(corpus)
    extend(tokenizer_dir, tmp_path / "code_tokenizer", FIM_TOKENS)
    steps = {"fim": {"rate": 0.5}}
    options = {"tokenizer.path": str(tmp_path / "code_tokenizer"), "prepare.steps": {"files": steps}}
    run(make_config(**options))
    tokenizer = Tokenizer.load(tmp_path / "code_tokenizer")
    store = TokenStore.open(tmp_path / "stores/files/train", tokenizer)
    assert store.manifest.added_tokens == tokenizer.added_tokens
    turned = 0
    for index in range(100):
        (ids,), _, (name,) = store.read_documents(np.array([index]))
        text = tokenizer.decode(ids[1:-1].tolist())
        file, _, line = name.rpartition(": line ")
        with open(file) as lines:
            original = json.loads(lines.read().splitlines()[int(line) - 1])["text"]
        pieces = layout(original, {}, name, {"fim": {"rate": 0.5, "spm": 0.5}})
        assert text == "".join(piece for piece, _ in pieces)
        turned += "<fim_middle>" in text
    assert 30 < turned < 70
    with pytest.raises(UserError, match="no <fim_prefix>"):
        run(make_config(**{"prepare.steps": {"files": steps}}))


def test_globs_and_directories_are_sorted_and_leave_out_hidden_files(tmp_path, monkeypatch, caplog):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/_SUCCESS", "a/.x.jsonl", ".git/x", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    relative = lambda found: [name.removeprefix(f"{tmp_path}/") for name in found]  # noqa: E731
    assert relative(readers.find_files(f"{tmp_path}/*/*.jsonl")) == ["a/1.jsonl", "b/2.jsonl"]
    assert relative(readers.find_files([f"{tmp_path}/a", f"{tmp_path}/c.txt"])) == ["a/1.jsonl", "c.txt"]
    assert not caplog.messages
    assert relative(readers.find_files(str(tmp_path))) == ["c.txt"]
    assert caplog.messages == [f"{tmp_path}: 2 directories in it, e.g. a, are not read"]
    for name in ("a/__init__.py", "a/_base.py", "a/x[1].jsonl", "a/x1.jsonl"):
        (tmp_path / name).write_text("")
    assert relative(readers.find_files(f"{tmp_path}/a/*.py")) == ["a/__init__.py", "a/_base.py"]
    assert relative(readers.find_files(f"{tmp_path}/a/x[1].jsonl")) == ["a/x[1].jsonl"]
    assert relative(readers.find_files(f"{tmp_path}/*/x[1].jsonl")) == ["a/x1.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert relative(readers.find_files("~/b/*")) == ["b/2.jsonl"]
    assert readers.find_files(f"{tmp_path}/nothing/*") == []
    assert readers.find_files(f"{tmp_path}/nothing.jsonl") == []
    (tmp_path / "b/3.jsonl").symlink_to("gone.jsonl")  # to be reported when it is read
    for pattern in ("b", "b/*", "b/3.jsonl"):
        found = relative(readers.find_files(f"{tmp_path}/{pattern}"))
        assert ("b/3.jsonl" in found) == (pattern != "b/3.jsonl")
    with pytest.raises(UserError, match=r"\*\*"):
        readers.find_files(f"{tmp_path}/**/*.jsonl")


def test_a_name_that_does_not_say_its_format():
    assert readers.format_of("gs://b/x.tfrecord-00000-of-00002") == "tfrecord"
    assert readers.format_of("/a/x.json.gz") == "jsonl"
    with pytest.raises(UserError, match=r"format of /a/x\.bin .*jsonl"):
        readers.format_of("/a/x.bin")
