"""SentencePiece BPE models (`tokenizer.model`) as the `tokenizer.json` of the tokenizers library, with the same ids.

The conversion is exact: each way of joining two pieces into a third becomes a merge, ranked by the score of the
third. SentencePiece joins the best-scored neighbours first, and so does the BPE of the tokenizers library. Among equal
scores SentencePiece joins the leftmost, so a piece grows before another is begun beside it: there the merge with the
longest left side comes first. (Llama-2 and Mistral score all runs of spaces alike.)
"""

import re
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.errors import UserError

SPACE = "\u2581"  # SentencePiece's visible space
# A line of a tiktoken vocabulary, which Llama 3's first release and Kimi name tokenizer.model.
_TIKTOKEN = re.compile(rb"\A[A-Za-z0-9+/]+={0,2} \d+\r?\n")


# The model in `tokenizer.json`, but for its vocabulary.
BPE: dict[str, Any] = {
    **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
    **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
}


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is a tiktoken vocabulary rather than a SentencePiece model."""
    return _TIKTOKEN.match(data) is not None


def read_pieces(model: bytes) -> list[str]:
    """The pieces of a SentencePiece model by id; ValueError or DecodeError: the data is no such model."""
    from sentencepiece import sentencepiece_model_pb2

    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    if not pieces:
        raise ValueError("no pieces")
    return [piece.piece for piece in pieces]


def _check_convertible(proto: Any, unused: int) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type != trainer.BPE
        or not trainer.byte_fallback
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.add_dummy_prefix
        or any(piece.type == unused for piece in proto.pieces)
    ):
        raise UserError(
            "tokenizer.model is not a SentencePiece BPE in Llama's manner (byte fallback, identity"
            " normalization, dummy prefix): tokenizer.json cannot be made from it"
        )


def convert(model: bytes) -> dict[str, Any]:
    """`tokenizer.json` with the ids of a SentencePiece BPE model, and under `names` its special tokens by their use.

    Raises UserError for a model that cannot be converted exactly.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds, trainer = sentencepiece_model_pb2.ModelProto.SentencePiece, proto.trainer_spec
    _check_convertible(proto, kinds.UNUSED)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    user_defined = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    names = {
        f"{kind}_token": proto.pieces[index].piece
        for kind in ("bos", "eos", "unk", "pad")
        if (index := getattr(trainer, f"{kind}_id")) >= 0
    }
    bos = names.get("bos_token")
    return {
        "names": names,
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(token, vocab[token]) for token in control],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": _pre_tokenizer(user_defined),
        "post_processor": post_processor(None if bos is None else (bos, vocab[bos])),
        "decoder": DECODER,
        "model": {
            **BPE,
            "unk_token": names["unk_token"],
            "fuse_unk": True,
            "byte_fallback": True,
            # User-defined pieces are words of their own that no merge makes.
            "ignore_merges": bool(user_defined),
            "vocab": vocab,
            "merges": merges_by_score(scores, vocab),
        },
    }


def merges_by_score(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[list[str]]:
    """Merges ranked by the score of what they make; among equal scores the longest left side comes first."""
    splits = ((piece, piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece)))
    ranked = [
        (-scores[merged], -len(a), vocab[a], a, b) for merged, a, b in splits if {a, b} <= scores.keys()
    ]
    return [[a, b] for *_, a, b in sorted(ranked)]


DECODER: dict[str, Any] = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def without_prefix() -> dict[str, Any]:
    """The parts of `tokenizer.json` around a model whose texts get no space in front, as Gemma's."""
    space = {"String": " "}
    split = {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False}
    return {
        "normalizer": {"type": "Replace", "pattern": space, "content": SPACE},
        "pre_tokenizer": split,
        "decoder": {"type": "Sequence", "decoders": DECODER["decoders"][:-1]},
    }


def metaspace(prepend_scheme: str, replacement: str = SPACE) -> dict[str, Any]:
    """The pre-tokenizer of the tokenizers library that makes spaces visible and puts one in front."""
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": prepend_scheme, "split": False}


def _pre_tokenizer(user_defined: list[str]) -> dict[str, Any]:
    # One Metaspace would put no space before a text that begins with a space, where SentencePiece does. The first one
    # here looks for " ", which the normalizer has replaced, so it always puts one in front; the second one gives it
    # its final form.
    parts = [metaspace("first", " "), metaspace("never")]
    if user_defined:  # SentencePiece never merges them with their neighbours
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = {"Regex": "|".join(map(re.escape, longest_first))}
        parts.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": parts}


def post_processor(bos: tuple[str, int] | None) -> dict[str, Any]:
    """Puts bos in front of each sequence."""
    sequences = [{"Sequence": {"id": kind, "type_id": index}} for index, kind in enumerate("AB")]
    prefix = [{"SpecialToken": {"id": bos[0], "type_id": index}} for index in (0, 1)] if bos else []
    return {
        "type": "TemplateProcessing",
        "single": [*prefix[:1], sequences[0]],
        "pair": [*prefix[:1], sequences[0], *prefix[1:], sequences[1]],
        "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}} if bos else {},
    }


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def added_token(content: str, index: int, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An added token as `tokenizer.json` has it; `flags`: those that an earlier file gave it."""
    overrides = {name: value for name, value in (flags or {}).items() if name in FLAGS}
    return {"id": index, "content": content, **FLAGS, **overrides}


def content_of(token: Any) -> Any:
    """The text of a token that a config spells as a string or a mapping."""
    return token.get("content") if isinstance(token, Mapping) else token
