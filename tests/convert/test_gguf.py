"""GGUF files written with the library gguf from a model and tokenizers of transformers."""

import io
import json

import jax
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError
from lemur_jax.convert.hf_config import read_config
from lemur_jax.convert.hf_weights import open_weights
from lemur_jax.convert.import_hf import import_hf, load_hf_params
from lemur_jax.convert.source import open_source
from lemur_jax.text.tokenizer import Tokenizer
from tests.helpers.documents import hard_texts

gguf = pytest.importorskip("gguf")

SHAPE = {"num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.02}


def interleaved(tensor, heads):
    """Rows of q and k as llama.cpp wants them."""
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def write(path, model, kind="F32", **changes):
    """A model of transformers as a GGUF file; `changes` of the metadata, None leaves a key out."""
    config, state = model.model.config, model.state()
    family = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(str(path), family)
    data = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for key, value in (data | changes).items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{family}.{key}", value)
    quantization = gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        tensor, heads = tensor.numpy(), rotated.get(name.split(".")[-2])
        if family == "gemma3":  # as llama.cpp's converter
            tensor = tensor + 1 if "norm" in name else tensor
        elif heads:
            tensor = interleaved(tensor, heads)
        ours = names.get_name(name, (".weight",))
        if tensor.ndim == 1 or tensor.shape[-1] % 32 or kind == "F32":
            writer.add_tensor(ours, np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(ours, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
    finish(writer)
    return path


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(file, model, largest):
    """The configs are equal; weights differ by at most `largest` of the largest."""
    (config, params), (expected_config, expected) = map(load_hf_params, (file, model.path))
    assert config == expected_config
    for ours, theirs in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert np.abs(ours - theirs).max() <= largest * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("kind", "largest"),
    [("F32", 0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_1", 0.1), ("Q5_0", 0.1)],
)
def test_weights_are_those_of_the_directory(make_model, tmp_path, kind, largest):
    model = make_model(**SHAPE)
    assert_same(write(tmp_path / "model.gguf", model, kind), model, largest)
    for tensor in open_weights(tmp_path / "model.gguf").values():
        if len(tensor.shape) == 2 and not tensor.heads:
            np.testing.assert_array_equal(tensor.rows("part", 5, 7).read(), tensor.read()[5:7])


@pytest.mark.parametrize(("width", "scale"), [(256, 256), (12, 8)])  # (12, 32 / 4): the rule of the 27B model
def test_gemma(make_model, tmp_path, width, scale):
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    rope["full_attention"] = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    shape = dict(head_dim=width, query_pre_attn_scalar=scale, num_hidden_layers=6, sliding_window=40)
    model = make_model(kind="Gemma3Text", rope_parameters=rope, pad_token_id=0, **shape, **SHAPE)
    data = {"attention.key_length": width, "attention.value_length": width, "attention.sliding_window": 40}
    data |= {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert_same(write(tmp_path / "model.gguf", model, **data), model, 1e-6)


def test_hosts_tell_files_of_one_shape_apart(make_model, tmp_path, monkeypatch):
    model, digests = make_model(**SHAPE), []
    monkeypatch.setattr(hosts, "agree", lambda what, digest: digests.append(digest()))
    for change in (0, 0, 1):
        model.state()["model.layers.2.mlp.down_proj.weight"].add_(change)
        with pytest.raises(KeyError):  # no parameter has a place
            load_hf_params(write(tmp_path / "model.gguf", model, "Q8_0"), {})
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("kind", [{}, {"rope.scaling.type": "linear"}])
def test_linear_scaling(make_model, tmp_path, kind):
    """llama.cpp takes a factor without a type for linear (`llama_model::load_hparams`)."""
    model = make_model(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, **SHAPE)
    file = write(tmp_path / "model.gguf", model, **kind, **{"rope.scaling.factor": 4.0})
    assert read_config(file) == read_config(model.path)


def test_import_and_reading_without_an_import(make_model, tmp_path):
    file = write(tmp_path / "model.gguf", make_model(**SHAPE))
    config = import_hf(file, tmp_path / "checkpoint")
    assert config == open_source(file).model == open_source(tmp_path / "checkpoint").model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count is 8, which is not implemented"),
        ({"rope.scaling.type": "yarn"}, "only none and linear"),
        ({"rope.dimension_count": 4}, "only whole heads"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 4}, "is missing"),
        ({"embedding_length": "32"}, "llama.embedding_length is '32', not a positive integer"),
        ({"attention.head_count": "4"}, "llama.attention.head_count is '4', not a positive integer"),
        ({"attention.head_count_kv": 1}, "has shape"),
    ],
)
def test_what_is_not_implemented_is_refused(make_model, tmp_path, changes, message):
    file = write(tmp_path / "model.gguf", make_model(**SHAPE), **changes)
    with pytest.raises(UserError, match=message):
        load_hf_params(file)


def test_a_damaged_file_is_one_line(make_model, tmp_path):
    file = write(tmp_path / "model.gguf", make_model(**SHAPE))
    whole = file.read_bytes()
    for content in (b"", b"version https://git-lfs", whole[:200], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not a whole GGUF file"):
            load_hf_params(file)


def write_tokenizer(path, data, types):
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in data.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        else:
            add = writer.add_string if isinstance(value, str) else writer.add_array
            add(f"tokenizer.ggml.{key}", value)
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    finish(writer)
    return Tokenizer.load(path)


def sentencepiece_data(model, **changes):
    """(metadata, types of the pieces) of a SentencePiece model."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    tokens, scores = [piece.piece for piece in pieces], [piece.score for piece in pieces]
    data = dict(
        model="llama", tokens=tokens, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0
    )
    return data | changes, [piece.type for piece in pieces]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_byte_level_tokenizer(byte_level_dir, tmp_path, pre):
    spec = json.loads((byte_level_dir / "tokenizer.json").read_text())
    tokens = sorted(vocab := spec["model"]["vocab"], key=vocab.get)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in spec["model"]["merges"]]
    control = {token["content"] for token in spec["added_tokens"]}
    tokens += [token["content"] for token in spec["added_tokens"] if token["content"] not in vocab]
    types = [3 if token in control else 1 for token in tokens]
    original = Tokenizer.load(byte_level_dir)
    data = dict(model="gpt2", pre=pre, tokens=tokens, merges=merges, add_bos_token=False)
    data |= dict(bos_token_id=original.bos_id, eos_token_id=original.eos_id)
    ours = write_tokenizer(tmp_path / "tokenizer.gguf", data, types)
    for name, content in ours.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.control_tokens, ours.vocab_size) == (original.control_tokens, original.vocab_size)
    assert ours.chat_template == theirs.chat_template == "{{ messages[0]['content'] }}"
    assert ours.generation_stop_ids == (original.eos_id,)
    assert theirs("a b")["input_ids"] == ours.encode("a b")
    digits = ours.encode("12345")
    assert len(digits) == 5 if pre == "smollm" else digits == original.encode("12345")
    for text in hard_texts(100):
        if not any(token in text for token in control):
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.decode(ours.encode(text)) == text
            if pre == "gpt-2":
                assert ours.encode(text) == original.encode(text)


@pytest.mark.parametrize(
    "changes",
    [{"tokens": [1, 2]}, {"tokens": ["a"] * 3}, {"bos_token_id": 10**6}, {"scores": [0.5]}, {"pre": ["x"]}],
)
def test_damaged_arrays_of_a_tokenizer_are_one_line(tokenizer_dir, tmp_path, changes):
    model = (tokenizer_dir / "tokenizer.model").read_bytes()
    data, types = sentencepiece_data(model, add_bos_token=False)
    assert write_tokenizer(tmp_path / "whole.gguf", data, types).encode_prompt("a") != []
    if "pre" in changes:
        changes = changes | {"model": "gpt2"}
    with pytest.raises(UserError, match="its tokenizer is damaged|can be imported"):
        write_tokenizer(tmp_path / "damaged.gguf", data | changes, types)
    assert write_tokenizer(tmp_path / "whole.gguf", data, types).begin_ids == []


def test_sentencepiece_tokenizer(tokenizer_dir, tmp_path):
    model = (tokenizer_dir / "tokenizer.model").read_bytes()
    ours = write_tokenizer(tmp_path / "tokenizer.gguf", *sentencepiece_data(model))
    original = Tokenizer.load(tokenizer_dir)
    for text in hard_texts(100):
        assert ours.encode(text) == original.encode(text)


def test_sentencepiece_tokenizer_without_a_space_in_front(tmp_path):
    """As Gemma's: runs of spaces and of newlines are user-defined pieces, which the file spells with spaces.

    A text that spells the visible space is left out: transformers takes a run of them for the added token.
    """
    model, runs = io.BytesIO(), ["\u2581" * n for n in range(2, 9)] + ["\n\n", "\n\n\n", "<b>"]
    texts = [text for text in hard_texts(400) if "\u2581" not in text]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        **dict(model_writer=model, model_type="bpe", vocab_size=700, byte_fallback=True, minloglevel=2),
        **dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False),
        user_defined_symbols=runs,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    data, types = sentencepiece_data(model.getvalue(), add_space_prefix=False)
    data["tokens"] = [piece.replace("\u2581", " ") if piece in runs else piece for piece in data["tokens"]]
    ours = write_tokenizer(tmp_path / "tokenizer.gguf", data, types)
    for text in [*texts[:100], "a  b", "   a\n\n\n\n<b>  x", "a b", " a", ""]:
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "only gpt2"),
        ({"pre": "tekken"}, "only smollm"),
        ({"add_eos_token": True}, "an end"),
    ],
)
def test_a_tokenizer_that_is_not_supported_is_refused(tmp_path, changes, message):
    data = dict(model="gpt2", pre="gpt-2", tokens=["a", "b"], merges=["a b"])
    with pytest.raises(UserError, match=message):
        write_tokenizer(tmp_path / "tokenizer.gguf", data | changes, [1, 1])
