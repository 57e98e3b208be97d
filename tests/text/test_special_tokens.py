"""What stands before and after a text: that of transformers' `add_special_tokens=True`."""

import json

import pytest
from transformers import AutoTokenizer

from lemur_jax.prepare.encoding import encode
from lemur_jax.text.tokenizer import Tokenizer

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
    files = {name: json.loads(data) for name, data in ours.files().items() if name.endswith("json")}
    files["tokenizer.json"]["post_processor"] = processor
    names = {"bos_token": bos[0], "eos_token": eos[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    files["tokenizer_config.json"] = names | flags
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
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


def tokenizer_of_a_chat_model(byte_level_dir, tmp_path, **names):
    """SmolLM2's and Qwen2's way: chat markers are bos and eos, or there is no bos; texts end in <|endoftext|>."""
    spec = json.loads((byte_level_dir / "tokenizer.json").read_text())
    size = Tokenizer.load(byte_level_dir).vocab_size
    for index, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        spec["added_tokens"].append({"id": size + index, "content": name, **flags})
    spec["post_processor"] = BYTES
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("bos", ["<|im_start|>", None])
def test_documents_do_not_stand_between_chat_markers(byte_level_dir, tmp_path, bos):
    tokenizer = tokenizer_of_a_chat_model(byte_level_dir, tmp_path, bos_token=bos, eos_token="<|im_end|>")
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert tokenizer.encode_prompt(TEXT) == ids
    assert tokenizer.encode(TEXT, prefix=False) == ids
    end = tokenizer.control_tokens["<|endoftext|>"]
    assert encode(tokenizer, {"text": TEXT.encode()}, 0).tokens.tolist() == [*ids, end]


def test_bos_that_is_eos_is_written_once(byte_level_dir, tmp_path):
    tokenizer = tokenizer_of_a_chat_model(
        byte_level_dir, tmp_path, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    index = tokenizer.eos_id
    spec["post_processor"] = template([("<|endoftext|>", index)], [])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_prompt("a") == [index, *tokenizer.encode("a")]
    tokens = encode(tokenizer, {"text": b"a"}, 0).tokens.tolist()
    assert tokens == [*tokenizer.encode("a"), index]


def test_a_step_names_other_separators(chat_tokenizer):
    steps = json.dumps({"separators": {"begin": ["<|im_start|>"], "end": []}})
    result = encode(chat_tokenizer, {"text": b"a"}, 0, steps)
    assert result.tokens.tolist() == [
        chat_tokenizer.control_tokens["<|im_start|>"],
        *chat_tokenizer.encode("a"),
    ]


def test_documents_end_with_what_the_post_processor_appends(byte_level_dir, tmp_path):
    ours = Tokenizer.load(byte_level_dir)
    other = (ours.token(ours.bos_id), ours.bos_id)  # not eos
    files = {name: json.loads(data) for name, data in ours.files().items() if name.endswith("json")}
    files["tokenizer.json"]["post_processor"] = template([], [other])
    files["tokenizer_config.json"] = {
        "bos_token": other[0],
        "eos_token": ours.token(ours.eos_id),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    tokens = encode(Tokenizer.load(tmp_path), {"text": TEXT.encode()}, 0).tokens.tolist()
    assert tokens == AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert tokens[-1] == ours.bos_id != ours.eos_id
