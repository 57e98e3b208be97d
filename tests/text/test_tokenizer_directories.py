"""Made-up tokenizer directories against transformers: the same ids and masks, or refused by name.

A directory has a vocabulary of one kind, any class, flags, special tokens spelled in any of four files, and perhaps the
`config.json` of a model beside it. What `AutoTokenizer` makes of it is the reference.
"""

import json
import pydoc_data.topics
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.text.sentencepiece_model import convert, metaspace
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import train_sentencepiece
from tests.helpers.documents import hard_texts

PROSE = "\n".join(list(pydoc_data.topics.topics.values())[:20])[:150_000]
SIZE = 600
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CLASSES = (
    *(None, None, None, "PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer"),
    *("Qwen2TokenizerFast", "GemmaTokenizer", "CodeLlamaTokenizer", "GPTNeoXTokenizerFast"),
    *("TokenizersBackend", "BloomTokenizerFast", "CohereTokenizerFast"),
    *("PreTrainedTokenizer", "NobodysTokenizer"),
)
MODEL_TYPES = (
    "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text olmo2 olmo phi3 granite gpt2 gpt_neox"
    " deepseek_v3 smollm3 stablelm starcoder2 gpt_oss glm4 code_llama"
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + ' [X]' }}{% endif %}"
    "{% endfor %}"
)
# What this program refuses though transformers reads it.
REFUSED = (
    *("no eos token", "is no token of its", "split_special_tokens", "correct the files", "never found"),
    *("is not in its vocabulary", "remove the file", "must follow each other"),
)
TEXTS = (
    *hard_texts(20),
    *("  12 345\n    6 a1b2", "e\u0301 \u212b", "I'm WE'RE", "a ", " <|im_end|> b", "<s> </s>"),
    "the tool <tool> x<tool>y [X]  [X]a <new> <listed> <img>",
)


def byte_level(kind):
    level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix", use_regex=kind != "llama 3")
    before = {
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "llama 3": [pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")],
    }.get(kind, [])
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    made.decoder = decoders.ByteLevel()
    if kind == "digits":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    return json.loads(made.to_str())


def sentencepiece_json(kind, model):
    spec = {key: value for key, value in convert(model).items() if key != "names"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    changes = {
        "prepend": {"normalizer": prepend, "pre_tokenizer": None},
        "metaspace": {"normalizer": None, "pre_tokenizer": metaspace("first")},
        "gemma": {"normalizer": spaces, "pre_tokenizer": split},
    }
    return spec | changes.get(kind, {})


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    model = train_sentencepiece([PROSE], tmp_path_factory.mktemp("model"), SIZE).sentencepiece
    kinds = {kind: byte_level(kind) for kind in ("gpt2", "prefix", "digits", "llama 3")}
    kinds |= {kind: sentencepiece_json(kind, model) for kind in ("ours", "prepend", "metaspace", "gemma")}
    return kinds, model


def flags(random_, special):
    odd = {name: random_.random() < 0.15 for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return {**odd, "special": special}


def add_tokens(spec, random_, begin, end, is_bytes):
    named = [(begin, True), (end, True)] if is_bytes else []
    named += [(name, random_.random() < 0.7) for name in ("<|im_start|>", "<|im_end|>", "<tool>", "[X]")]
    for name, special in named[:2] * is_bytes + [
        pair for pair in named[2 * is_bytes :] if random_.random() < 0.5
    ]:
        index = len(spec["model"]["vocab"]) + len(spec["added_tokens"]) - (0 if is_bytes else 3)
        spec["added_tokens"].append({"id": index, "content": name, **flags(random_, special)})
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    around = {"type": "RobertaProcessing", "cls": [begin, ids[begin]], "sep": [end, ids[end]]}
    around |= {"trim_offsets": True, "add_prefix_space": False}
    spec["post_processor"] = random_.choice([spec["post_processor"], None, level, around])


def spelled(random_, token):
    """A token as a string or, as older files have it, a mapping."""
    odd = flags(random_, True)
    del odd["special"]
    return token if random_.random() < 0.7 else {"__type": "AddedToken", "content": token, **odd}


def tokenizer_config(random_, spec, begin, end):
    config = {"bos_token": spelled(random_, begin), "eos_token": spelled(random_, end)}
    chances = {
        **{"unk_token": ["<unk>"], "pad_token": [end, "<pad>"], "add_bos_token": [True, False]},
        **{"add_eos_token": [True, False], "legacy": [True, False], "add_prefix_space": [True, False]},
        **{"clean_up_tokenization_spaces": [True], "split_special_tokens": [True, False, False, False]},
        **{"additional_special_tokens": [[], ["<tool>", "<new>"]], "tokenizer_class": CLASSES},
        "extra_special_tokens": [{"image_token": "<img>"}, {}, ["<img>"]],
    }
    for name, values in chances.items():
        if random_.random() < (0.9 if name == "tokenizer_class" else 0.2):
            config[name] = random_.choice(values)
    if config.get("tokenizer_class", "") is None:
        del config["tokenizer_class"]
    if spec is not None and random_.random() < 0.4:
        listed = [{**token, "rstrip": random_.random() < 0.1} for token in spec["added_tokens"]]
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in listed}
        if random_.random() < 0.2:
            index = len(spec["model"]["vocab"]) + 10
            config["added_tokens_decoder"][str(index)] = {"content": "<listed>", **flags(random_, True)}
    return config


def write_directory(path, vocabularies, random_):
    kinds, model = vocabularies
    kind = random_.choice([None, None, *kinds])
    is_bytes = kind in ("gpt2", "prefix", "digits", "llama 3")
    begin, end = ("<|begin|>", "<|end|>") if is_bytes else ("<s>", "</s>")
    spec = None if kind is None else json.loads(json.dumps(kinds[kind]))
    files = {}
    if spec is not None:
        add_tokens(spec, random_, begin, end, is_bytes)
        files["tokenizer.json"] = spec
    if random_.random() < 0.95:
        files["tokenizer_config.json"] = tokenizer_config(random_, spec, begin, end)
    if random_.random() < 0.3:
        lists = [{}, {"additional_special_tokens": ["<tool>"]}]
        files["special_tokens_map.json"] = {"bos_token": begin, "eos_token": end, **random_.choice(lists)}
    if random_.random() < 0.1:
        files["added_tokens.json"] = {"<listed>": SIZE + 5}
    if random_.random() < 0.5:
        files["config.json"] = {"model_type": random_.choice(MODEL_TYPES.split())}
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    if spec is None or (not is_bytes and random_.random() < 0.2):
        (path / "tokenizer.model").write_bytes(model)


def compare(path):
    """Whether transformers opens the directory and this program takes it; all that they give must be equal then."""
    try:
        theirs = AutoTokenizer.from_pretrained(path)
        all_ids = [theirs(text)["input_ids"] for text in TEXTS]
    except Exception:
        return False
    try:
        ours = Tokenizer.load(path)
    except UserError as error:
        if not any(reason in str(error) for reason in REFUSED):
            raise
        return False
    assert ours.eos_id == theirs.eos_token_id
    assert ours.config["add_bos_token"] == (theirs("a")["input_ids"][0] == ours.bos_id)
    with_template = Tokenizer.from_files({**ours.files(), "chat_template.jinja": TEMPLATE.encode()})
    written = path / "written"
    written.mkdir()
    for name, content in ours.files().items():
        (written / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(written)
    for text, ids in zip(TEXTS, all_ids, strict=True):
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_with_control_tokens(text) == plain, text
        assert again(text)["input_ids"] == ids, text
        if any(token in text for token in ours.control_tokens):
            continue
        assert ours.encode(text) == plain, text
        assert [*ours.encode_prompt(text), *ours.end_ids] == ids, text
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text + "."}]
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATE, **options)
        assert encode_chat(with_template, messages) == (expected["input_ids"], expected["assistant_masks"]), (
            text
        )
    return True


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 540), marks=pytest.mark.slow)])
def test_directories_are_read_as_transformers_reads_them_or_refused(seeds, vocabularies, tmp_path_factory):
    taken = 0
    for seed in seeds:
        path = tmp_path_factory.mktemp(f"seed_{seed}_")
        write_directory(path, vocabularies, random.Random(seed))
        try:
            taken += compare(path)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert taken > len(seeds) / 2


def test_tokens_that_a_class_adds_by_itself_get_no_id(vocabularies, tmp_path):
    """CodeLlama-34b has 32,000 rows and no infilling tokens; transformers adds them with ids from 32,000 on."""
    (tmp_path / "tokenizer.model").write_bytes(vocabularies[1])
    names = dict(tokenizer_class="CodeLlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert theirs.get_vocab()["▁<PRE>"] == SIZE
    assert (ours.vocab_size, ours.find("▁<PRE>"), "prefix_token" in ours.special_names) == (SIZE, None, False)
    assert ours.encode("def f():") == theirs("def f():", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_splits_text_in_its_own_way_is_named(vocabularies, tmp_path, caplog, kind):
    """As SmolLM2's, whose tokenizer.json splits digits too."""
    spec = json.loads(json.dumps(vocabularies[0]["digits"]))
    add_tokens(spec, random.Random(0), "<|begin|>", "<|end|>", True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": kind, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[-8:-2]:
        assert ours.encode_with_control_tokens(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ("splits text for" in caplog.text) == (kind != "PreTrainedTokenizerFast")


def test_one_of_several_templates(vocabularies, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabularies[0]["ours"]))
    templates = {"default": "A", "tool_use": "B"}
    for known, expected in ((templates, "A"), ({"tool_use": "B"}, None)):
        listed = [{"name": name, "template": source} for name, source in known.items()]
        config = {"eos_token": "</s>", "chat_template": listed}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if expected:
            assert Tokenizer.load(tmp_path).chat_template == expected
        else:
            with pytest.raises(UserError, match="chat templates tool_use but none named default"):
                Tokenizer.load(tmp_path)
