"""Text to ids and back, with the ids of `transformers`.

The `tokenizers` library encodes. Text that spells an added token gives that token, unless it is special (a control
token): in the library these carry names that no text can spell, and only `mark_control_tokens` puts these names into a
text. So what a user writes never becomes a control token. `directory` reads the files that a tokenizer is made of,
`tokenizer_files` writes them.
"""

import functools
import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import digest_of
from lemur_jax.text.backend import (
    build_backend,
    build_decoders,
    build_sentencepiece,
    surrounding_ids,
    token_pattern,
    vocabulary,
)
from lemur_jax.text.config import TokenizerConfig
from lemur_jax.text.directory import (
    FILE_NAMES,
    GENERATION_CONFIG,
    json_object,
    read_files,
    read_template,
    resolve_files,
)

__all__ = ["FILE_NAMES", "GENERATION_CONFIG", "Tokenizer", "compatible", "read_files"]

# Tokens that end a turn: ChatML's, Llama-3's; and those that end a document in vocabularies with such tokens.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")

# Private-use characters: the library knows control tokens by names made of them.
_PRIVATE = range(0x100000, 0x10FFFE)


class Tokenizer:
    """Encodes and decodes; opened by `load` or `from_files`. Pickles as its files.

    Attributes:
      vocab_size: highest id + 1, added tokens included.
      model_size: highest id of the vocabulary without added tokens + 1.
      eos_id: the id of `eos_token`.
      bos_id, unk_id, pad_id: ids, or None.
      begin_ids, end_ids: what transformers' `add_special_tokens=True` puts before and after a text.
      added_tokens: tokens that are not in that vocabulary, special or not, to their ids.
      control_tokens: special tokens (`<s>`, `<|im_end|>`, ...) to their ids; plain text never gives one.
      generation_stop_ids: the ids of `eos_token_id` in `generation_config.json`; () without one.
      digest: sha256 (hex) of the vocabulary, independent of added tokens.
      chat_template: Jinja source, or None.
    """

    def __init__(self, files: Mapping[str, bytes], name: str):
        files = resolve_files(files, name)
        self._files, self._name = files, name
        self.config: Mapping[str, Any] = json_object(files["tokenizer_config.json"])
        spec = json_object(files["tokenizer.json"])
        self.digest = digest_of([spec["model"], spec.get("normalizer"), spec.get("pre_tokenizer")])
        vocab = vocabulary(spec)
        self.model_size = max(vocab.values(), default=-1) + 1
        added = spec["added_tokens"]
        special = [token["content"] for token in added if token["special"]]
        # Names that no text can contain: their first characters are random.
        prefix = "".join(chr(secrets.choice(_PRIVATE)) for _ in range(4))
        self._marks = {token: f"{prefix}{chr(_PRIVATE[i])}" for i, token in enumerate(special)}
        self._backend = build_backend(spec, added, self._marks)
        ids = {token["content"]: token["id"] for token in added}
        for token, index in ids.items():
            if self.find(token) != index:
                raise UserError(
                    f"{name}: {token!r} has the id {index}, but {self.find(token)} is the next: ids of added tokens"
                    " must follow each other"
                )
        for token, mark in self._marks.items():
            if ids[token] not in self._backend.encode(f"({mark})", add_special_tokens=False).ids:
                raise UserError(
                    f"{name}: the special token {token!r} is never found in a text, since its normalizer changes it:"
                    " set its `normalized` to false"
                )
        self.added_tokens = {token: index for token, index in ids.items() if vocab.get(token) != index}
        self.control_tokens = {token: ids[token] for token in special}
        self._control_names = {index: token for token, index in self.control_tokens.items()}
        self._pattern = token_pattern(added)
        self.vocab_size = max([self.model_size, *(index + 1 for index in ids.values())])
        self._decoders = build_decoders(spec.get("decoder"))
        # Only where every added token is special: SentencePiece knows none of them.
        self._fast = build_sentencepiece(self.sentencepiece, spec) if len(special) == len(added) else None
        self.bos_id, eos, self.unk_id, self.pad_id = map(self._named_id, ("bos", "eos", "unk", "pad"))
        if eos is None:
            raise UserError(f"{name} has no eos token: name one as eos_token in tokenizer_config.json")
        unknown = spec["model"].get("unk_token")
        if unknown and self.find(unknown) is None:
            raise UserError(f"{name}: the unk_token {unknown!r} of its model is not in its vocabulary")
        if unknown and self.unk_id is None:
            self.unk_id = self.find(unknown)
        self.eos_id = eos
        self.begin_ids, self.end_ids = surrounding_ids(spec)
        self.generation_stop_ids = self._generation_stop_ids()
        template = files.get("chat_template.jinja")
        self.chat_template = None if template is None else template.decode()

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Opens a directory.

        Raises UserError: no tokenizer, damaged files, files that contradict each other, or a kind that is not
        supported.
        """
        return cls(read_files(path), str(path))

    @classmethod
    def from_config(cls, options: TokenizerConfig) -> "Tokenizer":
        """`load` of `path`, with the template of the file `chat_template` if there is one."""
        files = read_files(options.path)
        if options.chat_template:
            files["chat_template.jinja"] = read_template(options.chat_template).encode()
        return cls(files, options.path)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """The inverse of `files`; also takes those of a directory, as checkpoints of earlier versions keep them."""
        return cls(files, "the tokenizer files")

    def files(self) -> dict[str, bytes]:
        """All files of the directory by name: what a checkpoint keeps."""
        return dict(self._files)

    @property
    def sentencepiece(self) -> bytes | None:
        """`tokenizer.model`, if there is one."""
        return self._files.get("tokenizer.model")

    def __reduce__(self):
        return (Tokenizer, (self._files, self._name))

    @property
    def special_names(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... to the tokens that they name, as chat templates read them."""
        named = {key: token for key, token in self.config.items() if key.endswith("_token")}
        return {key: token for key, token in named.items() if isinstance(token, str)}

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Ids of plain text, without bos and eos, never a control token.

        Args:
          prefix: False for text that follows a control token: it gets no space in front, except under `legacy`.
        """
        if not prefix:
            marker = self._marks[self._control_names[self.eos_id if self.bos_id is None else self.bos_id]]
            return self._backend.encode(marker + text, add_special_tokens=False).ids[1:]
        if self._fast is not None:
            return self._fast.encode(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of text in which `mark_control_tokens` marked control tokens, and the characters [begin, end) of each.

        A token of some bytes of a character has the span of the whole character.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def mark_control_tokens(self, text: str) -> str:
        """Replaces each control token that the text spells by a name that stands for it in `encode_marked`."""
        return self._pattern.sub(lambda match: self._marks.get(match[0], match[0]), text)

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """Ids of text whose spelled control tokens are meant as such, as `transformers` reads every text."""
        return self.encode_marked(self.mark_control_tokens(text))[0]

    def encode_prompt(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """Ids of a text for a model to continue: `begin_ids` in front, none of `end_ids`.

        Args:
          control_tokens: spelled control tokens are meant as such; `begin_ids` that the text spells are not repeated.
        """
        ids = self.encode_with_control_tokens(text) if control_tokens else self.encode(text)
        return ids if ids[: len(self.begin_ids)] == self.begin_ids else [*self.begin_ids, *ids]

    @functools.cached_property
    def separators(self) -> tuple[list[int], list[int]]:
        """The ids before and after a document of a corpus.

        `begin_ids` and `end_ids` (without the latter: end-of-text if eos ends a turn, else eos); if equal, only after.
        """
        text_ends = [self.control_tokens[name] for name in _TEXT_ENDS if name in self.control_tokens]
        end = text_ends[0] if text_ends and self.token(self.eos_id) in TURN_ENDS else self.eos_id
        ends = self.end_ids or [end]
        return [] if self.begin_ids == ends else self.begin_ids, ends

    def break_control_tokens(self, text: str, separator: str) -> str:
        """Puts a separator behind the first character of each control token that the text spells."""
        return self._pattern.sub(
            lambda match: f"{match[0][:1]}{separator}{match[0][1:]}" if match[0] in self._marks else match[0],
            text,
        )

    def unmark(self, text: str) -> str:
        """The inverse of `mark_control_tokens`."""
        for token, mark in self._marks.items():
            text = text.replace(mark, token)
        return text

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; control tokens by name, or left out if `skip_special`; U+FFFD for an id without a token."""
        text: list[str] = []
        prefix = True
        for is_text, run in itertools.groupby(map(int, ids), self._is_text):
            if is_text:
                text.append(self._decoders[prefix](list(map(self._backend.id_to_token, run))))
                continue
            *_, last = others = list(run)
            if not skip_special:
                text += map(self.token, others)
            # Encoding puts a space in front of a document's first text only.
            prefix = last == self.bos_id
        return "".join(text)

    def _is_text(self, index: int) -> bool:
        """Whether an id has a token that is no control token."""
        return (
            index >= 0 and index not in self._control_names and self._backend.id_to_token(index) is not None
        )

    def token(self, index: int) -> str:
        """The piece with this id as the vocabulary spells it, e.g. "▁the" or "<|im_end|>"; U+FFFD as in `decode`."""
        if index in self._control_names:
            return self._control_names[index]
        return (self._backend.id_to_token(index) if index >= 0 else None) or "\ufffd"

    def token_bytes(self, index: int) -> bytes:
        """UTF-8 bytes that a token adds inside a text, perhaps part of a character; for a control token its name."""
        piece = self.token(index)
        text = piece if index in self._control_names else self._decoders[False]([piece])
        if "\ufffd" not in text or piece == "\ufffd":
            return text.encode()
        if piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        values = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(map(values.__getitem__, piece))

    def find(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None: there is none."""
        return self._backend.token_to_id(self._marks.get(token, token))

    def _named_id(self, kind: str) -> int | None:
        token = self.config.get(f"{kind}_token")
        return None if token is None else self.find(token)

    def _generation_stop_ids(self) -> tuple[int, ...]:
        value = json_object(self._files.get(GENERATION_CONFIG, b"{}")).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
            raise UserError(
                f"{self._name}: eos_token_id of {GENERATION_CONFIG} is {value!r}, not an id or a list of ids"
            )
        return tuple(ids)


def compatible(tokenizer: Tokenizer, digest: str, added_tokens: Mapping[str, int]) -> bool:
    """Whether ids made with (digest, added_tokens) mean the same to `tokenizer`.

    So a tokenizer can read data that was made before tokens were added to it, but not the reverse.
    """
    found = {token: tokenizer.find(token) for token in added_tokens}
    return tokenizer.digest == digest and found == added_tokens
