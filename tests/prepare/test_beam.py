"""Beam's local runner against the local path: the same bytes in the same files."""

import json
import random
import sys

import pytest

from lemur_jax import cli
from lemur_jax.common.errors import UserError
from lemur_jax.config import replace
from lemur_jax.prepare import beam, tasks
from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.prepare import prepare
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer_files import extend
from tests.helpers.list_source import files_of, planted_texts

STEPS = dict(length={"min_chars": 40}, exact_duplicates={}, near_duplicates={}, label={"field": "lang"})


def text_rows(generator, earlier):
    for index, text in enumerate(planted_texts(generator, earlier)):
        yield {"text": text, "id": f"d{len(earlier)}" * (index % 4 > 0), "lang": "ab"[index % 2]}


def talk_rows(generator, earlier):
    for index in range(30):
        said = " ".join(generator.choices(["Grüße", "漢字", "yes", "no", "<|im_end|>"], k=9))
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said} {index}"}]
        yield {"messages": turns[: 1 + (index % 9 > 0)]}  # some without an answer: refused


def messages_of(row):
    return row["messages"]


@pytest.fixture
def corpus(tmp_path):
    """Files of texts and of conversations, as tasks `texts` and `talks`."""
    fields = {"texts": Fields(id="id", meta=("lang",)), "talks": Fields(messages=messages_of)}
    for name, rows in (("texts", text_rows), ("talks", talk_rows)):
        generator, earlier = random.Random(0), []
        (tmp_path / name).mkdir()
        for shard in range(4):
            lines = [json.dumps(row) for row in rows(generator, earlier)]
            lines[20] = "{bad"
            (tmp_path / name / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
        tasks.add_files(name, str(tmp_path / name), fields[name], held_out=0.1)


@pytest.fixture
def config(corpus, make_config, tmp_path, tokenizer_dir):
    extend(tokenizer_dir, tmp_path / "chat", CHATML_TOKENS)
    config = make_config("texts", "talks", held_out=["talks"])
    options = {
        "tokenizer.path": str(tmp_path / "chat"),
        "prepare.max_bad_share": 0.9,  # a bad line's place, its directory's name, decides in which split it counts
        "prepare.steps": {"texts": STEPS, "talks": {"exact_duplicates": {}}},
    }
    return replace(config, options)


def test_a_beam_runner_makes_the_same_stores(config, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    found = {}
    for name, runner in (("local", ""), ("beam", "FnApiRunner")):
        prepare(replace(config, {"data.stores": str(tmp_path / name)}), runner=runner)
        found[name] = files_of(tmp_path / name)
    assert sorted(found["beam"]) == sorted(found["local"])  # and nothing is left of the pipeline's own files
    for name, content in found["local"].items():
        assert found["beam"][name] == content, name
    manifests = [json.loads(each) for name, each in found["beam"].items() if name.endswith("manifest.json")]
    assert len(manifests) == 3
    assert all(manifest["documents"] > 5 for manifest in manifests)
    removed = json.loads(found["beam"]["texts/train.removed.json"])
    assert set(removed) == {"length", "exact_duplicates", "near_duplicates"}
    assert b"{bad" in found["beam"]["texts/train.quarantine.jsonl"]


def test_shards_may_come_in_any_order_and_are_done_once(config, tmp_path, monkeypatch):
    sources = {"texts": config.data.sources["texts"]}
    config = replace(
        config,
        {"data.sources": sources, "data.stores": str(tmp_path / "local"), "eval.tasks": ()}
        | {"prepare.steps": {"texts": STEPS}},
    )
    prepare(config)
    done = []

    def run_pipeline(job, missing, runner, options):
        for shard in reversed(missing):
            if len(done) == 3 and len(missing) == 4:
                raise RuntimeError("the cluster is gone")
            beam.encode_shard(shard, job)
            done.append(shard)

    monkeypatch.setattr(beam, "_run_pipeline", run_pipeline)
    config = replace(config, {"data.stores": str(tmp_path / "beam")})
    with pytest.raises(RuntimeError, match="gone"):
        prepare(config, runner="any")
    prepare(config, runner="any")
    assert done == [3, 2, 1, 0]
    assert files_of(tmp_path / "beam") == files_of(tmp_path / "local")


def test_an_unknown_runner_is_one_line(config):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    with pytest.raises(UserError, match="runner 'NoRunner'"):
        prepare(config, runner="NoRunner")


def test_without_beam_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r'pip install "lemur_jax\[beam\]"'):
        prepare(config, runner="DirectRunner")


def test_the_command_passes_the_runner_and_its_options(monkeypatch):
    given = {}
    monkeypatch.setattr("lemur_jax.prepare.prepare.prepare", lambda config, **options: given.update(options))
    options = ["--runner=FlinkRunner", "--runner-options=--region=x --name='a b'"]
    cli.main(["prepare", "--config", "configs/quickstart_base.py", *options])
    assert given["runner"] == "FlinkRunner"
    assert given["runner_options"] == ["--region=x", "--name=a b"]
