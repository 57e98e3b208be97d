"""Removal of documents that repeat earlier ones, on disk: memory does not grow with the corpus.

Cleaned and tokenized documents first go into a draft of the store, each with a fingerprint: a digest of its text, and
its MinHash (Broder 1997), with 16 bits kept of each hash (Li and König, arXiv:0910.3349). Documents with the same
digest, or with the same band of hashes (locality-sensitive hashing), are brought together by sorting, one band after
the other. Candidates are compared by their whole MinHash, and the documents that stay are copied into the store.

A near duplicate is removed if an earlier document that stays is similar, an exact one if an earlier document has the
same text, for any number of workers.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.common.paths import is_object_store
from lemur_jax.data.arrays import finish, map_array
from lemur_jax.data.store import TokenStore
from lemur_jax.prepare.cleaning import Removed, filters
from lemur_jax.prepare.encoding import Encoded
from lemur_jax.prepare.rejects import EXAMPLES, Rejects
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.tokenizer import Tokenizer

EXCERPT_TOKENS = 60

_FINGERPRINTS = {"digests": "uint64", "minhashes": "uint16"}  # of `Filters.fingerprints`, and their dtypes
_READ = 1 << 16  # documents whose fingerprints are read together
_SORTED = 1 << 19  # keys that are sorted together
_COMPARED = 4  # predecessors in a group with the same key that each document is compared with
_VERIFIED = 1 << 16  # pairs whose MinHashes are compared together
_RESOLVED = 1 << 17  # documents whose similar pairs are in memory together
_COPIED = 256  # documents copied together


def fingerprint_arrays(steps: str) -> dict[str, str]:
    """Names and dtypes of a draft's additional arrays, see `append_fingerprint`; empty if no step removes duplicates.

    `steps` as of `cleaning.parse_steps`.
    """
    arrays = {name: _FINGERPRINTS[name] for name in filters(steps).fingerprints({})}
    return arrays | {"n_bytes": "int64"} if arrays else {}


def append_fingerprint(draft: StoreWriter, document: Encoded) -> None:
    """Appends the two halves of the digest, the MinHashes and the document's length in bytes."""
    for name, data in document.fingerprints.items():
        draft.append(name, np.frombuffer(data, _FINGERPRINTS[name]))
    draft.append("n_bytes", [document.n_bytes])


def copy_distinct(
    draft: StoreWriter,
    writer: StoreWriter,
    steps: str,
    tokenizer: Tokenizer,
    rejects: Rejects,
    update: Callable[[int], None],
) -> None:
    """Copies the documents of a complete draft that repeat no earlier one to the store's writer.

    `rejects` receives counts and examples of what is removed, decoded by the tokenizer; `update` is called with the
    number of documents done since the last call.
    """
    documents = draft.documents
    store, arrays = draft.read_saved()
    where = None if is_object_store(store.path) else store.path  # for memory-mapped files
    with tempfile.TemporaryDirectory(dir=where, prefix="duplicates-") as scratch:
        by_step = find_duplicates(arrays, json.loads(steps), documents, Path(scratch))
        for step, earlier in by_step.items():
            _report(store, step, earlier, tokenizer, rejects)
        for start in range(0, documents, _COPIED):
            stop = min(start + _COPIED, documents)
            stays = np.all([earlier[start:stop] < 0 for earlier in by_step.values()], axis=0)
            chosen = np.arange(start, stop)[stays]
            if chosen.size:
                writer.copy(store, chosen, finish(arrays["n_bytes"][start:stop].read())[stays].tolist())
            update(stop - start)


def _report(
    store: TokenStore, step: str, earlier: np.ndarray, tokenizer: Tokenizer, rejects: Rejects
) -> None:
    count, examples = 0, list[Removed]()
    for start in range(0, len(earlier), _READ):
        removed = start + np.flatnonzero(earlier[start : start + _READ] >= 0)
        count += len(removed)
        for document in removed[: EXAMPLES - len(examples)].tolist():
            (ids, _), _, (name, other) = store.read_documents(np.array([document, earlier[document]]))
            reason = f"{'the same text as' if step == 'exact_duplicates' else 'similar to'} {other}"
            excerpt = tokenizer.decode(ids[:EXCERPT_TOKENS].tolist(), skip_special=True)
            examples.append(Removed(step=step, reason=reason, id=name, excerpt=excerpt))
    if count:
        rejects.remove_added(step, count, examples)


def find_duplicates(
    arrays: Mapping[str, Any], steps: Mapping[str, Any], documents: int, scratch: Path
) -> dict[str, np.ndarray]:
    """Finds for each document an earlier one that it repeats.

    Args:
      arrays: of `fingerprint_arrays`, by name; TensorStore's.
      steps: with their options.
      documents: their number, less than 2^32.
      scratch: an empty directory; takes 2 bytes per hash and about 60 more per document.

    Returns:
      For each step in `steps` that removes duplicates, int64 [documents], memory-mapped: an earlier document that
      stays, or -1.
      Exact duplicates are not counted as near ones.
    """
    by_step = {}
    if "exact_duplicates" in steps:
        digests = map_array(scratch / "digests", arrays["digests"], (documents, 2))
        by_step["exact_duplicates"] = _exact(digests, scratch)
    if "near_duplicates" in steps:
        options = steps["near_duplicates"]
        shape = (documents, options["hashes"])
        minhashes = map_array(scratch / "minhashes", arrays["minhashes"], shape)
        exact = by_step.get("exact_duplicates", np.broadcast_to(np.int64(-1), documents))
        by_step["near_duplicates"] = _near(minhashes, exact, options, scratch)
    return by_step


def _map_minus_ones(path: Path, documents: int) -> np.ndarray:
    """-1 for each document, int64 [documents], in a new file that is mapped into memory."""
    earlier = np.memmap(path, np.int64, "w+", shape=documents).view(np.ndarray)
    earlier[:] = -1
    return earlier


def _exact(digests: np.ndarray, scratch: Path) -> np.ndarray:
    earlier = _map_minus_ones(scratch / "exact", len(digests))
    blocks = (np.arange(first, min(first + _READ, len(digests))) for first in range(0, len(digests), _READ))
    keys = ((digests[block, 0], block) for block in blocks)
    for first, second in _pairs(keys, len(digests), scratch):
        same = digests[first, 1] == digests[second, 1]
        earlier[second[same]] = first[same]  # the last pair has the group's first document, which stays
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
            for start in range(0, len(first), _VERIFIED):
                pair = first[start : start + _VERIFIED], second[start : start + _VERIFIED]
                similar = (minhashes[pair[0]] == minhashes[pair[1]]).mean(axis=1) >= options["threshold"]
                _write_pairs(pair[0][similar], pair[1][similar], scratch)
    return _resolve(documents, scratch)


def _write_pairs(earlier: np.ndarray, later: np.ndarray, scratch: Path) -> None:
    """Appends similar pairs to files, partitioned by the later document."""
    pairs = (later.astype(np.uint64) << 32) | earlier.astype(np.uint64)
    partitions = later // _RESOLVED
    for partition in np.unique(partitions).tolist():
        with (scratch / f"similar-{partition}").open("ab") as file:
            file.write(pairs[partitions == partition].tobytes())


def _resolve(documents: int, scratch: Path) -> np.ndarray:
    """Removes, in the corpus's order, what is similar to an earlier document that stays."""
    earlier = _map_minus_ones(scratch / "near", documents)
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
    """Yields (earlier, later), int64 of equal lengths: documents with equal keys, each with the few just before it,
    then with the group's first.

    `keys` are blocks of (keys uint64, documents), documents ascending; `documents` is an upper bound of their number;
    `scratch` takes 16 bytes per document.
    """
    parts = max(1, -(-documents // _SORTED))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((scratch / f"keys-{part}").open("w+b")) for part in range(parts)]
        for block, indices in keys:
            partition = (block >> 32) * parts >> 32
            rows = np.stack([block, indices.astype(np.uint64)], axis=1)
            for part, file in enumerate(files):
                file.write(rows[partition == part].tobytes())
        for file in files:
            file.seek(0)
            rows = np.empty((0, 2), np.uint64)
            # A key may have more documents than are sorted together: the first one is carried over.
            while (chunk := np.fromfile(file, np.uint64, 2 * _SORTED)).size:
                rows = np.concatenate([rows, chunk.reshape(-1, 2)])
                rows = rows[np.argsort(rows[:, 0], kind="stable")]
                indices = rows[:, 1].astype(np.int64)
                starts = np.flatnonzero(np.append(True, rows[1:, 0] != rows[:-1, 0]))
                rank = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
                for offset in range(1, _COMPARED + 1):
                    later = np.flatnonzero(rank >= offset)
                    yield indices[later - offset], indices[later]
                later = np.flatnonzero(rank > _COMPARED)
                yield indices[later - rank[later]], indices[later]
                rows = rows[starts]
