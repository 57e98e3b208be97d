"""Tokenizers read from a Hugging Face directory: text to ids and back.

Plain text never gives a control token here, whatever it spells: control tokens are put in by id. Where
the directory holds `tokenizer.model`, SentencePiece encodes; else `tokenizer.json` does, through the
`tokenizers` library. Writing such directories is `tokenizer_files`' business.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import how_to_mend

# What makes up a tokenizer directory; any other file in it is left alone.
FILE_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Not the tokenizer's own, but its `eos_token_id` names ids of this vocabulary that end an answer, so it goes where the
# tokenizer goes.
GENERATION_CONFIG = "generation_config.json"

Span = tuple[int, int]
T = TypeVar("T")


class _Model(Protocol):
    """A vocabulary that encodes plain text."""

    size: int
    digest: str
    control_tokens: dict[str, int]  # inside the vocabulary, e.g. <s>
    special_ids: dict[str, int]  # of "bos", "eos", "unk", "pad", where the model file knows them

    def encode(self, text: str, prefix: bool) -> list[int]: ...

    def encode_with_spans(self, text: str, prefix: bool) -> tuple[list[int], list[Span]]: ...

    def decode(self, ids: list[int], prefix: bool) -> str: ...

    def token(self, index: int) -> str: ...


class Tokenizer:
    """Encodes and decodes; opened by `load` or `from_files`. Pickles as its files.

    Attributes:
      vocab_size: highest id + 1, added tokens included.
      model_size: ids of the model file itself.
      bos_id, eos_id: ids that begin and end a document.
      unk_id, pad_id: ids, or None.
      added_tokens: control tokens that are not in the model file, to their ids.
      control_tokens: these and the model's own (`<s>`, ...).
      generation_stop_ids: the ids of `eos_token_id` in `generation_config.json`; () without one.
      digest: sha256 (hex) of the model file, whatever tokens are added to it.
      chat_template: Jinja source, or None.
    """

    def __init__(self, files: Mapping[str, bytes], name: str):
        self._files = dict(files)
        self._name = name
        if "tokenizer.model" in files:
            self._model: _Model = _opened(_SentencePieceModel, files, "tokenizer.model", name)
        elif "tokenizer.json" in files:
            self._model = _opened(_JsonModel, files, "tokenizer.json", name)
        else:
            raise UserError(
                f"no tokenizer.model and no tokenizer.json in {name}: name a tokenizer directory in"
                " tokenizer.path, or let `lemur prepare` train one with tokenizer.train_vocab_size"
            )
        self.digest = self._model.digest
        self.added_tokens = _added_tokens(files, self._model, name)
        self.control_tokens = {**self._model.control_tokens, **self.added_tokens}
        self._control_names = {index: token for token, index in self.control_tokens.items()}
        self.model_size = self._model.size
        self.vocab_size = max([self.model_size, *(index + 1 for index in self.control_tokens.values())])
        self.bos_id = self._required_id("bos")
        self.eos_id = self._required_id("eos")
        self.unk_id = self._special_id("unk")
        self.pad_id = self._special_id("pad")
        self.generation_stop_ids: tuple[int, ...] = (
            _opened(_generation_stop_ids, files, GENERATION_CONFIG, name)
            if GENERATION_CONFIG in files
            else ()
        )
        self.chat_template: str | None = (
            _opened(bytes.decode, files, "chat_template.jinja", name)
            if "chat_template.jinja" in files
            else self.config.get("chat_template")
        )

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Opens a directory.

        Raises:
          UserError: there is no tokenizer in it, or its files are damaged or contradict each other.
        """
        return cls(read_files(path), str(path))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """The inverse of `files`."""
        return cls(files, "the tokenizer files")

    def files(self) -> dict[str, bytes]:
        """All files of the directory by name: what a checkpoint keeps."""
        return dict(self._files)

    def __reduce__(self):
        return (Tokenizer, (self._files, self._name))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`tokenizer_config.json` over `special_tokens_map.json`."""
        found: dict[str, Any] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if file in self._files:
                found |= _opened(_json_object, self._files, file, self._name)
        return found

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Ids of plain text, without bos and eos, never a control token.

        Args:
          prefix: whether the model's dummy space goes in front; False for text that follows a
            control token.
        """
        return self._model.encode(text, prefix)

    def encode_with_spans(self, text: str, *, prefix: bool = True) -> tuple[list[int], list[Span]]:
        """`encode`, and for each token the characters [begin, end) that it spells.

        A token for some bytes of a character has that character, and the dummy space the first one.
        """
        return self._model.encode_with_spans(text, prefix)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; control tokens are shown by name, or left out if `skip_special`.

        An id that no token has (rows that pad the vocabulary) is shown as U+FFFD.
        """
        text: list[str] = []
        run: list[int] = []
        prefix = True

        def flush() -> None:
            if run:
                text.append(self._model.decode(run, prefix))
                run.clear()

        for index in map(int, ids):
            name = self._control_names.get(index)
            if name is None and 0 <= index < self._model.size:
                run.append(index)
                continue
            flush()
            if not skip_special:
                text.append("\ufffd" if name is None else name)
            # The dummy space is put in front of a document's first text alone.
            prefix = index == self.bos_id
        flush()
        return "".join(text)

    def token(self, index: int) -> str:
        """The piece with this id as the vocabulary spells it, e.g. "▁the" or "<|im_end|>"; U+FFFD as in `decode`."""
        if index in self._control_names:
            return self._control_names[index]
        return self._model.token(index) if 0 <= index < self._model.size else "\ufffd"

    def _special_id(self, kind: str) -> int | None:
        token = self.config.get(f"{kind}_token")
        if isinstance(token, Mapping):
            token = token.get("content", token)
        if token is None:
            return self._model.special_ids.get(kind)
        if not isinstance(token, str) or token not in self.control_tokens:
            raise UserError(
                f"{self._name}: {kind}_token {token!r} of tokenizer_config.json is no token of its vocabulary"
            )
        return self.control_tokens[token]

    def _required_id(self, kind: str) -> int:
        index = self._special_id(kind)
        if index is None:
            raise UserError(
                f"{self._name} has no {kind} token: name one as {kind}_token in tokenizer_config.json"
            )
        return index


def compatible(tokenizer: Tokenizer, digest: str, added_tokens: Mapping[str, int]) -> bool:
    """Whether ids made with (digest, added_tokens) mean the same to `tokenizer`.

    So a tokenizer reads what was made with it before tokens were added, and not the reverse.
    """
    return tokenizer.digest == digest and added_tokens.items() <= tokenizer.added_tokens.items()


def read_files(path: epath.PathLike) -> dict[str, bytes]:
    """The tokenizer files that exist in a directory, and its `generation_config.json`.

    Raises:
      UserError: it cannot be reached, or a file cannot be read.
    """
    directory = epath.Path(path)
    try:
        names = (*FILE_NAMES, GENERATION_CONFIG)
        return {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}
    except Exception as error:  # of gs:// they come in many classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the tokenizer directory {path}: {reason[:300]}") from error


def _opened(read: Callable[[bytes], T], files: Mapping[str, bytes], file: str, name: str) -> T:
    """What `read` makes of one of the files.

    Raises:
      UserError: it can make nothing of it.
    """
    try:
        return read(files[file])
    except ImportError:
        raise
    except Exception as error:  # every library has its own classes
        reason = reason_of(error)
        raise UserError(
            f"{name}: {file} is damaged or not what it is named ({reason[:200]}): {how_to_mend(files[file])}"
        ) from error


def _json_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _generation_stop_ids(data: bytes) -> tuple[int, ...]:
    found = _json_object(data).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise ValueError(f"eos_token_id is {found!r}, not an id or a list of ids")
    return tuple(ids)


def _added_in(file: str, data: bytes) -> list[tuple[str, int]]:
    """Tokens outside the model's own vocabulary, as each of Hugging Face's files has them."""
    content = _json_object(data)
    if file == "added_tokens.json":
        pairs = list(content.items())
    elif file == "tokenizer.json":
        pairs = [(token["content"], token["id"]) for token in content.get("added_tokens", ())]
    else:
        decoder = content.get("added_tokens_decoder", {})
        pairs = [(token["content"], index) for index, token in decoder.items()]
    return [(str(token), int(index)) for token, index in pairs]


def _added_tokens(files: Mapping[str, bytes], model: _Model, name: str) -> dict[str, int]:
    """Tokens outside the model's own vocabulary, from each file that Hugging Face keeps them in."""
    pairs: list[tuple[str, int]] = []
    for file in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        if file in files:
            pairs += _opened(functools.partial(_added_in, file), files, file, name)
    added: dict[str, int] = {}
    for token, index in sorted(pairs, key=lambda pair: pair[1]):
        if model.control_tokens.get(token) == index:
            continue
        if added.setdefault(token, index) != index or (index < model.size and model.token(index) != token):
            raise UserError(
                f"{name}: its files give the token {token!r} more than one id, or id {index} twice"
            )
    if len(set(added.values())) != len(added):
        raise UserError(f"{name}: two added tokens have one id")
    return added


class _SentencePieceModel:
    """`tokenizer.model` through sentencepiece."""

    def __init__(self, proto: bytes):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        self.digest = hashlib.sha256(proto).hexdigest()
        model = sentencepiece_model_pb2.ModelProto.FromString(proto)
        with_prefix = SentencePieceProcessor(model_proto=proto)
        model.normalizer_spec.add_dummy_prefix = False
        without = SentencePieceProcessor(model_proto=model.SerializeToString())
        self._processors = {True: with_prefix, False: without}
        self.size = with_prefix.piece_size()
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        self.control_tokens = {
            piece.piece: index
            for index, piece in enumerate(model.pieces)
            if piece.type in (kinds.UNKNOWN, kinds.CONTROL)
        }
        ids = {kind: getattr(with_prefix, f"{kind}_id")() for kind in ("bos", "eos", "unk", "pad")}
        self.special_ids = {kind: index for kind, index in ids.items() if index >= 0}

    def encode(self, text: str, prefix: bool) -> list[int]:
        return self._processors[prefix].encode(text)

    def encode_with_spans(self, text: str, prefix: bool) -> tuple[list[int], list[Span]]:
        from sentencepiece import sentencepiece_pb2

        encoded = self._processors[prefix].encode(text, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(encoded).pieces
        begins, ends = [piece.begin for piece in pieces], [piece.end for piece in pieces]
        if not text.isascii():
            # SentencePiece counts UTF-8 bytes; a byte begins a character unless it is 0b10xxxxxx.
            data = np.frombuffer(text.encode(), np.uint8)
            character = np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))
            begins, ends = character[begins].tolist(), character[ends].tolist()
        # Of the bytes of a character SentencePiece gives the last one alone an extent.
        spans = [(begin, max(end, begin + 1)) for begin, end in zip(begins, ends, strict=True)]
        return [piece.id for piece in pieces], spans

    def decode(self, ids: list[int], prefix: bool) -> str:
        return self._processors[prefix].decode(ids)

    def token(self, index: int) -> str:
        return self._processors[True].id_to_piece(index)


class _JsonModel:
    """`tokenizer.json` through the tokenizers library."""

    def __init__(self, data: bytes):
        import tokenizers

        spec = json.loads(data)
        added = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
        # Without its added tokens the library cannot find one in plain text; without its
        # post-processor it neither adds bos nor trims the offsets.
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        what = [spec["model"], spec["normalizer"], spec["pre_tokenizer"]]
        self.digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        self._tokenizers = {
            prefix: tokenizers.Tokenizer.from_str(json.dumps(spec if prefix else _without_prefix(spec)))
            for prefix in (True, False)
        }
        self.size = self._tokenizers[True].get_vocab_size()
        self.control_tokens = {token: index for token, index in added.items() if index < self.size}
        unk = self._tokenizers[True].token_to_id(spec["model"].get("unk_token") or "")
        self.special_ids = {} if unk is None else {"unk": unk}

    def encode(self, text: str, prefix: bool) -> list[int]:
        return self._tokenizers[prefix].encode(text, add_special_tokens=False).ids

    def encode_with_spans(self, text: str, prefix: bool) -> tuple[list[int], list[Span]]:
        encoding = self._tokenizers[prefix].encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], prefix: bool) -> str:
        return self._tokenizers[prefix].decode(ids, skip_special_tokens=False)

    def token(self, index: int) -> str:
        return self._tokenizers[True].id_to_token(index) or ""


def _without_prefix(spec: Any) -> Any:
    """A `tokenizer.json` without the parts that add a space in front, or take it off in decoding."""
    if isinstance(spec, list):
        kept = (
            part for part in spec if not (isinstance(part, dict) and part.get("type") in ("Prepend", "Strip"))
        )
        return [_without_prefix(part) for part in kept]
    if not isinstance(spec, dict):
        return spec
    if spec.get("type") == "Prepend":
        return None
    spec = {
        key: value if key in ("vocab", "merges") else _without_prefix(value) for key, value in spec.items()
    }
    if "prepend_scheme" in spec:
        spec["prepend_scheme"] = "never"
    if "add_prefix_space" in spec:
        spec["add_prefix_space"] = False
    return spec
