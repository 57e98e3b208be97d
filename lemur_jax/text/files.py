"""Makes the files of a tokenizer directory, as transformers reads them."""

import json
from collections.abc import Mapping
from typing import Any

from lemur_jax.text.sentencepiece_model import added_token, content_of, convert, post_processor

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
    tokenizer_json: bytes | None = None,
    added_tokens: Mapping[str, int] | None = None,
    chat_template: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Every file that transformers reads, by name.

    Args:
      model: a SentencePiece BPE, from which `tokenizer.json` is converted; None: `tokenizer_json` is taken.
      added_tokens: control tokens outside the model, to their ids.
      chat_template: Jinja source; None: ChatML if its tokens are among the added ones.
      config: `tokenizer_config.json` of the tokenizer that this one was made from.
    """
    added = dict(added_tokens or {})
    if chat_template is None and set(CHATML_TOKENS[1:3]) <= added.keys():
        chat_template = CHATML_TEMPLATE
    forced: dict[str, Any] = {"chat_template": None}  # it has a file of its own
    if model is not None:
        spec = convert(model)
        defaults: dict[str, Any] = spec.pop("names")
        defaults |= {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        # This class takes tokenizer.json as it is; LlamaTokenizer would replace its pre-tokenizer.
        forced |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": None}
    else:
        spec, defaults = json.loads(tokenizer_json or b""), {}
    present = {token["content"] for token in spec["added_tokens"]}
    flags = {token["content"]: token for token in (config or {}).get("added_tokens_decoder", {}).values()}
    spec["added_tokens"] += [
        added_token(token, index, flags.get(token)) for token, index in added.items() if token not in present
    ]
    if "<pad>" in added:
        defaults["pad_token"] = "<pad>"
    given = {key: value for key, value in (config or {}).items() if value is not None}
    settings = {key: value for key, value in (defaults | given | forced).items() if value is not None}
    if model is not None and not settings["add_bos_token"]:
        spec["post_processor"] = post_processor(None)
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in spec["added_tokens"]
    }
    # Older files spell these tokens as mappings.
    kinds = ("bos_token", "eos_token", "unk_token", "pad_token")
    named = {key: content_of(settings[key]) for key in kinds if key in settings}
    settings |= named
    files = {
        "tokenizer.model": model,
        "tokenizer.json": dump(spec),
        "tokenizer_config.json": dump(settings),
        "special_tokens_map.json": dump(named),
        "chat_template.jinja": None if chat_template is None else chat_template.encode(),
    }
    return {name: content for name, content in files.items() if content is not None}


def dump(value: Any) -> bytes:
    """JSON as these files have it."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
