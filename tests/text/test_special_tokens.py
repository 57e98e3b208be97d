"""What stands before and after a text: that of transformers' `add_special_tokens=True`."""

import json

import pytest
from transformers import AutoTokenizer

from lemur_jax.prepare.encoding import encode
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import write_byte_level

TEXT = "def f(x):\n    return 10\n"
FLAGS = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
]
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(before, after):
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in before]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in after]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in (*before, *after)}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def post_processors(bos, eos):
    llama_3 = {"type": "Sequence", "processors": [BYTES, template([bos], [])]}
    roberta = {"type": "RobertaProcessing", "cls": bos, "sep": eos}
    roberta |= {"trim_offsets": True, "add_prefix_space": False}
    return {
        "none": (None, [], []),
        "GPT-2": (BYTES, [], []),
        "Llama-3": (llama_3, [bos[1]], []),
        "eos": (template([bos], [eos]), [bos[1]], [eos[1]]),
        "RoBERTa": (roberta, [bos[1]], [eos[1]]),
    }


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", post_processors(("", 0), ("", 0)))
def test_the_post_processor_decides_where_there_is_one(byte_level_dir, tmp_path, kind, flags):
    ours = Tokenizer.load(byte_level_dir)
    bos, eos = ((ours.token(index), index) for index in (ours.bos_id, ours.eos_id))
    processor, before, after = post_processors(bos, eos)[kind]
    config = {"bos_token": bos[0], "eos_token": eos[0], **flags}
    write_byte_level(byte_level_dir, tmp_path, config=config, post_processor=processor)
    check(tmp_path, before, after)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "LlamaTokenizer"}], ids=str)
def test_flags_decide_for_a_sentencepiece_model(tokenizer_dir, tmp_path, config, flags):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | config | flags))
    check(tmp_path, [1] * flags.get("add_bos_token", False), [2] * flags.get("add_eos_token", False))


def check(path, before, after):
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    assert (ours.begin_ids, ours.end_ids) == (before, after)
    assert [*ours.encode_prompt(TEXT), *after] == theirs(TEXT)["input_ids"]
    spelled = theirs.decode(before) + TEXT
    assert ours.encode_prompt(spelled, control_tokens=True) == [
        *before,
        *ours.encode(TEXT, prefix=not before),
    ]


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
