"""From seqio tasks to token stores, with everything that can go wrong on the way."""

import errno
import json
import random
import threading

import numpy as np
import pytest
import tensorflow as tf

from lemur_jax.common.errors import UserError
from lemur_jax.config import replace
from lemur_jax.data.manifest import read_manifest
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare import encoding as documents
from lemur_jax.prepare import prepare as prepare_module
from lemur_jax.prepare import prepare_tokenizer
from lemur_jax.prepare.prepare import prepare  # first: it keeps TensorFlow quiet
from lemur_jax.text.chat_template import CHATML_TOKENS, encode_chat
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import write_byte_level
from tests.helpers.list_source import files_of, run
from tests.helpers.processes import hold_workdir


def text_records(count, seed=0):
    generator = random.Random(seed)
    for index in range(count):
        text = f"def f{index}(x):\n    return x + {index}\n" * generator.randint(1, 20)
        yield {"text": text, "id": f"doc-{index}"}


TALK = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Ja."}]


def chat_records(count, talk=TALK):
    for index in range(count):
        messages = [*talk[:-1], {"role": talk[-1]["role"], "content": f"Answer {index}."}]
        yield {"messages": json.dumps(messages), "id": f"talk-{index}"}


def test_documents_arrive_whole_and_in_order(task, make_config, tmp_path, tokenizer):
    records = list(text_records(30))
    task(records, validation=records[3:5])
    said = run(make_config("made_up", held_out=["made_up"]))
    store = TokenStore.open(tmp_path / "stores" / "made_up" / "train", tokenizer)
    assert store.num_documents == 30
    for index, record in enumerate(records):
        ids, mask = store.document(index)
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(record["text"]), tokenizer.eos_id]
        assert mask is None
    assert store.document_ids(np.arange(30)) == [record["id"] for record in records]
    manifest = store.manifest
    assert manifest.bytes == sum(len(record["text"].encode()) for record in records)
    assert (manifest.task, manifest.split, manifest.has_loss_mask) == ("made_up", "train", False)
    assert read_manifest(tmp_path / "stores" / "made_up" / "validation").documents == 2
    assert [line.partition(":")[0] for line in said[:2]] == ["made_up/train", "made_up/validation"]
    assert said[0].startswith(f"made_up/train: 30 documents, {manifest.tokens:,} tokens")
    assert "tokens wanted" in said[2]
    assert not list((tmp_path / "stores").rglob("*quarantine*"))


def test_a_damaged_store_is_not_unchanged(task, make_config, tmp_path):
    task(list(text_records(30)))
    config = make_config("made_up")
    run(config)
    (file,) = (tmp_path / "stores" / "made_up" / "train" / "tokens").glob("c/*")
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(UserError, match=r"train is damaged; add --replace to make it again: .*tokens"):
        run(config)
    run(config, replace=True)
    assert file.read_bytes() == whole


def test_workers_change_no_byte(task, make_config, tmp_path, chat_dir, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_RECORDS", 7)
    bad = {"text": b"\xff", "id": "bad"}
    task([*text_records(100), bad])
    task([*chat_records(60), *chat_records(1, TALK[:1])], name="chat")
    for workers in (1, 2):
        folder = tmp_path / f"stores{workers}"
        options = {"tokenizer.path": str(chat_dir), "data.stores": str(folder), "prepare.workers": workers}
        run(make_config("made_up", "chat", **options, **{"prepare.max_bad_share": 0.1}))
    one, two = files_of(tmp_path / "stores1"), files_of(tmp_path / "stores2")
    assert one == two
    assert "made_up/train/manifest.json" in one
    assert "chat/train.quarantine.jsonl" in one


def test_what_is_there_is_not_made_again(task, make_config, tmp_path, chat_dir):
    source = task(text_records(10))
    config = make_config("made_up", held_out=["made_up"])
    run(config)
    manifest = tmp_path / "stores" / "made_up" / "train" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert [line.endswith("unchanged") for line in run(config)[:2]] == [True, True]
    assert manifest.stat().st_mtime_ns == before
    # Added control tokens change no plain text.
    with_chat = make_config("made_up", **{"tokenizer.path": str(chat_dir)})
    assert run(with_chat)[0].endswith("unchanged")
    in_chat = {"tokenizer.path": str(chat_dir), "data.stores": str(tmp_path / "chat_stores")}
    run(make_config("made_up", **in_chat))
    assert run(make_config("made_up", **{"data.stores": in_chat["data.stores"]}))[0].endswith("unchanged")
    source.records["train"] = list(text_records(11))
    with pytest.raises(UserError, match=r"train was made before the input of the task made_up changed"):
        run(make_config("made_up", held_out=["made_up"]))
    assert manifest.stat().st_mtime_ns == before
    said = run(make_config("made_up", held_out=["made_up"]), replace=True)
    assert said[0].startswith("made_up/train: 11 documents")
    assert said[1].endswith("unchanged")


def test_text_with_added_tokens_that_are_not_special_needs_a_tokenizer_that_has_them(
    task, make_config, tmp_path, byte_level_dir
):
    """As <think> of Qwen3, which Qwen2.5 with the same vocabulary lacks."""
    task([{"text": "a <think> b"}])
    think = write_byte_level(byte_level_dir, tmp_path, ["<think>"], {"eos_token": "<|end_of_text|>"})
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    run(make_config("made_up", **{"tokenizer.path": str(tmp_path)}))
    store = TokenStore.open(tmp_path / "stores" / "made_up" / "train")
    assert think.find("<think>") in store.document(0)[0]
    with pytest.raises(UserError, match="tokenizer"):
        TokenStore.open(store.path, Tokenizer.load(byte_level_dir))
    assert run(make_config("made_up", **{"tokenizer.path": str(tmp_path)}))[0].endswith("unchanged")


def test_another_tokenizer_or_template_makes_new_stores(task, make_config, tmp_path, tokenizer_dir, chat_dir):
    task(text_records(10))
    task(chat_records(5), name="chat")
    run(make_config("made_up", "chat", **{"tokenizer.path": str(chat_dir)}))
    other = tmp_path / "other"
    prepare_tokenizer.train_sentencepiece(["something else " * 9, "entirely"] * 50, other, 280)
    prepare_tokenizer.extend(other, tmp_path / "other_chat", CHATML_TOKENS)
    config = make_config("made_up", "chat", **{"tokenizer.path": str(tmp_path / "other_chat")})
    with pytest.raises(UserError, match="before the tokenizer of the task chat changed"):
        run(config)
    said = run(config, replace=True)
    assert not [line for line in said if "unchanged" in line]
    template = Tokenizer.load(chat_dir).chat_template.replace("assistant", "Assistant")
    prepare_tokenizer.extend(other, tmp_path / "template", CHATML_TOKENS, template + " ")
    said = run(make_config("made_up", **{"tokenizer.path": str(tmp_path / "template")}))
    assert said[0].endswith("unchanged")
    with pytest.raises(UserError, match="no supervised token"):
        run(make_config("chat", **{"tokenizer.path": str(tmp_path / "template")}), replace=True)


def test_a_template_of_the_config_is_checked_before_data_is_read(task, make_config, tmp_path, chat_dir):
    task([{"messages": b"not read"}], name="damaged")
    file = tmp_path / "own.jinja"
    options = {"tokenizer.path": str(chat_dir), "tokenizer.chat_template": str(file)}
    file.write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match="the chat template does not write turn 1"):
        run(make_config("damaged", **options))
    file.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(UserError, match=r"1 of 1 records cannot be used"):
        run(make_config("damaged", **options))
    (record,) = chat_records(1)
    task([record], name="chat")
    run(make_config("chat", **options))
    tokenizer = Tokenizer.from_config(make_config("chat", **options).tokenizer)
    store = TokenStore.open(tmp_path / "stores" / "chat" / "train", tokenizer)
    assert store.manifest.added_tokens == tokenizer.added_tokens
    ids, mask = store.document(0)
    assert (ids.tolist(), mask.tolist()) == encode_chat(tokenizer, json.loads(record["messages"]))


def test_empty_texts_are_removed_and_counted(task, make_config, tmp_path):
    task([*text_records(50), *({"text": " \n", "id": f"__init__-{number}.py"} for number in range(20))])
    said = run(make_config("made_up"))
    assert said[0].startswith("made_up/train: 50 documents")
    assert "empty_texts removed 20" in said[0]
    removed = json.loads((tmp_path / "stores" / "made_up" / "train.removed.json").read_text())
    assert removed["empty_texts"]["documents"] == 20
    assert removed["empty_texts"]["examples"][0]["id"] == "__init__-0.py"
    task([{"text": "", "id": "a"}], name="nothing")
    with pytest.raises(UserError, match=r"every document .*'nothing' .*is removed \(empty_texts removed 1"):
        run(make_config("nothing"))


def test_too_many_bad_records_are_an_error_and_the_old_store_stays(task, make_config, tmp_path):
    source = task(text_records(50))
    config = make_config("made_up")
    run(config)
    before = files_of(tmp_path / "stores" / "made_up" / "train")
    source.records["train"] = [*text_records(50), {"text": b"\xff", "id": "bad-1"}]
    with pytest.raises(UserError, match=r"train: 1 of 51 .*max_bad_share = 0\.01.*bad-1: invalid UTF-8"):
        run(config, replace=True)
    assert files_of(tmp_path / "stores" / "made_up" / "train") == before
    assert "bad-1" in (tmp_path / "stores" / "made_up" / "train.quarantine.jsonl").read_text()
    source.records["train"] = list(text_records(51))
    run(config, replace=True)
    assert not (tmp_path / "stores" / "made_up" / "train.quarantine.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_complete_stores_only(task, make_config, tmp_path, workers):
    task(text_records(5), name="first")
    source = task(text_records(50))
    config = make_config("first", "made_up", **{"prepare.workers": workers})
    source.records["train"].insert(40, RuntimeError("the disk is gone"))
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        run(config)
    assert read_manifest(tmp_path / "stores/first/train").documents == 5
    assert not [name for name in files_of(tmp_path / "stores") if "made_up" in name]
    unfinished = tmp_path / "stores/made_up/train/tokens/zarr.json"  # killed before its manifest was written
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("half")
    del source.records["train"][40]
    assert run(config)[1].startswith("made_up/train: 50 documents")
    TokenStore.open(tmp_path / "stores/made_up/train")


def test_a_directory_that_is_no_store_is_not_touched(task, make_config, tmp_path):
    task(text_records(5))
    file = tmp_path / "stores" / "made_up" / "train" / "thesis.tex"
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(UserError, match=r"made_up/train is no token store"):
        run(make_config("made_up"))
    assert file.read_text() == "precious"


@pytest.mark.parametrize("step", ["fim", "repository", "separators"])
def test_steps_for_texts_are_refused_for_conversations(task, make_config, tmp_path, step):
    task(chat_records(1))
    with pytest.raises(UserError, match=rf"made_up has the step `{step}`, .* the task has messages"):
        run(make_config("made_up", **{"prepare.steps": {"made_up": {step: {}}}}))
    assert files_of(tmp_path) == {}


def test_an_empty_corpus_names_its_task(task, make_config, tmp_path):
    task([], validation=text_records(1))
    with pytest.raises(UserError, match=r"'made_up' has no documents in its train split"):
        run(make_config("made_up"))
    assert set(files_of(tmp_path)) == {"stores/running.lock"}


@pytest.mark.process
def test_a_second_process_waits_and_finds_the_stores(task, make_config, tmp_path):
    task(text_records(5))
    config, said = make_config("made_up"), []
    holder = hold_workdir(tmp_path / "stores")
    second = threading.Thread(target=lambda: said.extend(run(config)))
    second.start()
    second.join(3)
    assert second.is_alive()
    assert said == []
    assert set(files_of(tmp_path)) == {"stores/running.lock"}
    holder.kill()
    holder.wait()
    second.join(60)
    assert said[0] == f"another `lemur prepare` is writing to {tmp_path / 'stores'}: waiting for its end"
    assert said[1].startswith("made_up/train: 5 documents")


def test_stores_that_cannot_be_written_are_read(task, make_config, tmp_path, monkeypatch):
    task(text_records(5))
    run(make_config("made_up"))

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(prepare_module, "workdir_lock", refuse)
    warning, said, *_ = run(make_config("made_up"))
    assert "stores cannot be locked (PermissionError" in warning
    assert said.endswith("unchanged")


@pytest.mark.parametrize(
    ("sources", "held_out", "options", "message"),
    [
        (["made_upp"], [], {}, r"'made_upp'; did you mean 'made_up'"),
        (["made_up"], [], {"prepare.steps": {"x": {}}}, r"steps names 'x'; the tasks .* are made_up"),
        (["made_up"], ["no_such"], {}, r"'no_such'"),
        (["made_up"], [], {"prepare.workers": -1}, r"prepare\.workers is -1"),
        (["made_up"], [], {"tokenizer.path": ""}, r"tokenizer\.path is empty"),
        (["made_up"], [], {"tokenizer.path": "nowhere"}, r"nowhere"),
        (["made_up"], [], {"tokenizer.chat_template": "x.jinja"}, r"chat_template x\.jinja cannot be read"),
        (["made_up"], [], {"tokenizer.train_vocab_size": 800}, r"has 700 tokens, .*train_vocab_size is 800"),
        (["made_up"], [], {"model.vocab_size": 600}, r"has 700 tokens, model\.vocab_size is 600"),
        (["made_up"], [], {"data.stages": {"a": {"step": 1, "shares": {"x": 1.0}}}}, r"a\.shares is 'x'"),
        (["made_up"], [], {"data.modules": ("no_module",)}, r"'no_module' of data\.modules"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    task, make_config, tmp_path, sources, held_out, options, message
):
    task(text_records(5))
    with pytest.raises(UserError, match=message):
        run(make_config(*sources, held_out=held_out, **options))
    assert files_of(tmp_path) == {}


def test_a_budget_that_cannot_be_met_is_said_when_the_stores_are_there(task, make_config, tmp_path, caplog):
    task(text_records(5))
    config = make_config("made_up", **{"train.steps": 1000})
    config = replace(config, {"data.sources.made_up.max_epochs": 1.0})
    with pytest.raises(UserError, match=r"made_up.*max_epochs"):
        prepare(config)
    assert "tokens wanted" in caplog.messages[-1]
    assert read_manifest(tmp_path / "stores" / "made_up" / "train").documents == 5


def test_a_tokenizer_is_trained_once(task, make_config, tmp_path):
    task([*text_records(50), {"text": b"\xff" * 1000, "id": "bad"}])
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/notes.txt").write_text("mine")
    options = {
        "tokenizer.path": str(tmp_path / "trained"),
        "tokenizer.train_vocab_size": 300,
        "tokenizer.train_tasks": ("made_up",),
        "prepare.max_bad_share": 0.1,
    }
    said = run(make_config("made_up", **options))
    assert said[0].startswith(f"{tmp_path / 'trained'}: 300 tokens, trained on")
    before = files_of(tmp_path / "trained")
    assert Tokenizer.load(tmp_path / "trained").vocab_size == 300
    assert (tmp_path / "trained/notes.txt").read_text() == "mine"
    assert run(make_config("made_up", **options))[0].startswith("made_up/train")
    assert files_of(tmp_path / "trained") == before
    task([{"text": b"\xff", "id": "bad"}], name="bad")
    options |= {"tokenizer.path": str(tmp_path / "two"), "tokenizer.train_tasks": ("made_up", "bad")}
    with pytest.raises(UserError, match="'bad' has no text in its train split to train a tokenizer on"):
        run(make_config("made_up", **options))


def test_a_tokenizer_is_extended_once_and_checked(task, make_config, tmp_path, tokenizer_dir):
    task(chat_records(5))
    options = {
        "tokenizer.path": str(tmp_path / "chat"),
        "tokenizer.extend": str(tokenizer_dir),
        "tokenizer.add_tokens": CHATML_TOKENS,
    }
    said = run(make_config("made_up", **options))
    assert said[0].startswith(f"{tmp_path / 'chat'}: 705 tokens")
    assert run(make_config("made_up", **options))[0].startswith("made_up/train")
    options["tokenizer.add_tokens"] = (*CHATML_TOKENS, "<more>")
    with pytest.raises(UserError, match=r"chat lacks <more>"):
        run(make_config("made_up", **options))
    prepare_tokenizer.train_sentencepiece(["another " * 9, "one"] * 50, tmp_path / "other", 270)
    options |= {"tokenizer.add_tokens": CHATML_TOKENS, "tokenizer.extend": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"was not made from"):
        run(make_config("made_up", **options))
