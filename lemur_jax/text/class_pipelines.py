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
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
# Classes with a pipeline of their own, and the tokens that they name where tokenizer_config.json does not.
NAMES: dict[str, dict[str, Any]] = {
    "LlamaTokenizer": _SENTENCEPIECE,
    "CodeLlamaTokenizer": {**_SENTENCEPIECE, "add_bos_token": True},
    "GemmaTokenizer": {**_GEMMA, "mask_token": "<mask>"},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
_BYTE_LEVEL = ("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer")
# Those that take tokenizer.json as it is.
AS_IT_IS = "PreTrainedTokenizer"
_AS_IT_IS = (AS_IT_IS, "TokenizersBackend", "PythonBackend", "BloomTokenizer")

# The class that transformers 5.23 has for a `model_type`, for causal language models.
_CLASSES = {
    AS_IT_IS: """arctic beam bigbird_pegasus chatlm ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite
        got_ocr2 gpt_bigcode granite granitemoe granitemoehybrid granitemoeshared h2ovl_chat hyperclovax internlm2
        internlm3 iquestcoder jamba kimi_k25 kimi_linear llava llava_next mimo_v2_flash minicpm3 minicpmv minimax_m2
        ministral ministral3 mistral mistral3 mistral_large4 mixtral modernbert-decoder molmo molmo2 nemotron nvfp4
        olmo2 olmo3 olmo_hybrid opencua persimmon phi3 phi3_v phimoe pixtral smolvlm stablelm step3_vl vipllava
        voxtral voxtral_realtime xlm-roberta-xl""",
    "GPT2Tokenizer": "codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 jais2 opt phi starcoder2",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "Qwen2Tokenizer": """dots3_note internvl moss_transcribe_diarize ovis2 qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio
        qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe""",
    "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma t5gemma zaya",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "CohereTokenizer": "cohere cohere2",
}
_CLASS_OF_MODEL = {model_type: kind for kind, types in _CLASSES.items() for model_type in types.split()}
# Here it stands above the class that tokenizer_config.json names.
_OVERRULES = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "hyperclovax_vision_v2")


def class_of(config: Mapping[str, Any], model: Mapping[str, Any], *, byte_level: bool) -> str:
    """The class that `AutoTokenizer` takes, without "Fast".

    `config` is `tokenizer_config.json`, `model` the `config.json` beside it ({} without one), `byte_level` whether
    `tokenizer.json` is such.
    """
    declared = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    own = _CLASS_OF_MODEL.get(str(model.get("model_type")))
    if "auto_map" not in config and declared:
        overrules = own == AS_IT_IS or model.get("model_type") in _OVERRULES
        if own is not None and overrules:
            return own
        if declared == "LlamaTokenizer" and byte_level:
            return AS_IT_IS
    return declared or own or AS_IT_IS


def set_pipeline(
    spec: dict[str, Any], kind: str, config: Mapping[str, Any], *, from_json: bool, name: str
) -> None:
    """Replaces all but the vocabulary in the content of a `tokenizer.json` where the class, of `class_of`, does.

    `from_json`: there is such a file; else `spec` comes from a SentencePiece model. Raises UserError for a class whose
    pipeline is not implemented here.
    """
    if config.get("split_special_tokens") or spec["model"].get("dropout"):
        raise UserError(
            f"{name}: split_special_tokens and dropout are not supported: set them to false and null"
        )
    byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    if kind in _AS_IT_IS:
        return
    fits = spec["model"].get("type") == "BPE" and byte_level == (kind in _BYTE_LEVEL)
    if kind not in NAMES or not fits:
        reason = (
            "makes its pipeline in code, which does not fit this vocabulary"
            if kind in NAMES
            else "is not known"
        )
        raise UserError(
            f"{name}: tokenizer_class {kind} {reason}; to take tokenizer.json as it is, here and in transformers, set"
            " tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
        )
    before = [spec.get(part) for part in ("normalizer", "pre_tokenizer")]
    kept = {key: spec["model"][key] for key in ("vocab", "merges")}
    prefix, legacy = config.get("add_prefix_space"), bool(config.get("legacy"))
    if byte_level:
        spec |= _byte_level(kind, prefix) | {"model": {"type": "BPE", **kept, "fuse_unk": False}}
    else:
        if not from_json:
            kept["merges"] = sentencepiece_model.merges_by_id(kept["vocab"])
        gemma = kind == "GemmaTokenizer"
        spec |= sentencepiece_model.without_prefix() if gemma else _llama(kind, prefix, legacy)
        spec["model"] = {"type": "BPE", **kept, "fuse_unk": True, "byte_fallback": True}
    if kind == "GPTNeoXTokenizer":
        spec["post_processor"] = None
    if kind == "CodeLlamaTokenizer":
        # transformers adds tokens for infilling before these, at ids that a model has no rows for.
        tokens = [token for key, token in config.items() if key.endswith("_token") and token is not None]
        tokens += config.get("extra_special_tokens") or []
        named = [str(sentencepiece_model.content_of(token)) for token in tokens]
        if missing := [token for token in named if token not in kept["vocab"]]:
            raise UserError(
                f"{name}: {', '.join(missing)} is not in the vocabulary of this {kind}: remove it"
            )
        bos = sentencepiece_model.content_of(config["bos_token"])
        spec["post_processor"] = sentencepiece_model.post_processor((bos, kept["vocab"].get(bos, 0)))
    after = [spec.get(part) for part in ("normalizer", "pre_tokenizer")]
    if byte_level and _spelled(before) != _spelled(after):
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


def _llama(kind: str, prefix: bool | None, legacy: bool) -> dict[str, Any]:
    scheme = "never" if prefix is False else "always" if legacy and kind == "LlamaTokenizer" else "first"
    strip = prefix is not False or kind == "CodeLlamaTokenizer"
    decoders = sentencepiece_model.DECODER["decoders"]
    return {
        "normalizer": None,
        "pre_tokenizer": sentencepiece_model.metaspace(scheme),
        "decoder": {"type": "Sequence", "decoders": decoders if strip else decoders[:-1]},
    }


def _byte_level(kind: str, prefix: bool | None) -> dict[str, Any]:
    regex = kind != "Qwen2Tokenizer"
    bytes_ = {"type": "ByteLevel", "add_prefix_space": bool(prefix), "trim_offsets": True, "use_regex": regex}
    split = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None if kind == "GPT2Tokenizer" else {"type": "NFC"},
        "pre_tokenizer": bytes_ if regex else {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "decoder": {**bytes_, "add_prefix_space": True},
    }
