"""The tokenizer of the `tokenizers` library for a `tokenizer.json`, and helpers around it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lemur_jax.text import sentencepiece_model


def vocabulary(spec: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of the model in `tokenizer.json` to their ids."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, Mapping):
        return dict(vocab)
    return {token: index for index, (token, _) in enumerate(vocab)}  # Unigram's, with scores


def build_backend(spec: Mapping[str, Any], added: Sequence[Mapping[str, Any]], marks: Mapping[str, str]):
    """The `tokenizers.Tokenizer` of a `tokenizer.json`, with the names `marks` for special tokens."""
    import tokenizers

    # Without its post-processor the library neither adds bos nor trims the offsets.
    bare: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    pipeline = {name: spec.get(name) for name in ("version", "normalizer", "pre_tokenizer", "decoder")}
    model = dict(spec["model"])
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {marks.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[marks.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = marks.get(model["unk_token"], model["unk_token"])
    backend = tokenizers.Tokenizer.from_str(json.dumps({**pipeline, **bare, "model": model}))
    tokens = []
    for token in added:
        flags = {name: token[name] for name in sentencepiece_model.FLAGS if name in token}
        tokens.append(tokenizers.AddedToken(marks.get(token["content"], token["content"]), **flags))
    backend.add_tokens(tokens)  # at once: one by one takes minutes for Gemma's 6,415
    return backend


def surrounding_ids(spec: Mapping[str, Any]) -> list[list[int]]:
    """The ids that the post-processor of a `tokenizer.json` puts before and after a text."""
    import tokenizers

    text_id = 2**32 - 1
    model = {"type": "WordLevel", "vocab": {"x": text_id}, "unk_token": "x"}
    bare: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    bare["post_processor"] = spec.get("post_processor")
    ids = tokenizers.Tokenizer.from_str(json.dumps(bare)).encode("x").ids
    return [ids[: ids.index(text_id)], ids[ids.index(text_id) + 1 :]]


def token_pattern(added: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """Matches added tokens as the library does: the longest first."""
    alternatives = []
    for token in sorted(added, key=lambda token: -len(token["content"])):
        pattern = re.escape(token["content"])
        alternatives.append(rf"(?<!\w){pattern}(?!\w)" if token.get("single_word") else pattern)
    return re.compile("|".join(alternatives) or "(?!)")


def build_decoders(spec: Any) -> dict[bool, Callable[[list[str]], str]]:
    """Decoders: True for the start of a text (strips the space that encoding adds), False for the rest."""
    import tokenizers

    if spec is None:
        return dict.fromkeys((True, False), " ".join)
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    decoders = {
        prefix: tokenizers.Tokenizer.from_str(json.dumps({**empty, "decoder": decoder_spec})).decoder
        for prefix, decoder_spec in {True: spec, False: _without_strip(spec)}.items()
    }
    return {prefix: decoder.decode if decoder else " ".join for prefix, decoder in decoders.items()}


def _without_strip(spec: Any) -> Any:
    """A decoder that leaves the first space of a text."""
    if spec["type"] == "Sequence":
        parts = [_without_strip(part) for part in spec["decoders"] if part["type"] != "Strip"]
        return {**spec, "decoders": parts}
    if spec["type"] == "Metaspace":
        return {**spec, "prepend_scheme": "never", "add_prefix_space": False}
    return spec


def build_sentencepiece(model: bytes | None, spec: Mapping[str, Any]) -> Any:
    """The SentencePiece model if `tokenizer.json` is its exact conversion, else None: it takes 2/3 of the time."""
    if model is None:
        return None
    from sentencepiece import SentencePieceProcessor

    pipeline = [sentencepiece_model.metaspace("first", " "), sentencepiece_model.metaspace("never")]
    if spec["pre_tokenizer"] != {"type": "Sequence", "pretokenizers": pipeline}:
        return None
    return SentencePieceProcessor(model_proto=model)
