"""Makes the files of a tokenizer directory, as transformers reads them."""

import json
from collections.abc import Mapping
from typing import Any

from lemur_jax.text.sentencepiece_model import added_token, convert, post_processor

# The class of transformers that takes `tokenizer.json` as it is; others would replace its pre-tokenizer.
FAST_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# The key of `tokenizer_config.json` that says that `make_files` wrote it: `tokenizer.json` is complete.
MARK = "lemur_jax_format"
# In Lemur's order.
CHATML_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|diff_marker|>")

CHATML_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|im_end|>\n' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def make_files(
    model: bytes | None,
    *,
    tokenizer_json: Mapping[str, Any] | None = None,
    added_tokens: Mapping[str, int] | None = None,
    chat_template: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Every file that transformers reads, by name.

    Args:
      model: a SentencePiece BPE.
      tokenizer_json: the content of that file, taken as it is; None: converted from `model`.
      added_tokens: control tokens outside the model, to their ids.
      chat_template: Jinja source; None: ChatML if its tokens are among the added ones.
      config: `tokenizer_config.json` of the tokenizer that this one was made from.
    """
    added = dict(added_tokens or {})
    if chat_template is None and set(CHATML_TOKENS[1:3]) <= added.keys():
        chat_template = CHATML_TEMPLATE
    settings: dict[str, Any] = {}
    if tokenizer_json is not None:
        spec = dict(tokenizer_json)
    else:
        spec = convert(model or b"")
        settings |= spec.pop("names")
        settings |= {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    present = {token["content"] for token in spec["added_tokens"]}
    new = [added_token(token, index) for token, index in added.items() if token not in present]
    spec["added_tokens"] = [*spec["added_tokens"], *new]
    if "<pad>" in added:
        settings["pad_token"] = "<pad>"
    settings |= {key: value for key, value in (config or {}).items() if value is not None}
    if tokenizer_json is None and not settings["add_bos_token"]:
        spec["post_processor"] = post_processor(None)
    settings |= {"tokenizer_class": FAST_TOKENIZER_CLASS, MARK: 1}
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in spec["added_tokens"]
    }
    kinds = ("bos_token", "eos_token", "unk_token", "pad_token")
    special_tokens = {key: settings[key] for key in kinds if key in settings}
    files = {
        "tokenizer.model": model,
        # Without indents: Python's encoder for these takes seconds for a large vocabulary.
        "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
        "tokenizer_config.json": dump(settings),
        "special_tokens_map.json": dump(special_tokens),
        "chat_template.jinja": None if chat_template is None else chat_template.encode(),
    }
    return {name: content for name, content in files.items() if content is not None}


def dump(value: Any) -> bytes:
    """JSON as these files have it."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
