"""Duplicates of earlier documents, found on disk: memory does not grow with the corpus.

While documents are cleaned and tokenized they go into a draft of the store, each with a fingerprint: a digest
of its text, and its MinHash (Broder 1997) of which 16 bits of each hash are kept (Li and König, arXiv:0910.3349),
enough for two different hashes to be equal once in 65,536. When all are there, those with one digest, or with one
band of hashes (locality-sensitive hashing), are brought together by sorting, band after band; candidates are
compared by their whole MinHash; and the documents that stay are copied from the draft into the store.

A near duplicate is removed for an earlier document that stays, an exact one for the first with its text, whatever
the number of workers.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.data.arrays import finish
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.cleaning import Removed
from lemur_jax.prepare.encoding import Encoded
from lemur_jax.prepare.rejects import EXAMPLES, Rejects
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.tokenizer import Tokenizer

STEPS = ("exact_duplicates", "near_duplicates")
EXCERPT_TOKENS = 60

_READ = 1 << 16  # documents whose fingerprints are read together
_SORTED = 1 << 19  # keys that are sorted together
_COMPARED = 4  # of a group with one key: how many just before it each document is compared with
_VERIFIED = 1 << 16  # pairs whose MinHashes are compared together
_RESOLVED = 1 << 17  # documents whose similar pairs are in memory together
_COPIED = 256

# Told how many documents more are copied.
Update = Callable[[int], None]


def has_duplicate_steps(steps: str) -> bool:
    """Whether steps from `cleaning.parse_steps` look for duplicates."""
    return any(name in json.loads(steps) for name in STEPS)


def fingerprint_arrays(steps: str) -> dict[str, str]:
    """Names and dtypes of what a draft has besides a store; see `append_fingerprint`."""
    options = json.loads(steps)
    arrays = {"digests": "uint64"} if "exact_duplicates" in options else {}
    arrays |= {"minhashes": "uint16"} if "near_duplicates" in options else {}
    return arrays | {"n_bytes": "int64"}


def append_fingerprint(draft: StoreWriter, document: Encoded) -> None:
    """Appends 2 halves of a digest, the MinHashes, and the document's length in bytes, as far as they are asked for."""
    if document.fingerprint.exact:
        draft.append("digests", np.frombuffer(document.fingerprint.exact, np.uint64))
    if document.fingerprint.near:
        draft.append("minhashes", np.frombuffer(document.fingerprint.near, np.uint16))
    draft.append("n_bytes", [document.n_bytes])


def copy_distinct(
    draft: StoreWriter,
    writer: StoreWriter,
    steps: str,
    tokenizer: Tokenizer,
    rejects: Rejects,
    update: Update,
) -> None:
    """Copies the documents that repeat no earlier one, and tells the rejects of the others.

    Args:
      draft: saved, and whole.
      writer: of the store.
      steps: from `cleaning.parse_steps`.
      tokenizer: to show examples.
      rejects: gets counts and examples of what is removed.
      update: told the number of documents done, again and again.
    """
    documents = draft.documents
    store, arrays = draft.read_saved()
    with _scratch(store.path) as scratch:
        found = find_duplicates(arrays, json.loads(steps), documents, scratch)
        for step, earlier in found.items():
            _report(store, step, earlier, tokenizer, rejects)
        for first in range(0, documents, _COPIED):
            stop = min(first + _COPIED, documents)
            stays = np.all([earlier[first:stop] < 0 for earlier in found.values()], axis=0)
            chosen = np.arange(first, stop)[stays]
            n_bytes = finish(arrays["n_bytes"][first:stop].read())[stays]
            _copy(store, chosen, n_bytes, writer)
            update(stop - first)


def _copy(store: TokenStore, chosen: np.ndarray, n_bytes: np.ndarray, writer: StoreWriter) -> None:
    if chosen.size:
        columns = (*store.read_documents(chosen), n_bytes.tolist(), store.labels_of(chosen))
        for ids, mask, name, size, label in zip(*columns, strict=True):
            writer.add(ids, name, size, mask, label)


def _report(
    store: TokenStore, step: str, earlier: np.ndarray, tokenizer: Tokenizer, rejects: Rejects
) -> None:
    count, examples = 0, list[Removed]()
    for first in range(0, len(earlier), _READ):
        removed = first + np.flatnonzero(earlier[first : first + _READ] >= 0)
        count += len(removed)
        for document in removed[: EXAMPLES - len(examples)].tolist():
            ids, _ = store.document(document)
            other = store.document_id(int(earlier[document]))
            reason = f"{'the same text as' if step == 'exact_duplicates' else 'similar to'} {other}"
            excerpt = tokenizer.decode(ids[:EXCERPT_TOKENS].tolist(), skip_special=True)
            examples.append(
                Removed(step=step, reason=reason, id=store.document_id(document), excerpt=excerpt)
            )
    if count:
        rejects.remove_added(step, count, examples)


@contextlib.contextmanager
def _scratch(beside: epath.Path) -> Iterator[Path]:
    """A directory for files that are mapped into memory: where the draft is, or local if that is not."""
    local = "://" not in str(beside)
    with tempfile.TemporaryDirectory(dir=beside if local else None, prefix="duplicates-") as folder:
        yield Path(folder)


def find_duplicates(
    arrays: Mapping[str, Any], steps: Mapping[str, Any], documents: int, scratch: Path
) -> dict[str, np.ndarray]:
    """Which earlier document each document repeats.

    Args:
      arrays: of `fingerprint_arrays`, by name; TensorStore's.
      steps: with their options.
      documents: fewer than 2^32.
      scratch: an empty directory, which needs 2 bytes for each hash and some 60 more for each document.

    Returns:
      For each step of `STEPS` among `steps` int64 [documents], mapped from a file: an earlier document
      that stays, or -1. A near duplicate is no exact one.
    """
    found = {}
    if "exact_duplicates" in steps:
        digests = _mapped(scratch / "digests", np.dtype("uint64"), (documents, 2), arrays["digests"])
        found["exact_duplicates"] = _exact(digests, scratch)
    if "near_duplicates" in steps:
        options = steps["near_duplicates"]
        shape = (documents, options["hashes"])
        minhashes = _mapped(scratch / "minhashes", np.dtype("uint16"), shape, arrays["minhashes"])
        exact = found.get("exact_duplicates", np.broadcast_to(np.int64(-1), documents))
        found["near_duplicates"] = _near(minhashes, exact, options, scratch)
    return found


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], array: Any = None) -> np.ndarray:
    """A file in memory: of the first elements of an array on disk or gs://, or of -1."""
    mapped = np.memmap(path, dtype, "w+", shape=shape).view(np.ndarray)
    width = mapped[:1].size
    for first in range(0, len(mapped), _READ):
        block, start = mapped[first : first + _READ], first * width
        if array is None:
            block[:] = -1
        else:
            block[:] = finish(array[start : start + block.size].read()).reshape(block.shape)
    return mapped


def _exact(digests: np.ndarray, scratch: Path) -> np.ndarray:
    earlier = _mapped(scratch / "exact", np.dtype("int64"), (len(digests),))
    blocks = (np.arange(first, min(first + _READ, len(digests))) for first in range(0, len(digests), _READ))
    keys = ((digests[block, 0], block) for block in blocks)
    for first, second in _pairs(keys, len(digests), scratch):
        same = digests[first, 1] == digests[second, 1]
        earlier[second[same]] = first[same]  # the group's first document comes last, and stays
    return earlier


def _near(minhashes: np.ndarray, exact: np.ndarray, options: Mapping[str, Any], scratch: Path) -> np.ndarray:
    documents, hashes = minhashes.shape
    width = hashes // options["bands"]
    # Multilinear hashing (Dietzfelbinger et al. 1997) of a band to 64 bits.
    factors = np.random.default_rng(0).integers(1 << 63, size=width, dtype=np.uint64) * 2 + 1
    for band in range(0, hashes, width):

        def keys(columns=slice(band, band + width)):
            for first in range(0, documents, _READ):
                block = first + np.flatnonzero(exact[first : first + _READ] < 0)
                yield minhashes[block, columns].astype(np.uint64) @ factors, block

        for first, second in _pairs(keys(), documents, scratch):
            for part in range(0, len(first), _VERIFIED):
                pair = first[part : part + _VERIFIED], second[part : part + _VERIFIED]
                same = (minhashes[pair[0]] == minhashes[pair[1]]).mean(axis=1) >= options["threshold"]
                _note(pair[0][same], pair[1][same], scratch)
    return _resolve(documents, scratch)


def _note(first: np.ndarray, second: np.ndarray, scratch: Path) -> None:
    """Appends similar pairs to files by the later document."""
    pairs = (second.astype(np.uint64) << 32) | first.astype(np.uint64)
    parts = second // _RESOLVED
    for part in np.unique(parts).tolist():
        with (scratch / f"similar-{part}").open("ab") as file:
            file.write(pairs[parts == part].tobytes())


def _resolve(documents: int, scratch: Path) -> np.ndarray:
    """In the corpus's order: what is similar to an earlier document that stays goes."""
    earlier = _mapped(scratch / "near", np.dtype("int64"), (documents,))
    for part in range(-(-documents // _RESOLVED)):
        path = scratch / f"similar-{part}"
        if path.exists():
            for pair in np.unique(np.fromfile(path, np.uint64)):
                later, other = divmod(int(pair), 1 << 32)
                if earlier[later] < 0 and earlier[other] < 0:
                    earlier[later] = other
    return earlier


def _pairs(
    keys: Iterable[tuple[np.ndarray, np.ndarray]], documents: int, scratch: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of documents with one key: each with the few just before it, at last with the group's first.

    Args:
      keys: (keys uint64, documents) in ascending order of these, in blocks.
      documents: how many there may be.
      scratch: for files of 16 bytes a document.

    Yields:
      (earlier, later), int64 of one length.
    """
    parts = max(1, -(-documents // _SORTED))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((scratch / f"keys-{part}").open("w+b")) for part in range(parts)]
        for block, numbers in keys:
            of_part = (block >> 32) * parts >> 32
            rows = np.stack([block, numbers.astype(np.uint64)], axis=1)
            for part, file in enumerate(files):
                file.write(rows[of_part == part].tobytes())
        for file in files:
            file.seek(0)
            rows = np.empty((0, 2), np.uint64)
            # A frequent key may bring more than are sorted together: of these, the first goes on.
            while (more := np.fromfile(file, np.uint64, 2 * _SORTED)).size:
                rows = np.concatenate([rows, more.reshape(-1, 2)])
                rows = rows[np.argsort(rows[:, 0], kind="stable")]
                numbers, begins = rows[:, 1].astype(np.int64), np.flatnonzero(_begins(rows[:, 0]))
                rank = np.arange(len(rows)) - np.repeat(begins, np.diff(begins, append=len(rows)))
                for back in range(1, _COMPARED + 1):
                    later = np.flatnonzero(rank >= back)
                    yield numbers[later - back], numbers[later]
                later = np.flatnonzero(rank > _COMPARED)
                yield numbers[later - rank[later]], numbers[later]
                rows = rows[begins]


def _begins(keys: np.ndarray) -> np.ndarray:
    """Where sorted keys differ from the one before."""
    return np.append(True, keys[1:] != keys[:-1])
