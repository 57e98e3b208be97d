"""What stands before and after a text: that of transformers' `add_special_tokens=True`."""

import json

import pytest
from transformers import AutoTokenizer

from lemur_jax.prepare.encoding import encode
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import write_byte_level

TEXT = "def f(x):\n    return 10\n"
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(before, after):
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in before]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in after]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in (*before, *after)}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def test_ids_before_a_prompt_that_spells_them_are_not_repeated(byte_level_dir, tmp_path):
    base = Tokenizer.load(byte_level_dir)
    (begin, end), ids = base.special_names.values(), (base.bos_id, base.eos_id)
    before = template([(begin, ids[0])], [(end, ids[1])])
    config = {"bos_token": begin, "eos_token": end}
    ours = write_byte_level(byte_level_dir, tmp_path, (), config, post_processor=before)
    assert (ours.begin_ids, ours.end_ids) == ([ids[0]], [ids[1]])
    theirs = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"][:-1]
    assert ours.encode_prompt(TEXT) == theirs == ours.encode_prompt(begin + TEXT, control_tokens=True)


# Those of SmolLM2 and Qwen2, whose chat markers are bos and eos, or there is no bos; texts end in <|endoftext|>.
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("bos", ["<|im_start|>", None])
def test_documents_do_not_stand_between_chat_markers(byte_level_dir, tmp_path, bos):
    config = {"bos_token": bos, "eos_token": "<|im_end|>"}
    tokenizer = write_byte_level(byte_level_dir, tmp_path, CHAT, config, post_processor=BYTES)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert tokenizer.encode_prompt(TEXT) == ids
    assert tokenizer.encode(TEXT, prefix=False) == ids
    end = tokenizer.control_tokens["<|endoftext|>"]
    assert encode(tokenizer, {"text": TEXT.encode()}).tokens.tolist() == [*ids, end]


def test_bos_that_is_eos_is_written_once(byte_level_dir, tmp_path):
    index = Tokenizer.load(byte_level_dir).vocab_size
    config = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    before = template([("<|endoftext|>", index)], [])
    tokenizer = write_byte_level(byte_level_dir, tmp_path, CHAT, config, post_processor=before)
    assert tokenizer.encode_prompt("a") == [index, *tokenizer.encode("a")]
    tokens = encode(tokenizer, {"text": b"a"}).tokens.tolist()
    assert tokens == [*tokenizer.encode("a"), index]


def test_a_step_names_other_separators(chat_tokenizer):
    steps = json.dumps({"separators": {"begin": ["<|im_start|>"], "end": []}})
    result = encode(chat_tokenizer, {"text": b"a"}, steps)
    assert result.tokens.tolist() == [
        chat_tokenizer.control_tokens["<|im_start|>"],
        *chat_tokenizer.encode("a"),
    ]


def test_documents_end_with_what_the_post_processor_appends(byte_level_dir, tmp_path):
    ours = Tokenizer.load(byte_level_dir)
    other = (ours.token(ours.bos_id), ours.bos_id)  # not eos
    config = {"bos_token": other[0], "eos_token": ours.token(ours.eos_id)}
    tokenizer = write_byte_level(byte_level_dir, tmp_path, (), config, post_processor=template([], [other]))
    tokens = encode(tokenizer, {"text": TEXT.encode()}).tokens.tolist()
    assert tokens == AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert tokens[-1] == ours.bos_id != ours.eos_id
