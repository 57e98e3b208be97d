"""Separators of documents; repository metadata and fill-in-the-middle for code, both off by default.

A document is divided into pieces, control tokens and texts, before it is tokenized: cuts fall between characters, as
a user's cursor does, not between tokens.

Layouts: <reponame>NAME<filename>PATH newline TEXT, as StarCoder (arXiv:2305.06161); PSM and SPM, the character-level
variants of Bavarian et al. (arXiv:2207.14255), SPM in its second form:

    PSM  <fim_prefix>PREFIX<fim_suffix>SUFFIX<fim_middle>MIDDLE
    SPM  <fim_prefix><fim_suffix>SUFFIX<fim_middle>PREFIX MIDDLE
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.text.tokenizer import Tokenizer

REPOSITORY_TOKENS = ("<reponame>", "<filename>")
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
_STARCODER = {"repository": REPOSITORY_TOKENS, "fim": FIM_TOKENS}

Pieces = list[tuple[str, bool]]  # (text or name of a token, whether it is a control token)


def check_content(steps: Mapping[str, Any], content: str, task: str) -> None:
    """Refuses steps that write around text in a task of conversations, around which the chat template writes."""
    invalid = [step for step in ("repository", "fim", "separators") if step in steps]
    if invalid and content != "text":
        raise UserError(
            f"prepare.steps.{task} has the step `{invalid[0]}`, which changes texts, and the task has {content}: leave"
            " the step out"
        )


def check_tokens(steps: Mapping[str, Any], tokenizer: Tokenizer, task: str) -> bool:
    """Whether the steps of a task write control tokens; UserError if the tokenizer lacks one of them."""
    required = [token for tokens in steps.get("separators", {}).values() for token in tokens]
    for step in [step for step in _STARCODER if step in steps]:
        if len(tokens := _tokens(steps, step)) != len(_STARCODER[step]):
            names = " ".join(_STARCODER[step])
            raise UserError(f"prepare.steps.{task}.{step}.tokens must stand for {names}, in this order")
        required += tokens
    known = tokenizer.control_tokens.keys() | tokenizer.added_tokens.keys()  # Qwen's for code are not special
    missing = [token for token in required if token not in known]
    if missing:
        raise UserError(
            f"prepare.steps.{task} writes {' '.join(required)}, and the tokenizer has no {missing[0]}: name its own in"
            " `tokens` of `fim` and `repository`, or add these with tokenizer.extend and tokenizer.add_tokens"
        )
    return bool(required)


def _tokens(steps: Mapping[str, Any], step: str) -> Sequence[str]:
    """The tokens that the step `repository` or `fim` writes."""
    return steps[step].get("tokens") or _STARCODER[step]


def separators(tokenizer: Tokenizer, steps: Mapping[str, Any]) -> Sequence[list[int]]:
    """The ids before and after a document: those of the step, else the tokenizer's own."""
    if "separators" not in steps:
        return tokenizer.separators
    return [[tokenizer.find(token) for token in steps["separators"][key]] for key in ("begin", "end")]


def layout(text: str, meta: Mapping[str, Any], id: str, steps: Mapping[str, Any]) -> Pieces:
    """The pieces of a document; the same for the same text, id and options."""
    header: Pieces = []
    if "repository" in steps:
        for token, key in zip(_tokens(steps, "repository"), ("name", "path"), strict=True):
            if value := meta.get(steps["repository"][key]):
                header += [(token, True), (str(value), False)]
        header += [("\n", False)] * bool(header)
    merged: Pieces = []
    for piece, control in header + _turn(text, id, steps):
        if merged and not control and not merged[-1][1]:  # tokens may span two adjacent texts
            merged[-1] = (merged[-1][0] + piece, False)
        else:
            merged.append((piece, control))
    return merged


def _turn(text: str, id: str, steps: Mapping[str, Any]) -> Pieces:
    if "fim" not in steps:
        return [(text, False)]
    digest = hashlib.sha256(f"{id}\0".encode() + text.encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8], "big"))
    if generator.random() >= steps["fim"]["rate"]:
        return [(text, False)]
    start, stop = sorted(generator.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
    pre, mid, suf = ((token, True) for token in _tokens(steps, "fim"))
    if generator.random() < steps["fim"]["spm"]:
        pieces: Pieces = [pre, suf, (suffix, False), mid, (prefix + middle, False)]
    else:
        pieces = [pre, (prefix, False), suf, (suffix, False), mid, (middle, False)]
    return [piece for piece in pieces if piece[0]]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]]) -> list[int]:
    """Ids of the pieces; only a text at the beginning gets SentencePiece's dummy space."""
    ids: list[int] = []
    for position, (piece, control) in enumerate(pieces):
        if control:
            ids.append(tokenizer.find(piece))
        else:
            ids += tokenizer.encode(piece, prefix=position == 0)
    return ids
