"""Tokenizers against the libraries that own their files, on long and odd texts, and read back by transformers."""

import importlib.util
import json
import pydoc
import pydoc_data.topics
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.sentencepiece_model import added_token
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend, write_directory
from tests.helpers.documents import hard_texts

MEGABYTE = 1 << 20


def filled(kind: str) -> str:
    """The text of `TEXTS`, repeated to 1 MiB of UTF-8 if its kind is in `LONG`, else to 64 KiB."""
    text, size = TEXTS[kind], MEGABYTE if kind in LONG else MEGABYTE >> 4
    return (text * (size // len(text.encode()) + 1)).encode()[:size].decode("utf-8", "ignore")


def scripts(*blocks: tuple[int, int]) -> str:
    """Random characters of Unicode blocks, with a space or a line feed now and then."""
    generator = random.Random(0)
    letters = (chr(generator.randrange(*generator.choice(blocks))) for _ in range(40_000))
    return "".join(letter + generator.choice(("", "", "", "", " ", "\n")) for letter in letters)


SOURCES = [path.read_text("utf-8") for path in sorted(Path(pydoc.__file__).parent.glob("[a-d]*.py"))]
TEXTS = {
    "code": "".join(SOURCES),
    "prose": "\n\n".join(pydoc_data.topics.topics.values()),
    "emoji": scripts((0x1F300, 0x1FAFF), (0x1F1E6, 0x1F200), (0x200D, 0x200E), (0xFE0F, 0xFE10)),
    "cjk": scripts((0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0x20000, 0x2A6DF)),
    "control": scripts((0, 0x20), (0x7F, 0xA0), (0x2000, 0x2070), (0xFFF0, 0x10000)),
    "anything": scripts((1, 0xD800), (0xE000, 0x110000)),
    "spaces": "a" + " " * 70_000 + "b" + "\n" * 70_000 + "\t" * 70_000,
}


LONG = ("code", "cjk", "spaces")  # a megabyte of these, 64 KiB of the others


def mistral_directory(path: Path) -> Path:
    """Mistral's first model (Apache-2.0): 32,000 pieces and ids 0, 1, 2 as Llama-2's, which is not free."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("needs a file of mistral-common: pip install --no-deps mistral-common")
    write_directory(path, (Path(spec.origin).parent / "data" / "tokenizer.model.v1").read_bytes())
    return path


@pytest.fixture(scope="module", params=["own", "mistral"])
def sentencepiece_directory(request, tokenizer_dir, tmp_path_factory):
    return tokenizer_dir if request.param == "own" else mistral_directory(tmp_path_factory.mktemp("mistral"))


@pytest.mark.parametrize("kind", TEXTS)
def test_long_texts_have_the_ids_of_sentencepiece_and_come_back(sentencepiece_directory, kind):
    tokenizer = Tokenizer.load(sentencepiece_directory)
    owner = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    text = filled(kind)
    ids = tokenizer.encode(text)
    assert ids == owner.encode(text)
    # The piece for a space stands for U+2581 too.
    assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", TEXTS)
def test_long_texts_have_the_ids_of_tokenizers_and_come_back(byte_level_dir, kind):
    tokenizer = Tokenizer.load(byte_level_dir)
    owner = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    text = filled(kind)
    ids = tokenizer.encode(text)
    assert ids == owner.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_the_converted_json_has_the_ids_of_its_model(sentencepiece_directory):
    owner = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    converted = tokenizers.Tokenizer.from_file(str(sentencepiece_directory / "tokenizer.json"))
    for text in [*hard_texts(600), *(filled(kind)[:50_000] for kind in TEXTS)]:
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):  # the library finds these in text
            assert converted.encode(text, add_special_tokens=False).ids == owner.encode(text), repr(text[:99])


FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def described(hf):
    """All that transformers knows of a tokenizer's tokens: ids, and each flag of the added ones."""
    added = {index: [getattr(t, name) for name in FLAGS] for index, t in hf.added_tokens_decoder.items()}
    return hf.get_vocab(), added


def odd_token(content, index):
    return added_token(content, index, {"lstrip": True, "rstrip": True, "special": False})


def base_directory(kind, path, tokenizer_dir, byte_level_dir):
    """A tokenizer that has an added token of its own, with flags that ours do not have."""
    path.mkdir()
    if kind == "byte-level":
        spec = json.loads((byte_level_dir / "tokenizer.json").read_text())
        spec["added_tokens"].append(odd_token("<tool>", Tokenizer.load(byte_level_dir).vocab_size))
        (path / "tokenizer.json").write_text(json.dumps(spec))
        names = (byte_level_dir / "special_tokens_map.json").read_bytes()
        (path / "special_tokens_map.json").write_bytes(names)
        return path
    extend(tokenizer_dir, path, ["<tool>"])
    odd = odd_token("<tool>", 700)
    spec = json.loads((path / "tokenizer.json").read_text())
    spec["added_tokens"][-1] = odd
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["700"] = {key: value for key, value in odd.items() if key != "id"}
    config["model_max_length"] = 4096
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_transformers_reads_back_what_extend_writes(kind, tmp_path, tokenizer_dir, byte_level_dir):
    base = base_directory(kind, tmp_path / "base", tokenizer_dir, byte_level_dir)
    template = "{% generation %}{{ messages[0]['content'] + '<|im_end|>' }}{% endgeneration %}\n 漢"
    wide = extend(base, tmp_path / "wide", CHATML_TOKENS, chat_template=template)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "wide"))
    (vocab, flags), (wide_vocab, wide_flags) = described(before), described(after)
    size = max(vocab.values()) + 1
    new = {token: size + number for number, token in enumerate(CHATML_TOKENS)}
    assert wide_vocab == vocab | new
    assert wide_flags == flags | {i: [token, False, False, False, False, True] for token, i in new.items()}
    assert wide_flags[size - 1] == ["<tool>", False, True, True, False, False]
    assert (after.chat_template, wide.chat_template) == (template, template)
    assert after.model_max_length == before.model_max_length
    assert wide.added_tokens.items() >= new.items()
    assert [after.bos_token_id, after.eos_token_id, after.pad_token_id] == [wide.bos_id, wide.eos_id, size]
    # And once more through transformers' own writer.
    after.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert described(again) == (wide_vocab, wide_flags)
    assert again.chat_template == template
    ours = Tokenizer.load(tmp_path / "again")
    assert (ours.added_tokens, ours.chat_template) == (wide.added_tokens, template)
    for text in hard_texts(60):
        plain = after.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert plain == wide.encode(text) == ours.encode(text), repr(text)
