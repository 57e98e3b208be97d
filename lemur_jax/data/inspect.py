"""`lemur inspect`: what is in a token store, and what a config would train on, as text.

Supervised tokens are green with color, and enclosed in {+ +} without.
"""

import numpy as np
from etils import epath

from lemur_jax.data.budget import budget, format_budget
from lemur_jax.data.manifest import describe_labels
from lemur_jax.data.mixture import Mixture
from lemur_jax.data.store import TokenStore
from lemur_jax.text.tokenizer import Tokenizer

SAMPLE_TOKENS = 240  # of a document or row that are shown
GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_BAR = 40  # characters of the longest bar


def inspect_store(
    path: epath.PathLike, *, tokenizer: Tokenizer | None = None, samples: int = 3, color: bool = False
) -> str:
    """Counts, lengths and sample documents, spread over a token store, which is read and checked from end to end.

    Without the `tokenizer` that made it, or an extension of it, samples are shown as ids. Raises UserError if there is
    no whole store, it is damaged, or of another tokenizer.
    """
    store = TokenStore.open(path, tokenizer)
    store.verify()
    manifest = store.manifest
    lengths = np.diff(store.offsets())
    counts = {
        "task": f"{manifest.task}, split {manifest.split}",
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,}, {'uint16' if manifest.vocab_size <= 1 << 16 else 'uint32'}",
        "supervised": f"{manifest.supervised_tokens:,} ({manifest.supervised_tokens / manifest.tokens:.1%})",
        "bytes": f"{manifest.bytes:,} ({manifest.bytes / max(manifest.supervised_tokens, 1):.2f} a target)",
        "tokenizer": f"{manifest.tokenizer_digest[:12]}, {manifest.vocab_size:,} tokens"
        + "".join(f", {token}" for token in manifest.added_tokens),
        "made by": manifest.created_with,
    }
    if manifest.label_field:
        counts["labels"] = f"{manifest.label_field}: {describe_labels(manifest)}"
    lines = [str(path), *(f"  {key:<12}{value}" for key, value in counts.items())]
    lines += ["", "tokens of a document", *histogram(lengths)]
    for index in np.linspace(0, len(lengths) - 1, min(samples, len(lengths))).astype(int):
        (ids,), (mask,), (name,) = store.read_documents(np.array([index]))
        supervised = np.arange(len(ids)) > 0 if mask is None else mask == 1
        lines += ["", f"--- {printable(name)}, {len(ids):,} tokens"]
        lines.append(_sample(ids, supervised, tokenizer, color))
    if tokenizer is None:
        lines += ["", "Name the tokenizer's directory to see these as text."]
    return "\n".join(lines)


def inspect_mixture(
    mixture: Mixture, tokenizer: Tokenizer, train_steps: int, *, samples: int = 1, color: bool = False
) -> str:
    """What a run trains on: shares as trained, epochs, padding, and `samples` rows of each source."""
    lines = [f"{train_steps:,} steps of {mixture.batch_rows:,} rows of {mixture.length:,} tokens"]
    lines += ["", format_budget(budget(mixture, train_steps)), ""]
    for source in mixture.sources:
        padding = 1 - source.rows.tokens_per_row / source.rows.length
        cut = source.rows.truncated
        lines.append(
            f"{source.name}: {len(source.rows):,} rows, {padding:.2%} padding"
            + (f", {cut:,} documents longer than a row are cut" if cut else "")
        )
    for index, source in enumerate(mixture.sources):
        for row in mixture.visits(index, 0, min(samples, len(source.rows))):
            documents = source.rows.documents(int(row))
            more = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
            lines += ["", f"--- {source.name}, row {row:,}: {printable(documents[0])}{more}"]
            lines.append(_sample_row(source.rows.read(np.array([row])), tokenizer, color))
    return "\n".join(lines)


def histogram(lengths: np.ndarray) -> list[str]:
    """How many lengths lie in (2^(k-1), 2^k], one line for each k from the first that occurs."""
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(exponents)
    lowest = int(exponents.min())
    scale = _BAR / counts.max()
    return [
        f"  up to {1 << exponent:>9,}  {'#' * int(np.ceil(count * scale)):<{_BAR}}  {count:,}"
        for exponent, count in enumerate(counts[lowest:].tolist(), lowest)
    ]


def _sample_row(batch: dict[str, np.ndarray], tokenizer: Tokenizer, color: bool) -> str:
    """A row as the model sees it, its documents divided by lines."""
    tokens, weights, segments = (batch[key][0] for key in ("tokens", "loss_weights", "segment_ids"))
    supervised = np.append(False, weights[:-1] > 0)  # weights are of the token that follows
    real = np.flatnonzero(segments)
    parts = []
    for segment in np.unique(segments[real[:SAMPLE_TOKENS]]):
        positions = real[segments[real] == segment]
        parts.append(_sample(tokens[positions], supervised[positions], tokenizer, color))
    return "\n- - -\n".join(parts)


def _sample(ids: np.ndarray, supervised: np.ndarray, tokenizer: Tokenizer | None, color: bool) -> str:
    """The first tokens as text, or as ids without a tokenizer, with what is supervised marked."""
    more = "" if len(ids) <= SAMPLE_TOKENS else " ..."
    ids, supervised = ids[:SAMPLE_TOKENS], supervised[:SAMPLE_TOKENS]
    ends = [*np.flatnonzero(np.diff(supervised)) + 1, len(ids)]
    previous, begin, parts = "", 0, []
    for end in ends:
        # Decoded from the beginning each time: a run alone would lose its first space.
        prefix = ids[:end].tolist()
        text = tokenizer.decode(prefix) if tokenizer else " ".join(map(str, prefix)) + " "
        parts.append(_mark(printable(text[len(previous) :]), bool(supervised[begin]), color))
        previous, begin = text, end
    return "".join(parts) + more


def _mark(text: str, supervised: bool, color: bool) -> str:
    if color:
        return f"{GREEN if supervised else DIM}{text}{PLAIN}"
    return f"{{+{text}+}}" if supervised else text


def printable(text: str) -> str:
    """The text with non-printable characters escaped, so that it cannot control a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
        for character in text
    )
