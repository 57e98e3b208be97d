"""Tokenizing records in worker processes."""

import json
import multiprocessing
import signal
import subprocess
import sys

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.prepare import encoding
from lemur_jax.prepare.cleaning import parse_steps
from lemur_jax.prepare.encoding import BadRecord, Encoded, encode, encoder
from lemur_jax.text.chat_template import encode_chat

TALK = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Ja, 漢字."}]


def record(**fields):
    return {key: value if isinstance(value, bytes) else value.encode() for key, value in fields.items()}


def test_text_stands_between_bos_and_eos(tokenizer):
    text = "Grüße,\n    def f(x): </s>"
    result = encode(tokenizer, record(id="a/1", text=text, source="s"))
    assert isinstance(result, Encoded)
    assert result.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert result.tokens.dtype == np.uint32
    assert (result.id, result.mask, result.n_bytes) == ("a/1", None, len(text.encode()))


def test_conversations_keep_their_mask(chat_tokenizer):
    result = encode(chat_tokenizer, record(id="c", messages=json.dumps(TALK)))
    ids, mask = encode_chat(chat_tokenizer, TALK)
    assert (result.tokens.tolist(), result.mask.tolist()) == (ids, mask)
    assert result.n_bytes == len("Ja, 漢字.\n".encode())
    untrained = [*TALK, {"role": "assistant", "content": "", "train": False}]
    assert isinstance(encode(chat_tokenizer, record(messages=json.dumps(untrained))), Encoded)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": b"abc \xff"}, "invalid UTF-8"),
        ({"text": b"abc", "meta": b"null"}, "meta is not a JSON object"),
        ({"messages": b"[\xff]"}, "invalid UTF-8"),
        ({"messages": b'[{"role": "assistant", "content": "\\ud800"}]'}, "invalid UTF-8"),
        ({"messages": b""}, "not JSON"),
        ({"messages": b"{]"}, "not JSON"),
        ({"messages": b'"hello"'}, "list of messages"),
        ({"messages": b"[]"}, "list of messages"),
        ({"messages": b'["hello"]'}, "message 0"),
        ({"messages": b'[{"role": "user"}]'}, "message 0"),
        ({"messages": b'[{"role": "user", "content": 3}]'}, "message 0"),
        ({"messages": b'[{"role": "user", "content": "hello"}]'}, "no supervised token"),
        ({"messages": b"[" * 100_000}, "too deep"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(chat_tokenizer, fields, reason):
    result = encode(chat_tokenizer, record(id="bad-1", **fields))
    assert isinstance(result, BadRecord)
    assert result.id == "bad-1"
    assert reason in result.reason
    assert "\n" not in result.reason
    assert set(result.record) == {"id", *fields}
    json.dumps(result.record)


CALLS = [[{"function": {"name": name}}] for name in "fg"]


@pytest.mark.parametrize("content", ["messages", "preferences"])
@pytest.mark.parametrize(
    ("turn", "beside"),
    [
        *(([{key: "a"}, {key: "b"}], [{}] * 2) for key in ("reasoning_content", "thinking")),
        ([{"role": "tool", "name": name} for name in "fg"], [{}] * 2),
        ([{"tool_calls": calls} for calls in CALLS], [{}] * 2),
        ([{}] * 2, [{"tools": calls} for calls in CALLS]),
        ([{}] * 2, [{"chat_template_kwargs": {"messages_": n}} for n in range(2)]),
        ([{"train": True}, {"train": False}], [{}] * 2),
    ],
)
def test_conversations_that_train_other_tokens_are_no_duplicates(chat_tokenizer, content, turn, beside):
    steps, found = parse_steps("t", {"exact_duplicates": {}, "near_duplicates": {}}), []
    for index in (0, 1, 1):
        value = {"messages": [TALK[0], TALK[1] | turn[index], *TALK], **beside[index]}
        value = {"chosen": value} if content == "preferences" else value
        result = encode(chat_tokenizer, record(id="c", **{content: json.dumps(value)}), steps)
        found.append(set(result.fingerprints.values()))
    assert found[1] == found[2]
    assert not found[0] & found[1]


def mixed_records(count):
    for index in range(count):
        if index % 10 == 3:
            yield record(id=f"doc-{index}", text=b"\xff")
        else:
            yield record(text=f"document {index} " + "x = 1\n" * (index % 7))


def test_a_corpus_is_never_in_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_RECORDS", 3)
    taken = 0

    def records():
        nonlocal taken
        for item in mixed_records(1000):
            taken += 1
            yield item

    with encoder(tokenizer, 2) as encode_all:
        for index, _ in enumerate(encode_all(records())):
            assert taken <= index + 3 * 6
            if index == 100:
                break


def test_chunks_are_bounded_in_bytes():
    items = [record(text="x" * 100_000) for _ in range(10)]
    chunks = list(encoding._chunks(items))
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 1]
    assert [item for chunk in chunks for item in chunk] == items


def test_a_worker_that_dies_is_one_line(tokenizer):
    """Also while it writes a result that nobody reads, as this process is busy in one long instruction."""

    def run():
        with encoder(tokenizer, 2) as encode_all:
            next(encode_all([record(text="x")]))
            for index, _ in enumerate(encode_all(record(text="x = 1\n" * 10_000) for _ in range(1000))):
                if index == 10:
                    workers = [str(child.pid) for child in multiprocessing.active_children()]
                    subprocess.Popen(["sh", "-c", 'sleep 0.7; kill -9 "$@"', "sh", *workers])
                    assert 3**3_000_000

    with pytest.raises(UserError, match=r"prepare\.workers"):
        run()


def test_an_exception_ends_the_workers(tokenizer):
    def run():
        with encoder(tokenizer, 2) as encode_all:
            next(encode_all(mixed_records(1000)))
            assert multiprocessing.active_children()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert multiprocessing.active_children() == []


@pytest.mark.process
def test_workers_do_not_outlive_a_killed_parent(tokenizer_dir, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"""if __name__ == "__main__":
    import multiprocessing, os, signal
    from lemur_jax.prepare.encoding import encoder
    from lemur_jax.text.tokenizer import Tokenizer

    with encoder(Tokenizer.load({str(tokenizer_dir)!r}), 2) as encode_all:
        list(encode_all([{{"text": b"abc"}}] * 600))
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    # Its workers would keep the pipe open.
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(result.stdout.split()) == 2
