"""What stands before and after a text: that of transformers' `add_special_tokens=True`."""

import json

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lemur_jax.prepare.encoding import encode
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import write_byte_level

TEXT = "def f(x):\n    return 10\n"
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture
def make(byte_level_dir, tmp_path):
    """make(bos, eos, before, after) -> a tokenizer whose post-processor writes tokens around a text, and its twin."""

    def make(bos, eos, before, after):
        base = Tokenizer.load(byte_level_dir)
        ids = base.control_tokens | {token: base.vocab_size + index for index, token in enumerate(CHAT)}
        around = [(token, ids[token]) for token in (*before, *after)]
        processor = TemplateProcessing(single=[*before, "$A", *after], special_tokens=around)
        parts = {"post_processor": json.loads(processor.__getstate__())}
        config = {"bos_token": bos, "eos_token": eos}
        ours = write_byte_level(byte_level_dir, tmp_path, CHAT, config, **parts)
        return ours, AutoTokenizer.from_pretrained(tmp_path)

    return make


def test_ids_before_a_prompt_that_spells_them_are_not_repeated(make):
    ours, theirs = make(BEGIN, END, [BEGIN], [END])
    assert (ours.begin_ids, ours.end_ids) == ([ours.bos_id], [ours.eos_id])
    ids = theirs(TEXT)["input_ids"][:-1]
    assert ours.encode_prompt(TEXT) == ids == ours.encode_prompt(BEGIN + TEXT, control_tokens=True)


@pytest.mark.parametrize(
    ("bos", "eos", "before", "after", "end"),
    [
        # SmolLM2's and Qwen2's chat markers are bos and eos, or there is no bos; texts end in <|endoftext|>.
        ("<|im_start|>", "<|im_end|>", [], [], "<|endoftext|>"),
        (None, "<|im_end|>", [], [], "<|endoftext|>"),
        # A bos that is eos is written once.
        ("<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"], [], "<|endoftext|>"),
        # What the post-processor appends, although it is not eos.
        (BEGIN, END, [], [BEGIN], BEGIN),
    ],
)
def test_what_ends_a_document(make, bos, eos, before, after, end):
    ours, theirs = make(bos, eos, before, after)
    ids = theirs(TEXT)["input_ids"]
    assert [*ours.encode_prompt(TEXT), *ours.end_ids] == ids
    plain = ours.encode(TEXT)
    assert ours.encode(TEXT, prefix=False) == plain
    assert encode(ours, {"text": TEXT.encode()}).tokens.tolist() == [*plain, ours.control_tokens[end]]


def test_a_step_names_other_separators(chat_tokenizer):
    steps = json.dumps({"separators": {"begin": ["<|im_start|>"], "end": []}})
    begin = chat_tokenizer.control_tokens["<|im_start|>"]
    tokens = encode(chat_tokenizer, {"text": b"a"}, steps).tokens.tolist()
    assert tokens == [begin, *chat_tokenizer.encode("a")]
