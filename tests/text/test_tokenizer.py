import contextlib
import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import sentencepiece
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import CHATML_TEMPLATE, CHATML_TOKENS
from lemur_jax.text.tokenizer import FILE_NAMES, Tokenizer
from lemur_jax.text.tokenizer_files import extend, revise, train_sentencepiece, write_directory
from tests.helpers.documents import VOCAB_SIZE, hard_texts

TEXTS = hard_texts(600)


@pytest.fixture(scope="module")
def hf(chat_dir):
    return AutoTokenizer.from_pretrained(chat_dir)


def load(path, files):
    """Opens a directory with these files and no others."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return Tokenizer.load(path)


def hf_plain(hf, text):
    """Ids of plain text: by default transformers finds control tokens in it, which we never do."""
    return hf.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.fixture(scope="module")
def json_tokenizer(chat_tokenizer):
    """The same tokenizer, opened from its tokenizer.json alone."""
    files = chat_tokenizer.files()
    del files["tokenizer.model"]
    return Tokenizer.from_files(files)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=80)))
def test_transformers_gives_the_same_ids_for_any_text(chat_tokenizer, hf, text):
    assert hf_plain(hf, text) == chat_tokenizer.encode(text)


def test_after_a_control_token_no_space_is_put_in_front(chat_tokenizer, hf):
    for text in TEXTS:
        if "<s>" in text:
            continue
        expected = hf.encode("<|im_end|>" + text, add_special_tokens=False)
        assert [702, *chat_tokenizer.encode(text, prefix=False)] == expected, repr(text)


def test_the_json_file_alone_does_the_same(chat_tokenizer, json_tokenizer):
    assert json_tokenizer.control_tokens == chat_tokenizer.control_tokens
    assert json_tokenizer.vocab_size == chat_tokenizer.vocab_size
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(json_tokenizer, name) == getattr(chat_tokenizer, name)
    for text in TEXTS:
        for prefix in (True, False):
            ids = chat_tokenizer.encode(text, prefix=prefix)
            assert json_tokenizer.encode(text, prefix=prefix) == ids, repr(text)
        assert chat_tokenizer.encode_marked(text)[0] == chat_tokenizer.encode(text), repr(text)
        assert json_tokenizer.decode(ids) == chat_tokenizer.decode(ids)


def test_decode_shows_control_tokens(chat_tokenizer):
    encode = chat_tokenizer.encode
    ids = [1, *encode(" hi"), 702, *encode(" there", prefix=False), 2]
    assert chat_tokenizer.decode(ids) == "<s> hi<|im_end|> there</s>"
    assert chat_tokenizer.decode(ids, skip_special=True) == " hi there"
    assert chat_tokenizer.decode([*encode("a"), 99_999]) == "a\ufffd"
    assert chat_tokenizer.token(99_999) == "\ufffd"
    assert chat_tokenizer.decode([]) == ""


def test_training_is_in_llamas_manner(tokenizer):
    ids = [tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert (tokenizer.vocab_size, ids, tokenizer.added_tokens) == (VOCAB_SIZE, [0, 1, 2, None], {})
    assert len(tokenizer.encode("8675309", prefix=False)) == 7
    assert tokenizer.token(13) == "<0x0A>"
    assert tokenizer.encode("\n\n", prefix=False) == [13, 13]
    assert not any("\n" in tokenizer.token(index) for index in range(VOCAB_SIZE))
    assert len(tokenizer.encode(" " * 8, prefix=False)) == 1


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [([], 300, "texts are empty"), (["hello"], 5000, "too high"), (["hello"], 100, "smaller than")],
)
def test_training_says_what_is_wrong(tmp_path, texts, size, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, tmp_path / "x", size)


@pytest.mark.parametrize("error", [None, OSError("full")])
def test_extend_while_another_process_makes_the_directory(chat_dir, tmp_path, monkeypatch, error):
    write = type(epath.Path("/")).write_bytes

    def write_late(path, content):
        if error:
            raise error
        (tmp_path / "wide").mkdir(exist_ok=True)
        (tmp_path / "wide" / "other").write_text("")
        return write(path, content)

    monkeypatch.setattr(type(epath.Path("/")), "write_bytes", write_late)
    with pytest.raises(OSError, match="full") if error else contextlib.nullcontext():
        extend(chat_dir, tmp_path / "wide", ["<|a|>"])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ([] if error else ["wide"])
    assert error or "<|a|>" in Tokenizer.load(tmp_path / "wide").added_tokens


def test_extend_adds_ids_at_the_end(tokenizer, chat_tokenizer, chat_dir, tmp_path):
    assert chat_tokenizer.added_tokens == {t: VOCAB_SIZE + i for i, t in enumerate(CHATML_TOKENS)}
    assert chat_tokenizer.vocab_size == VOCAB_SIZE + 5
    assert chat_tokenizer.pad_id == VOCAB_SIZE
    assert chat_tokenizer.chat_template == CHATML_TEMPLATE
    assert chat_tokenizer.digest == tokenizer.digest
    again = extend(chat_dir, tmp_path / "more", ["<|im_end|>", "<|new|>"])
    assert again.added_tokens == chat_tokenizer.added_tokens | {"<|new|>": VOCAB_SIZE + 5}
    assert again.digest == tokenizer.digest
    hf = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert again.added_tokens.items() <= hf.get_added_vocab().items()
    assert hf.encode("a<|new|> b") == [1, *again.encode("a"), 705, *again.encode(" b", prefix=False)]
    with pytest.raises(UserError, match="twice"):
        extend(chat_dir, tmp_path / "twice", ["<|a|>", "<|a|>"])
    with pytest.raises(UserError, match="cannot add 'in': it is plain text"):
        extend(chat_dir, tmp_path / "text", ["in"])


def test_extend_keeps_the_template_and_earlier_tokens(chat_dir, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/added_tokens.json").write_text('{"<|old|>": 5}')  # of another tokenizer: removed
    first = extend(chat_dir, tmp_path / "first", ["<|a|>"], chat_template="{{ messages[0]['content'] }}<|a|>")
    second = extend(tmp_path / "first", tmp_path / "second", ["<|b|>"])
    assert "<|old|>" not in Tokenizer.load(tmp_path / "first").added_tokens
    assert second.chat_template == first.chat_template
    assert second.added_tokens == first.added_tokens | {"<|b|>": VOCAB_SIZE + 6}


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_control_tokens_forgotten(chat_dir, byte_level_dir, tmp_path, kind):
    """What named them goes with them, so that transformers does not bring them back."""
    source = chat_dir if kind == "sentencepiece" else byte_level_dir
    old = extend(source, tmp_path / "old", ["<|old|>", "<|older|>", *CHATML_TOKENS])
    config = json.loads((tmp_path / "old/tokenizer_config.json").read_text())
    more = {"pad_token": "<pad>", "additional_special_tokens": ["<|old|>"]}
    (tmp_path / "old/tokenizer_config.json").write_text(json.dumps(config | more))
    old = Tokenizer.load(tmp_path / "old")
    keep = old.added_tokens["<|old|>"]
    if kind == "sentencepiece":
        keep = VOCAB_SIZE
    files = revise(old, keep=keep, add=["<|new|>"])
    new = Tokenizer.from_files(files)
    assert new.added_tokens["<|new|>"] == keep
    assert new.vocab_size == keep + 1
    assert (new.pad_id, new.chat_template) == (None, None)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert len(hf) == keep + 1
    assert hf.convert_tokens_to_ids("<|new|>") == keep
    assert "<|old|>" not in hf.get_vocab()
    for text in TEXTS:
        assert hf_plain(hf, text) == new.encode(text) == old.encode(text)


@pytest.mark.process  # takes seconds
def test_bytes_of_tokens_are_those_of_the_text(chat_tokenizer, byte_level_dir):
    """Joined, without the space that SentencePiece puts in front, they are the text."""
    for tokenizer, space in ((chat_tokenizer, b" "), (Tokenizer.load(byte_level_dir), b"")):
        for text in (text.replace("▁", "") or "a" for text in TEXTS):
            joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
            assert joined == space + text.encode()
        assert tokenizer.token_bytes(tokenizer.eos_id).decode() == tokenizer.token(tokenizer.eos_id)


def test_files_and_pickle(chat_tokenizer):
    assert set(chat_tokenizer.files()) <= set(FILE_NAMES)
    for copy in (Tokenizer.from_files(chat_tokenizer.files()), pickle.loads(pickle.dumps(chat_tokenizer))):
        assert copy.encode(" a b") == chat_tokenizer.encode(" a b")
        assert copy.added_tokens == chat_tokenizer.added_tokens
        assert copy.files() == chat_tokenizer.files()


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_files_of_a_directory_are_read_too(tokenizer, tmp_path, kind):
    """Checkpoints of earlier versions keep them."""
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": eos, "chat_template": "{{ 'A' }}"}
    raw = {
        **{name: tokenizer.files()[name] for name in ("tokenizer.model", "tokenizer.json")},
        "tokenizer_config.json": json.dumps(config).encode(),
        "added_tokens.json": json.dumps({"<pad>": VOCAB_SIZE}).encode(),
    }
    kept, read = Tokenizer.from_files(raw), load(tmp_path / "some", raw)
    assert (kept.files(), kept.digest) == (read.files(), read.digest)
    assert (kept.chat_template, kept.eos_id, kept.vocab_size) == ("{{ 'A' }}", 2, VOCAB_SIZE + 1)


def test_mistakes_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.model and no tokenizer\.json in .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    files = tokenizer.files()
    for added in ({"<a>": 5}, {"<a>": 900, "<b>": 900}):
        with pytest.raises(UserError, match="id"):
            load(tmp_path, files | {"added_tokens.json": json.dumps(added).encode()})
    spec = json.loads(files["tokenizer.json"])
    spec["model"]["vocab"] |= {"▁the": spec["model"]["vocab"]["▁a"], "▁a": spec["model"]["vocab"]["▁the"]}
    with pytest.raises(UserError, match="tokenizer.model gives '▁(a|the)' the id .* remove the file"):
        load(tmp_path, files | {"tokenizer.json": json.dumps(spec).encode()})
    config = json.loads(files["tokenizer_config.json"])
    wrong = {"tokenizer_config.json": json.dumps(config | {"bos_token": "<begin>"}).encode()}
    with pytest.raises(UserError, match="bos_token '<begin>'"):
        load(tmp_path, files | wrong)
    without = json.loads(files["tokenizer.json"]) | {"added_tokens": []}
    with pytest.raises(UserError, match="some has no eos token"):
        load(tmp_path / "some", {"tokenizer.json": json.dumps(without).encode()})


def test_runs_of_spaces_that_score_alike(tokenizer, tmp_path):
    # As in Llama-2's and Mistral's models: then SentencePiece joins what stands leftmost, and 16 is 14 + 2.
    lengths = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16)
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files()["tokenizer.model"])
    missing = {"▁" * length for length in lengths} - {piece.piece for piece in model.pieces}
    # Where they are missing they take the place of long words.
    words = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 4]
    for piece, run in zip([word for word in words if set(word.piece) != {"▁"}], missing, strict=False):
        piece.piece = run
    for piece in model.pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = -1e9
    tied = write_directory(tmp_path, model.SerializeToString())
    files = tied.files()
    del files["tokenizer.model"]
    converted = Tokenizer.from_files(files)
    for before, n, after in itertools.product(("", "a", "\n"), range(70), ("", "the")):
        text = before + " " * n + after
        assert converted.encode(text) == tied.encode(text), repr(text)
    assert tied.token(tied.encode(" " * 16, prefix=False)[0]) == "▁" * 16


def test_a_model_that_cannot_be_converted_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn"] * 9),
        model_writer=model,
        vocab_size=30,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="not a SentencePiece BPE in Llama's manner"):
        write_directory(tmp_path, model.getvalue())


def test_importing_the_data_packages_is_light():
    """So it is in the workers of `prepare`."""
    heavy = "sentencepiece tokenizers transformers torch jax tensorflow tensorstore seqio"
    code = (
        "import sys, lemur_jax.data.mixture, lemur_jax.text.tokenizer_files, lemur_jax.prepare.encoding\n"
        f"print(set({heavy!r}.split()) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n"


@pytest.mark.parametrize(
    ("file", "content", "hint"),
    [
        ("tokenizer.model", b"garbage", "damaged or not .*DecodeError"),
        ("tokenizer.model", b"", "damaged or not .*download it again"),
        ("tokenizer.model", LFS_POINTER, "damaged or not .*git lfs pull"),
        ("tokenizer.json", b'{"model": {"type": "BP', "damaged or not .*JSONDecodeError"),
        ("tokenizer.json", b"[]", "damaged or not .*download it again"),
        ("tokenizer.json", LFS_POINTER, "damaged or not .*git lfs pull"),
        ("tokenizer_config.json", b"[]", "damaged or not .*not a JSON object"),
        ("special_tokens_map.json", b"5", "damaged or not .*not a JSON object"),
        ("added_tokens.json", b"5", "damaged or not .*not a JSON object"),
        ("chat_template.jinja", b"\xff", "damaged or not .*UnicodeDecodeError"),
        # What transformers cannot read.
        ("tokenizer.json", b'{"added_tokens": []}', "Model missing"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"one": {"content": "<a>"}}}', "'one'"),
        ("tokenizer_config.json", b'{"tokenizer_class": "BertJapaneseTokenizer"}', "PreTrainedTokenizerFast"),
        ("tokenizer_config.json", b'{"eos_token": "</s>", "split_special_tokens": true}', "split_special"),
        ("added_tokens.json", b'{"<a>": null}', "its files give '<a>' the id None"),
    ],
)
def test_damaged_files_are_one_clear_line(tokenizer, tmp_path, file, content, hint):
    files = tokenizer.files()
    if file == "tokenizer.json":
        del files["tokenizer.model"]
    with pytest.raises(UserError, match=f"^{tmp_path}/some: .*{hint}"):
        load(tmp_path / "some", files | {file: content})
