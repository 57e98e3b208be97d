"""The files of a tokenizer directory, and the library's tokenizer as `transformers` sets it up from them."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.hub import local_model
from lemur_jax.common.paths import recovery_hint
from lemur_jax.text import class_pipelines, gguf_files, sentencepiece_model

# What makes up a tokenizer directory; any other file in it is left alone.
FILE_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in this order transformers adds missing ones
GENERATION_CONFIG = "generation_config.json"  # kept too: its `eos_token_id` names ids that end an answer
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer directory."""

    files: Mapping[str, bytes]  # contents by name
    name: str  # of the directory in errors

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`tokenizer_config.json`; `special_tokens_map.json` stands above it where it lists no added tokens."""
        found: dict[str, Any] = {}
        if "tokenizer_config.json" in self.files:
            found = dict(self.parse("tokenizer_config.json", json_object))
        older, newer = "additional_special_tokens", "extra_special_tokens"
        if older in found and not found.get(newer):
            found[newer] = found[older]
        if "special_tokens_map.json" in self.files:
            above = self.parse("special_tokens_map.json", json_object)
            found |= above if found.get("added_tokens_decoder") is None else {}
        if isinstance(found.get(newer), Mapping):
            found |= {f"{name}_token": token for name, token in found.pop(newer).items()}
        if older in found and "tokenizer.json" in self.files:
            found.setdefault(newer, found[older])
        kind = class_pipelines.class_of(found, {}, byte_level=self.byte_level)
        return {**class_pipelines.NAMES.get(kind, {}), **found}

    @property
    def byte_level(self) -> bool:
        """Whether `tokenizer.json` has a byte-level part."""
        return b'"ByteLevel"' in self.files.get("tokenizer.json", b"")

    @property
    def kind(self) -> str:
        """The tokenizer class, without "Fast"."""
        return class_pipelines.class_of(self.config, {}, byte_level=self.byte_level)

    @property
    def rebuilt(self) -> bool:
        """Whether the tokenizer class takes the vocabulary alone and makes the rest in code."""
        return self.kind in class_pipelines.NAMES

    @functools.cached_property
    def sentencepiece(self) -> bytes | None:
        """`tokenizer.model`, if it is a SentencePiece model."""
        model = self.files.get("tokenizer.model")
        return None if model is None or sentencepiece_model.is_tiktoken(model) else model

    def parse(self, file: str, read: Callable[[bytes], T]) -> T:
        """`read` of a file's content; what it raises becomes a UserError that names the file."""
        try:
            return read(self.files[file])
        except (ImportError, UserError):
            raise
        except Exception as error:  # every library has its own classes
            raise UserError(
                f"{self.name}: {file} is damaged or not what it is named ({reason_of(error)[:200]}):"
                f" {recovery_hint(self.files[file])}"
            ) from error

    def read_spec(self) -> dict[str, Any]:
        """The content of `tokenizer.json`, or its equal made from `tokenizer.model`.

        Raises UserError: neither is there, or they contradict each other.
        """
        model = self.sentencepiece
        if "tokenizer.json" in self.files:
            spec = self.parse("tokenizer.json", _read_json)
            if model is not None:
                self._check_pieces(self.parse("tokenizer.model", sentencepiece_model.read_pieces), spec)
            return spec
        if model is not None:
            scheme = "always" if self.config.get("legacy", True) else "first"
            spec = self.parse("tokenizer.model", lambda data: sentencepiece_model.convert(data, scheme))
            # transformers puts no space before a text that begins with one.
            if scheme == "first":
                spec["pre_tokenizer"]["pretokenizers"][:2] = [sentencepiece_model.metaspace("first")]
            return spec
        if "tokenizer.model" in self.files:
            raise UserError(
                f"{self.name}: tokenizer.model is a tiktoken vocabulary, which says neither how to split text nor"
                " which tokens are special: put the tokenizer.json beside it that transformers' `save_pretrained`"
                " writes"
            )
        raise UserError(
            f"no tokenizer.model and no tokenizer.json in {self.name!r} (tekken.json, vocab.json and others"
            " are not read; `save_pretrained` of transformers writes tokenizer.json): name a tokenizer directory in"
            " tokenizer.path, or let `lemur prepare` train one with tokenizer.train_vocab_size"
        )

    def _check_pieces(self, pieces: Sequence[str], spec: Mapping[str, Any]) -> None:
        vocab = {token["content"]: token["id"] for token in spec["added_tokens"]} | vocabulary(spec)
        odd = next((index for index, piece in enumerate(pieces) if vocab.get(piece, index) != index), None)
        if odd is not None:
            raise UserError(
                f"{self.name}: tokenizer.model gives {pieces[odd]!r} the id {odd}, tokenizer.json"
                f" {vocab[pieces[odd]]}: remove the file that does not belong to the model"
            )

    def digest(self, spec: Mapping[str, Any]) -> str:
        """sha256 (hex) of the vocabulary, whatever tokens are added to it."""
        what = [spec["model"], spec.get("normalizer"), spec.get("pre_tokenizer")]
        return hashlib.sha256(self.sentencepiece or json.dumps(what, sort_keys=True).encode()).hexdigest()

    def added_tokens(self, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every added token with its flags, and its id where a file has it, in the order of transformers.

        Tokens of tokenizer_config.json, or else of added_tokens.json, follow those of tokenizer.json or replace their
        flags; tokens that the config names are special.
        """
        decoder = self.config.get("added_tokens_decoder") is not None
        from_json = "tokenizer.json" in self.files and not (self.rebuilt and decoder)
        added = {token["content"]: dict(token) for token in spec["added_tokens"] if from_json}
        named = named_tokens({**spec.get("names", {}), **self.config})
        if "tokenizer.json" not in self.files and "extra_special_tokens" not in self.config:
            pieces = self.parse("tokenizer.model", sentencepiece_model.read_added)
            named |= {name: flags for name, flags in pieces.items() if self.rebuilt or flags["special"]}
        listed = self.parse("tokenizer_config.json", _read_decoder) if decoder else []
        for content, index in self.outside_ids().items():
            if not decoder and content not in added:
                flags = {} if content in named else {"special": False, "normalized": True}
                listed.append(sentencepiece_model.added_token(content, index, flags))
        if "tokenizer.json" not in self.files and not self.rebuilt:
            # transformers looks for tokens in the text as it is here, but for those that the config gives such flags.
            listed = [{**token, "normalized": False} for token in listed]
            odd = [name for name, flags in named.items() if flags["normalized"]]
            if odd and not decoder:
                raise UserError(
                    f"{self.name}: {', '.join(odd)} is `normalized`, which is not supported for a tokenizer.model of"
                    " this class: set it to false in tokenizer_config.json"
                )
        for token in sorted(listed, key=lambda token: token["id"]):
            added[token["content"]] = {**token, "id": added.get(token["content"], token)["id"]}
        known = set(added)
        for content, flags in named.items():
            own = {"special": True} if content in known else flags
            added[content] = {"content": content, **added.get(content, {}), **own}
        return list(added.values())

    def outside_ids(self) -> dict[str, int]:
        """Tokens to their ids in the files beside `tokenizer.json`."""
        found: dict[str, int] = {}
        if "added_tokens.json" in self.files:
            found |= self.parse("added_tokens.json", _read_added)
        if self.config.get("added_tokens_decoder") is not None:
            decoder = self.parse("tokenizer_config.json", _read_decoder)
            found |= {token["content"]: token["id"] for token in decoder}
        return found

    def named_token(self, kind: str) -> Any:
        """`bos_token` and the like; None: the config names none."""
        return sentencepiece_model.content_of(self.config.get(f"{kind}_token"))

    def generation_stop_ids(self) -> tuple[int, ...]:
        """The ids of `eos_token_id` in `generation_config.json`; () without one."""
        return self.parse(GENERATION_CONFIG, _generation_stop_ids) if GENERATION_CONFIG in self.files else ()

    def surrounding_ids(self, spec: Mapping[str, Any], bos: int | None, eos: int) -> list[list[int]]:
        """The ids that transformers' `add_special_tokens=True` puts before and after a text.

        With a `tokenizer.json` its post-processor decides, else `add_bos_token` and `add_eos_token` of the config.
        """
        if "tokenizer.json" in self.files:
            return self.parse("tokenizer.json", lambda _: _run_post_processor(spec.get("post_processor")))
        return [
            [bos] if self.config.get("add_bos_token") and bos is not None else [],
            [eos] if self.config.get("add_eos_token") else [],
        ]

    def chat_template(self) -> str | None:
        """The Jinja template, or the default one of several with names."""
        if "chat_template.jinja" in self.files:
            return self.parse("chat_template.jinja", bytes.decode)
        template = self.config.get("chat_template")
        if not isinstance(template, list):
            return template
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise UserError(
                f"{self.name} has the chat templates {', '.join(named)} but none named default: put one into a"
                " file and name it with config.tokenizer.chat_template"
            )
        return named["default"]


def read_files(path: epath.PathLike) -> dict[str, bytes]:
    """The tokenizer files that exist in a directory, and its `generation_config.json`; or those of a GGUF file."""
    path = local_model(path)
    if gguf_files.is_gguf(path):
        return gguf_files.tokenizer_files(path)
    directory = epath.Path(path)
    names = (*FILE_NAMES, GENERATION_CONFIG)
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}
    return _with_class(files, directory / "config.json", str(path)) if files else files


def read_template(path: epath.PathLike) -> str:
    """The Jinja source in a file that the user names; UserError: there is none."""
    try:
        return epath.Path(path).read_text()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"tokenizer.chat_template {path} cannot be read ({reason_of(error)}): name a Jinja file"
        ) from error


def _with_class(files: dict[str, bytes], model_config: epath.Path, name: str) -> dict[str, bytes]:
    """The files with the tokenizer class that transformers takes beside this `config.json` of a model."""
    try:
        config = json_object(files.get("tokenizer_config.json", b"{}"))
        model = json_object(model_config.read_bytes())
    except (OSError, ValueError):  # damaged ones are named where they are read
        return files
    declared = config.get("tokenizer_class")
    if declared is None and model.get("tokenizer_class"):
        raise UserError(
            f"{name}: config.json names the tokenizer_class {model['tokenizer_class']}, which transformers does not"
            " always heed: name it in tokenizer_config.json"
        )
    kind = class_pipelines.class_of(config, model, byte_level=TokenizerFiles(files, name).byte_level)
    if kind == class_pipelines.class_of(config, {}, byte_level=False):
        return files
    config["tokenizer_class"] = f"{kind}Fast"
    return {**files, "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode()}


def json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object; ValueError: it is something else."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _read_json(data: bytes) -> dict[str, Any]:
    """A `tokenizer.json` with a vocabulary and a list of added tokens."""
    spec = json_object(data)
    vocabulary(spec)
    return {**spec, "added_tokens": spec.get("added_tokens") or []}


def _read_decoder(data: bytes) -> list[dict[str, Any]]:
    """`added_tokens_decoder` of a `tokenizer_config.json`, as `tokenizer.json` spells added tokens."""
    decoder = json_object(data)["added_tokens_decoder"]
    return [
        sentencepiece_model.added_token(token["content"], int(index), {"special": False, **token})
        for index, token in decoder.items()
    ]


def _read_added(data: bytes) -> dict[str, int]:
    return {token: int(index) for token, index in json_object(data).items()}


def _generation_stop_ids(data: bytes) -> tuple[int, ...]:
    found = json_object(data).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise ValueError(f"eos_token_id is {found!r}, not an id or a list of ids")
    return tuple(ids)


def named_tokens(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tokens that `tokenizer_config.json` names (bos_token and the like, and its list) to the flags it gives."""
    keys = [*(f"{kind}_token" for kind in _KINDS), *(key for key in config if key.endswith("_token"))]
    tokens = [config.get(key) for key in keys]
    named: dict[str, dict[str, Any]] = {}
    for token in [*tokens, *(config.get("extra_special_tokens") or [])]:
        content = sentencepiece_model.content_of(token)
        if isinstance(content, str):
            flags = token.items() if isinstance(token, Mapping) else ()
            given = {key: flag for key, flag in flags if key in sentencepiece_model.FLAGS}
            named[content] = {**sentencepiece_model.FLAGS, **given, "special": True}
    return named


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
    kept = {name: spec.get(name) for name in ("version", "normalizer", "pre_tokenizer", "decoder")}
    model = dict(spec["model"])
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {marks.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[marks.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = marks.get(model["unk_token"], model["unk_token"])
    backend = tokenizers.Tokenizer.from_str(json.dumps({**kept, **bare, "model": model}))
    tokens = []
    for token in added:
        flags = {name: token[name] for name in sentencepiece_model.FLAGS if name in token}
        tokens.append(tokenizers.AddedToken(marks.get(token["content"], token["content"]), **flags))
    backend.add_tokens(tokens)  # at once: one by one takes minutes for Gemma's 6,415
    return backend


def _run_post_processor(post_processor: Any) -> list[list[int]]:
    import tokenizers

    text = 2**32 - 1
    model = {"type": "WordLevel", "vocab": {"x": text}, "unk_token": "x"}
    spec = {"version": "1.0", "added_tokens": [], "model": model, "post_processor": post_processor}
    ids = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode("x").ids
    return [ids[: ids.index(text)], ids[ids.index(text) + 1 :]]


def token_pattern(added: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """Matches added tokens as the library does: the longest first."""
    alternatives = []
    for token in sorted(added, key=lambda token: -len(token["content"])):
        pattern = re.escape(token["content"])
        alternatives.append(rf"(?<!\w){pattern}(?!\w)" if token.get("single_word") else pattern)
    return re.compile("|".join(alternatives) or "(?!)")


def build_decoders(spec: Any) -> dict[bool, Callable[[list[str]], str]]:
    """Tokens to text, by whether they begin a text, whose first space encoding has put there."""
    import tokenizers

    if spec is None:
        return dict.fromkeys((True, False), " ".join)
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    made = {
        prefix: tokenizers.Tokenizer.from_str(json.dumps({**empty, "decoder": kept})).decoder
        for prefix, kept in {True: spec, False: _without_strip(spec)}.items()
    }
    return {prefix: decoder.decode if decoder else " ".join for prefix, decoder in made.items()}


def _without_strip(spec: Any) -> Any:
    """A decoder that leaves the first space of a text."""
    if spec["type"] == "Sequence":
        parts = [_without_strip(part) for part in spec["decoders"] if part["type"] != "Strip"]
        return {**spec, "decoders": parts}
    if spec["type"] == "Metaspace":
        return {**spec, "prepend_scheme": "never", "add_prefix_space": False}
    return spec


def build_sentencepiece(model: bytes | None, spec: Mapping[str, Any]) -> Any:
    """The SentencePiece model, where `tokenizer.json` is its exact conversion: it takes two thirds of the time."""
    if model is None:
        return None
    from sentencepiece import SentencePieceProcessor

    pipeline = [sentencepiece_model.metaspace("first", " "), sentencepiece_model.metaspace("never")]
    if spec["pre_tokenizer"] != {"type": "Sequence", "pretokenizers": pipeline}:
        return None
    return SentencePieceProcessor(model_proto=model)
