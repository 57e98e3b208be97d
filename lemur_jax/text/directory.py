"""Reads tokenizer directories as `transformers` does, into files that every later reader takes as they are.

`AutoTokenizer` decides what a directory means: which class it takes, how that class splits text, and which tokens the
files add. The result is one `tokenizer.json`, so a checkpoint, a store and an export keep their ids whatever version of
transformers reads them.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.hub import local_model
from lemur_jax.common.paths import recovery_hint
from lemur_jax.text import gguf_files, sentencepiece_model
from lemur_jax.text.backend import surrounding_ids, vocabulary
from lemur_jax.text.files import MARK, make_files

logger = logging.getLogger(__name__)

# What makes up a tokenizer directory; any other file in it is left alone.
FILE_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"  # kept too: its `eos_token_id` names ids that end an answer
# Keys that `AutoTokenizer` has put into `tokenizer.json`, or that name Python code.
_RESOLVED = {
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("chat_template", "auto_map", "legacy", "sp_model_kwargs", "from_slow", MARK),
}
# A text that pre-tokenizers split differently, except for leading spaces.
_PROBE = "a  12 345\n\n    if x1 == 0.5:\r\n\treturn 'It's'  WE'RE e\u0301 \u212b 漢字 😀"


def read_files(path: epath.PathLike) -> dict[str, bytes]:
    """The tokenizer of a directory, local or gs://, or of a GGUF file, and its `generation_config.json`.

    Returns: contents by name, for `Tokenizer.from_files`: what transformers makes of the directory, written so that
      `tokenizer.json` is taken as it is.
    Raises UserError: no tokenizer, a file that is damaged, files that contradict each other, or what transformers
      cannot read.
    """
    path = local_model(path)
    if gguf_files.is_gguf(path):
        return gguf_files.tokenizer_files(path)
    directory, name = epath.Path(path), str(path)
    names = (*FILE_NAMES, GENERATION_CONFIG, "config.json")
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}
    return _resolve(files, name)


def resolve_files(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Files that `read_files` made, unchanged; those of a directory as `read_files` converts them."""
    config = files.get("tokenizer_config.json")
    is_resolved = config is not None and _read("tokenizer_config.json", config, name).get(MARK)
    return dict(files) if is_resolved else _resolve(files, name)


def read_template(path: epath.PathLike) -> str:
    """The Jinja source in a file that the user names; UserError: there is none."""
    try:
        return epath.Path(path).read_text()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"tokenizer.chat_template {path} cannot be read ({reason_of(error)}): name a Jinja file"
        ) from error


def _check_kind(files: Mapping[str, bytes], name: str) -> None:
    if "tokenizer.json" in files:
        return
    if "tokenizer.model" not in files:
        raise UserError(
            f"no tokenizer.model and no tokenizer.json in {name!r} (tekken.json, vocab.json and others"
            " are not read; `save_pretrained` of transformers writes tokenizer.json): name a tokenizer directory in"
            " tokenizer.path, or let `lemur prepare` train one with tokenizer.train_vocab_size"
        )
    if sentencepiece_model.is_tiktoken(files["tokenizer.model"]):
        raise UserError(
            f"{name}: tokenizer.model is a tiktoken vocabulary, which says neither how to split text nor"
            " which tokens are special: put the tokenizer.json beside it that transformers' `save_pretrained` writes"
        )


def _read(file: str, data: bytes, name: str) -> Any:
    """A file's content; UserError: it is damaged."""
    try:
        if file.endswith(".model"):
            return [] if sentencepiece_model.is_tiktoken(data) else sentencepiece_model.read_pieces(data)
        return data.decode() if file.endswith(".jinja") else json_object(data)
    except ImportError:
        raise
    except Exception as error:  # every library has its own classes
        raise UserError(
            f"{name}: {file} is damaged or not what it is named ({reason_of(error)[:200]}): {recovery_hint(data)}"
        ) from error


def json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object; ValueError: it is something else."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _resolve(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Self-contained files of the tokenizer that transformers makes of these."""
    _check_kind(files, name)
    parsed = {file: _read(file, data, name) for file, data in files.items()}
    loaded, spec = _open(files, parsed, name)
    config = parsed.get("tokenizer_config.json", {})
    if config.get("split_special_tokens") or spec["model"].get("dropout"):
        raise UserError(f"{name}: split_special_tokens and dropout are not supported: unset them")
    listed = _check_ids(spec, parsed, name)
    vocab = vocabulary(spec)
    mentioned = {*vocab, *listed, *_strings([config, parsed.get("special_tokens_map.json", {})])}
    # Some classes add tokens that no file names (CodeLlama: ▁<PRE>): a model may have no rows for them.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in mentioned]
    names = {key: token for key, token in loaded.special_tokens_map.items() if token in mentioned}
    for kind in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if kind in names and names[kind] not in vocab.keys() | listed.keys():
            raise UserError(
                f"{name}: {kind} {names[kind]!r} of tokenizer_config.json is no token of its vocabulary"
            )
    begin, end = surrounding_ids(spec)
    own = {key: value for key, value in config.items() if key not in _RESOLVED and not key.endswith("_token")}
    model = files.get("tokenizer.model")
    output = make_files(
        None if model is None or sentencepiece_model.is_tiktoken(model) else model,
        tokenizer_json=spec,
        chat_template=_template(loaded.chat_template, name),
        config={**own, **names, "add_bos_token": bool(begin), "add_eos_token": bool(end)},
    )
    if GENERATION_CONFIG in files:
        output[GENERATION_CONFIG] = files[GENERATION_CONFIG]
    return output


def _open(files: Mapping[str, bytes], parsed: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of transformers, and its `tokenizer.json`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        for file, data in files.items():
            Path(directory, file).write_bytes(data)
        try:
            loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            spec_json = loaded.backend_tokenizer.to_str()
        except Exception as error:  # a class can fail in any way
            reason = reason_of(error)[:300].replace(directory, name)
            if "auto_map" in parsed.get("tokenizer_config.json", {}):
                reason = "its class is Python code of its own, which is not run"
            hint = "; to take tokenizer.json as it is, remove auto_map from tokenizer_config.json and set"
            hint += " tokenizer_class to PreTrainedTokenizerFast there"
            raise UserError(
                f"{name}: transformers cannot read this tokenizer ({reason}){hint if 'tokenizer.json' in files else ''}"
            ) from error
    if "tokenizer.json" in files and type(loaded) is not PreTrainedTokenizerFast:
        _warn_of_other_ids(files["tokenizer.json"], loaded, name)
    return loaded, json.loads(spec_json)


def _warn_of_other_ids(data: bytes, loaded: Any, name: str) -> None:
    import tokenizers

    try:
        ids = tokenizers.Tokenizer.from_str(data.decode()).encode(_PROBE, add_special_tokens=False).ids
    except Exception:  # transformers has made something of a file that this library cannot read
        return
    if ids != loaded.backend_tokenizer.encode(_PROBE, add_special_tokens=False).ids:
        logger.warning(
            "%s: transformers splits text for %s in its own way, and so does this program, not as tokenizer.json says;"
            " set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json to take that file as it is",
            *(name, type(loaded).__name__),
        )


def _check_ids(spec: Mapping[str, Any], parsed: Mapping[str, Any], name: str) -> dict[str, int]:
    """The added tokens that the files list, to their ids; UserError: files contradict each other or transformers."""
    ids = vocabulary(spec) | {token["content"]: token["id"] for token in spec["added_tokens"]}
    for index, piece in enumerate(parsed.get("tokenizer.model", ())):
        if ids.get(piece, index) != index:
            other = "tokenizer.json" if "tokenizer.json" in parsed else "transformers"
            raise UserError(
                f"{name}: tokenizer.model gives {piece!r} the id {index}, {other} {ids[piece]}: remove the file that"
                " does not belong to the model"
            )
    decoder = parsed.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
    configured = {sentencepiece_model.content_of(token): int(index) for index, token in decoder.items()}
    configured |= parsed.get("added_tokens.json", {})
    for token, index in configured.items():
        if ids.get(token, -1) != index:
            raise UserError(
                f"{name}: its files give {token!r} the id {index}, transformers reads it as {ids.get(token)}: correct"
                " the files"
            )
    added = {
        token["content"]: token["id"] for token in parsed.get("tokenizer.json", {}).get("added_tokens") or ()
    }
    for token, index in added.items():
        if ids.get(token) != index:
            logger.warning(
                "%s: tokenizer.json gives %r the id %d; transformers, and so this program, reads it as %s",
                *(name, token, index, ids.get(token)),
            )
    return added | configured


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_strings(item))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _template(template: Any, name: str) -> str | None:
    """The Jinja template, or the default one of several with names."""
    if not isinstance(template, Mapping):
        return template
    if "default" not in template:
        raise UserError(
            f"{name} has the chat templates {', '.join(template)} but none named default: put one into a"
            " file and name it with config.tokenizer.chat_template"
        )
    return template["default"]
