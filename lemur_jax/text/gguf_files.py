"""GGUF files: their metadata, and their tokenizer as the files of a Hugging Face directory.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` library reads them.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import recovery_hint
from lemur_jax.text.files import make_files
from lemur_jax.text.sentencepiece_model import (
    BPE,
    SPACE,
    added_token,
    merges_by_score,
    post_processor,
    without_prefix,
)

SUFFIX = ".gguf"
# `tokenizer.ggml.pre`, the name of a way to split text before byte-level BPE -> the pre-tokenizer and `ignore_merges`.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
_LLAMA3_PARTS = {"type": "Sequence", "pretokenizers": [_SPLIT, {**_BYTES, "use_regex": False}]}
_PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact"), (_DIGITS, False)),
    "llama-bpe": (_LLAMA3_PARTS, True),
    "gpt-2": (_BYTES, False),
}
# `tokenizer.ggml.token_type`, the same numbers as in a SentencePiece model.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_KINDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def is_gguf(path: epath.PathLike) -> bool:
    """Whether a path names a GGUF file rather than a directory."""
    return os.fspath(path).endswith(SUFFIX)


def open_gguf(path: epath.PathLike) -> Any:
    """The `gguf.GGUFReader` of a local file, which is mapped and not read.

    Raises UserError: `gguf` is not installed, or the file is not GGUF, incomplete or one of several parts.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: GGUF needs the library gguf: pip install 'lemur_jax[gguf]'") from None
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist here: name a local GGUF file")
    try:
        reader = _open(os.fspath(path), os.stat(path).st_mtime_ns, gguf.GGUFReader)
    except Exception as error:  # the library indexes arrays without checks
        with open(path, "rb") as file:
            hint = recovery_hint(file.read(64))
        raise UserError(f"{path} is not a whole GGUF file ({reason_of(error)[:200]}): {hint}") from error
    if (parts := reader.get_field("split.count")) is not None and parts.contents() > 1:
        raise UserError(f"{path} is one of {parts.contents()} parts: join them with llama-gguf-split --merge")
    return reader


@functools.lru_cache(maxsize=1)  # 3 s for a vocabulary of 49,152
def _open(path: str, mtime_ns: int, reader: Any) -> Any:
    del mtime_ns
    return reader(path)


def metadata(path: epath.PathLike, prefix: str) -> dict[str, Any]:
    """The metadata under `prefix`, which is left out of the keys; arrays as lists."""
    fields = open_gguf(path).fields
    return {
        key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)
    }


def tokenizer_files(path: epath.PathLike) -> dict[str, bytes]:
    """The tokenizer as the files of a Hugging Face directory; empty without one.

    Byte-level BPE becomes `tokenizer.json`, a SentencePiece BPE `tokenizer.model` too. Raises UserError for other
    kinds, and for damaged arrays.
    """
    data = metadata(path, "tokenizer.ggml.")
    template = metadata(path, "tokenizer.chat_template").get("")
    try:
        return _files(path, data, template) if "model" in data else {}
    except UserError:
        raise
    except Exception as error:  # of other types and lengths than the format has
        reason = reason_of(error)[:200]
        raise UserError(f"{path}: its tokenizer is damaged ({reason}): bring the file again") from error


def _files(path: epath.PathLike, data: Mapping[str, Any], template: str | None) -> dict[str, bytes]:
    kind, tokens = data["model"], data.get("tokens", [])
    _check(path, data)
    names = {
        f"{short}_token": tokens[data[f"{long}_token_id"]]
        for long, short in _KINDS.items()
        if f"{long}_token_id" in data
    }
    add_bos = data.get("add_bos_token", kind == "llama" or data.get("pre") == "llama-bpe")
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["add_bos_token"] = add_bos
    if kind == "llama" and data.get("add_space_prefix", True):
        files = make_files(_sentencepiece(data), chat_template=template, config=config)
    else:
        spec = _byte_level(data) if kind == "gpt2" else _without_prefix(data)
        bos = (names["bos_token"], data["bos_token_id"]) if add_bos else None
        spec["post_processor"] = post_processor(bos) if bos else None
        files = make_files(None, tokenizer_json=spec, chat_template=template, config=config)
    stops = list(dict.fromkeys(data[key] for key in _STOPS if key in data))
    return {**files, "generation_config.json": json.dumps({"eos_token_id": stops}).encode()}


def _check(path: epath.PathLike, data: Mapping[str, Any]) -> None:
    kind, pre = data.get("model"), data.get("pre")
    for key, accepted, reason in (
        ("model", kind in ("gpt2", "llama"), "only gpt2 (byte-level BPE) and llama (SentencePiece) can be imported"),
        ("pre", kind == "llama" or pre in _PRE_TOKENIZERS, f"only {', '.join(_PRE_TOKENIZERS)} can be imported"),
        ("add_eos_token", not data.get("add_eos_token"), "an end after each text is not supported"),
        ("precompiled_charsmap", not data.get("precompiled_charsmap"), "normalized text is not supported"),
        ("remove_extra_whitespaces", not data.get("remove_extra_whitespaces"), "normalized text is not supported"),
    ):  # fmt: skip
        if not accepted:
            raise UserError(
                f"{path}: tokenizer.ggml.{key} is {data.get(key)!r:.80}; {reason}: import the model's Hugging Face"
                " directory instead"
            )


def _byte_level(data: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of a byte-level BPE, without a post-processor."""
    pre_tokenizer, ignore_merges = _PRE_TOKENIZERS[data["pre"]]
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "normalizer": None},
        "added_tokens": _added_tokens(data["tokens"], data["token_type"]),
        "pre_tokenizer": pre_tokenizer,
        "decoder": _BYTES,
        "model": {
            **BPE,
            "ignore_merges": ignore_merges,
            "vocab": {token: index for index, token in enumerate(data["tokens"])},
            "merges": [merge.split(" ") for merge in data["merges"]],
        },
    }


def _without_prefix(data: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of a SentencePiece BPE that puts no space in front of a text, without a post-processor.

    As in the model's Hugging Face directory, user-defined pieces are added tokens, and merges form runs of spaces.
    """
    tokens = [piece.replace(" ", SPACE) for piece in data["tokens"]]
    kinds = data["token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = {
        token: math.inf if kind == _USER_DEFINED else score
        for token, score, kind in zip(tokens, data["scores"], kinds, strict=True)
        if kind in (_NORMAL, _USER_DEFINED)
    }
    model = {**BPE, "fuse_unk": True, "byte_fallback": True, "unk_token": tokens[data["unknown_token_id"]]}
    return {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": _added_tokens(tokens, kinds),
        **without_prefix(),
        "model": {**model, "vocab": vocab, "merges": merges_by_score(scores, vocab)},
    }


def _added_tokens(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    return [
        added_token(token, index, {"special": kind != _USER_DEFINED})
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _sentencepiece(data: Mapping[str, Any]) -> bytes:
    """The SentencePiece model with these pieces, scores and types."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(data["tokens"], data["scores"], data["token_type"], strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(proto.pieces)
    for long, short in _KINDS.items():
        setattr(trainer, f"{short}_id", data.get(f"{long}_token_id", -1))
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    return proto.SerializeToString()
