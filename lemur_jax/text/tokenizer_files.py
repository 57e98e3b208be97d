"""Writes tokenizer directories: trains a SentencePiece model, adds and drops control tokens."""

import io
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.text.files import dump, make_files
from lemur_jax.text.tokenizer import FILE_NAMES, GENERATION_CONFIG, Tokenizer


def train_sentencepiece(texts: Iterable[str], path: epath.PathLike, vocab_size: int) -> Tokenizer:
    """Trains a byte-fallback BPE in Llama's manner and writes its directory.

    Digits stand alone, text is not normalized, runs of spaces are pieces; a newline is always the single token <0x0A>.
    Ids 0, 1, 2 are <unk>, <s>, </s>; there is no padding token. `vocab_size` counts control tokens and the 256 bytes
    too; UserError if the texts, all held in memory, do not allow it.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            character_coverage=0.99995,
            # Longer lines are left out.
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        # The library's message ends in "[the condition that failed] what it means".
        reason = str(error).rpartition("]")[2].strip() or "the texts are empty"
        raise UserError(f"cannot train a tokenizer of {vocab_size} tokens for {path}: {reason}") from error
    return write_directory(path, model.getvalue())


def extend(
    source: epath.PathLike, target: epath.PathLike, tokens: Sequence[str], chat_template: str | None = None
) -> Tokenizer:
    """Writes the tokenizer of `source` with more control tokens, at the ids that follow its own, in their order.

    A token that `source` has already keeps its id. Without a `chat_template` it is the source's, or ChatML if the
    result has ChatML's tokens. Raises UserError without a tokenizer in `source`, or for a token twice in `tokens`.
    """
    return _write(target, revise(Tokenizer.load(source), add=tokens, chat_template=chat_template))


def revise(
    tokenizer: Tokenizer, *, keep: int = 0, add: Sequence[str] = (), chat_template: str | None = None
) -> dict[str, bytes]:
    """The files of a tokenizer with fewer and with more control tokens.

    With `keep` above 0, control tokens with ids from this one on are dropped first, and a chat template that names one.
    Those of `add` get the next ids, as in `extend`. Raises UserError for a token twice in `add` or known as plain text,
    or ids of the model file from `keep` on.
    """
    if len(set(add)) != len(add):
        raise UserError(f"tokenizer.add_tokens names a token twice: {', '.join(add)}")
    keep = keep or tokenizer.vocab_size
    dropped = {token for token, index in tokenizer.control_tokens.items() if index >= keep}
    kept = {token: index for token, index in tokenizer.added_tokens.items() if token not in dropped}
    if tokenizer.model_size > keep:
        raise UserError(
            f"the tokenizer's model file has {tokenizer.model_size} pieces of its own: only control tokens"
            f" that were added to it can be dropped, not all ids from {keep} on"
        )
    size = max([tokenizer.model_size, *(index + 1 for index in kept.values())])
    new = [token for token in add if token in dropped or token not in tokenizer.control_tokens]
    if taken := [token for token in new if token not in dropped and tokenizer.find(token) is not None]:
        raise UserError(f"cannot add {taken[0]!r}: it is plain text in the vocabulary already; leave it out")
    template = tokenizer.chat_template
    if template is not None and any(token in template for token in dropped):
        template = None
    spec = json.loads(tokenizer.files()["tokenizer.json"])
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in dropped]
    obsolete = [key for key, token in tokenizer.config.items() if key.endswith("_token") and token in dropped]
    files = make_files(
        tokenizer.sentencepiece,
        tokenizer_json=spec,
        added_tokens=kept | {token: size + index for index, token in enumerate(new)},
        chat_template=chat_template or template,
        config={key: value for key, value in tokenizer.config.items() if key not in obsolete},
    )
    if stops := [index for index in tokenizer.generation_stop_ids if index < keep]:
        files[GENERATION_CONFIG] = dump({"eos_token_id": stops})
    return files


def write_directory(path: epath.PathLike, model: bytes) -> Tokenizer:
    """Writes the directory of a SentencePiece BPE."""
    return _write(path, make_files(model))


def _write(path: epath.PathLike, files: Mapping[str, bytes]) -> Tokenizer:
    """Writes a tokenizer's files in place of another one's; a new directory appears whole."""
    tokenizer, directory = Tokenizer(files, str(path)), epath.Path(path)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if directory.exists():  # it has other files, which stay, or another process has just made it
            for name in set(FILE_NAMES) - set(files):
                (directory / name).unlink(missing_ok=True)
            for name in files:
                (temporary / name).copy(directory / name, overwrite=True)
        else:
            temporary.rename(directory)
    finally:
        if temporary.exists():
            temporary.rmtree()
    return tokenizer
