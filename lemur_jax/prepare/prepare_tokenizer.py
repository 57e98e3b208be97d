"""The tokenizer of a run: loaded, trained, or made from another by adding control tokens."""

import contextlib
import hashlib
import heapq
import logging
import time
from collections.abc import Iterable, Sequence

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.progress import Progress
from lemur_jax.prepare import tasks
from lemur_jax.prepare.encoding import Record, read_content
from lemur_jax.text.config import TokenizerConfig
from lemur_jax.text.directory import read_template
from lemur_jax.text.tokenizer import FILE_NAMES, Tokenizer, compatible
from lemur_jax.text.tokenizer_files import extend, train_sentencepiece

logger = logging.getLogger(__name__)

# The training sample of a tokenizer: documents chosen by a hash, the same number of bytes of each task.
SAMPLE_BYTES = 12_000_000
SAMPLE_DOCUMENT_BYTES = 1 << 15


def prepare_tokenizer(options: TokenizerConfig, modules: Sequence[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of a config, trained on tasks of `modules` or extended first if it does not exist.

    Raises UserError if there is none and the config does not say how to make one, or if it differs from the one that
    the config describes, or has more tokens than the model's `vocab_size`.
    """
    if not options.path:
        raise UserError("tokenizer.path is empty: name the tokenizer's directory")
    path = epath.Path(options.path)
    if not any((path / name).exists() for name in FILE_NAMES):
        if options.extend:
            template = read_template(options.chat_template) if options.chat_template else None
            made = extend(options.extend, path, options.add_tokens, template)
            made_of = f"{options.extend} and {', '.join(options.add_tokens)}"
            logger.info("%s: %s tokens, %s", path, f"{made.vocab_size:,}", made_of)
        elif options.train_vocab_size:
            _train(options, modules, path)
    tokenizer = Tokenizer.from_config(options)
    _check_tokenizer(options, vocab_size, tokenizer)
    return tokenizer


def _train(options: TokenizerConfig, modules: Sequence[str], path: epath.Path) -> None:
    names, size = options.train_tasks, options.train_vocab_size
    if not names:
        raise UserError("tokenizer.train_tasks is empty: name the tasks to train the tokenizer on")
    begin = time.monotonic()
    texts: list[str] = []
    with Progress(None, "tokenizer: read", "documents") as progress:
        for name in names:
            task = tasks.find_task(name, modules)
            sampled = sample(tasks.examples(task, "train"), SAMPLE_BYTES // len(names), progress)
            if not any(sampled):
                raise UserError(f"task {name!r} has no text in its train split to train a tokenizer on")
            texts += sampled
    train_sentencepiece(texts, path, size)
    corpus = f"{sum(len(text.encode()) for text in texts) / 1e6:.1f} MB of {', '.join(names)}"
    logger.info("%s: %s tokens, trained on %s, %.1f s", path, f"{size:,}", corpus, time.monotonic() - begin)


def sample(records: Iterable[Record], limit: int, progress: Progress | None = None) -> list[str]:
    """Texts of at most `limit` bytes in total, chosen and ordered by a hash; only these are in memory."""
    heap: list[tuple[int, bytes]] = []  # a heap with the largest hash, negated, on top
    size = 0
    for record in records:
        text = _plain_text(record)[:SAMPLE_DOCUMENT_BYTES]
        digest = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        heapq.heappush(heap, (-digest, text))
        size += len(text)
        while size > limit:
            size -= len(heapq.heappop(heap)[1])
        if progress is not None:
            progress.update(1)
    return [text.decode("utf-8", "ignore") for _, text in sorted(heap, reverse=True)]


def _plain_text(record: Record) -> bytes:
    """The text of a record; b"" of a bad one, which is counted elsewhere."""
    with contextlib.suppress(ValueError):
        if not record.get("error"):
            return read_content(record)[2].encode()
    return b""


def _check_tokenizer(options: TokenizerConfig, vocab_size: int, tokenizer: Tokenizer) -> None:
    size, problem = f"has {tokenizer.vocab_size} tokens", ""
    if options.train_vocab_size not in (0, tokenizer.vocab_size):
        problem = f"{size}, tokenizer.train_vocab_size is {options.train_vocab_size}"
    elif options.extend:
        base = Tokenizer.load(options.extend)
        missing = [token for token in options.add_tokens if token not in tokenizer.control_tokens]
        if missing or not compatible(tokenizer, base.digest, base.added_tokens):
            problem = f"lacks {missing[0]}" if missing else f"was not made from {options.extend}"
    hint = "remove that directory, or name another in tokenizer.path"
    if not problem and tokenizer.vocab_size > vocab_size:
        problem, hint = f"{size}, model.vocab_size is {vocab_size}", "it must be at least as large"
    if problem:
        raise UserError(f"the tokenizer in {options.path} {problem}: {hint}")
