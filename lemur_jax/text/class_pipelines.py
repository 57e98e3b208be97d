"""The pipelines that transformers 5 builds in code for some tokenizer classes, in place of that of `tokenizer.json`."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.text import sentencepiece_model

logger = logging.getLogger(__name__)

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
# The tokens that a class names where tokenizer_config.json does not.
NAMES: dict[str, dict[str, Any]] = {
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
# Others whose pipeline is made in code or in Python.
_REFUSED = """Albert Bart Barthez Bert BigBird Blenderbot CLIP CTRL Camembert Cohere Deberta DebertaV2 Esm Funnel
GPTSw3 Herbert M2M100 MBart MBart50 MPNet Marian Nllb OpenAIGPT Pegasus Qwen3_5 Reformer RemBert RoFormer Roberta T5
Whisper XGLM XLM XLMRoberta XLNet"""


def set_pipeline(spec: dict[str, Any], config: Mapping[str, Any], *, from_json: bool, name: str) -> None:
    """Replaces all but the vocabulary in the content of a `tokenizer.json` where the class does.

    Args:
      from_json: there is such a file; else `spec` comes from a SentencePiece model.

    Raises:
      UserError: the class makes a pipeline that is not implemented here.
    """
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind.removesuffix("Tokenizer") in _REFUSED.split():
        raise UserError(
            f"{name}: transformers makes the pipeline of a {kind} in code, which is not implemented here; to take"
            " tokenizer.json as it is, in both, set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
        )
    prefix = config.get("add_prefix_space")
    pipeline = {"LlamaTokenizer": _llama, "CodeLlamaTokenizer": _llama}.get(
        kind, _byte_level if from_json else _same
    )
    before = [spec.get(part) for part in ("normalizer", "pre_tokenizer")]
    pipeline(spec, kind, prefix, bool(config.get("legacy")) and kind == "LlamaTokenizer", from_json)
    after = [spec.get(part) for part in ("normalizer", "pre_tokenizer")]
    if kind in NAMES and _spelled(before) != _spelled(after):
        logger.warning(
            "%s: transformers splits text for %s in its own way, and so does this program, not as tokenizer.json says;"
            " set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json to take that file as it is",
            *(name, kind),
        )


def _spelled(parts: list[Any]) -> str:
    """Without what does not change ids, and without defaults."""
    drop = {"trim_offsets": None, "use_regex": True, "invert": False}

    def read(part: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if drop.get(key, 0) not in (None, value)}

    return json.dumps(json.loads(json.dumps(parts), object_hook=read), sort_keys=True)


def _same(*_: Any) -> None:
    """Leaves everything."""


def _llama(spec: dict[str, Any], kind: str, prefix: bool | None, legacy: bool, from_json: bool) -> None:
    byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    if byte_level or spec["model"].get("type") != "BPE":
        return
    scheme = "never" if prefix is False else "always" if legacy else "first"
    decoders = sentencepiece_model.DECODER["decoders"]
    kept = {key: spec["model"][key] for key in ("type", "vocab", "merges")}
    if not from_json:
        kept["merges"] = sentencepiece_model.merges_by_id(kept["vocab"])
    spec["model"] = {**kept, "fuse_unk": True, "byte_fallback": True}
    spec["normalizer"], spec["pre_tokenizer"] = None, sentencepiece_model.metaspace(scheme)
    strip = prefix is not False or kind == "CodeLlamaTokenizer"
    spec["decoder"] = {"type": "Sequence", "decoders": decoders if strip else decoders[:-1]}


def _byte_level(spec: dict[str, Any], kind: str, prefix: bool | None, legacy: bool, from_json: bool) -> None:
    if kind not in NAMES:
        return
    regex = kind != "Qwen2Tokenizer"
    bytes_ = {"type": "ByteLevel", "add_prefix_space": bool(prefix), "trim_offsets": True, "use_regex": regex}
    kept = {key: spec["model"][key] for key in ("vocab", "merges")}
    spec["model"] = {"type": "BPE", **kept, "fuse_unk": False}
    spec["normalizer"] = None if kind == "GPT2Tokenizer" else {"type": "NFC"}
    split = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = bytes_ if regex else {"type": "Sequence", "pretokenizers": [split, bytes_]}
    spec["decoder"] = {**bytes_, "add_prefix_space": True}
    if kind == "GPTNeoXTokenizer":
        spec["post_processor"] = None
