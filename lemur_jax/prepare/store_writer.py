"""Writes token stores (`data/store.py` describes the files)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import write_json, write_sealed
from lemur_jax.data.arrays import ArrayWriter, metadata_digest, open_array
from lemur_jax.data.manifest import Manifest
from lemur_jax.data.store import BLOCK, TokenStore

_PROGRESS = "progress.json"  # in a store that is being written
MAX_LABELS = 1000


class StoreWriter:
    """Writes one store, document by document, and puts it in place when it is complete.

    with StoreWriter(path, Manifest(task=..., ...)) as writer:
        writer.add(ids, id="doc-1", n_bytes=123)

    The store is written to a hidden directory beside `path` and renamed at the end of the `with` block. An exception
    in the block leaves the old store at `path` unchanged, and keeps only what was saved.

    Args:
      path: the store's directory.
      manifest: with no counts yet.
      draft: makes this a draft, from which another store is written and which is deleted at the end: names and
        dtypes of its additional arrays, which `append` fills.

    Attributes:
      manifest: as given.
      saved: the last argument of `save`, also from an interrupted attempt with the same manifest, which this one
        continues; None: nothing was saved.
      documents: number of documents added.
      is_draft: whether it is a draft.
    """

    def __init__(self, path: epath.PathLike, manifest: Manifest, draft: Mapping[str, str] | None = None):
        self._path = epath.Path(path)
        self._draft, self.is_draft = draft, draft is not None
        self.manifest = manifest
        # Each attempt uses the same name, so that it removes what a killed one left.
        self._partial = self._path.parent / f".{self._path.name}.{'partial' if draft is None else 'draft'}"
        self._counts: dict[str, Any] = dict.fromkeys(
            ("documents", "tokens", "bytes", "supervised_tokens", "id_bytes"), 0
        )
        self._counts["labels"] = {}
        self.saved: Any = None

    @property
    def documents(self) -> int:
        return self._counts["documents"]

    def __enter__(self) -> "StoreWriter":
        lengths: dict[str, int] = {}
        if (self._partial / _PROGRESS).exists():
            progress = json.loads((self._partial / _PROGRESS).read_text())
            if progress["manifest"] == dataclasses.asdict(self.manifest):
                self._counts, lengths, self.saved = (progress[key] for key in ("counts", "lengths", "state"))
        if not lengths:
            if self._partial.exists():
                self._partial.rmtree()
            self._partial.mkdir(parents=True)
        dtypes = {"tokens": "uint16" if self.manifest.vocab_size <= 1 << 16 else "uint32", "offsets": "int64"}
        dtypes |= {"block_documents": "int64", "id_bytes": "uint8", "id_offsets": "int64"}
        if self.manifest.has_loss_mask:
            dtypes["loss_mask"] = "uint8"
        if self.manifest.label_field:
            dtypes["labels"] = "uint16"
        dtypes |= self._draft or {}
        self._arrays = {
            name: ArrayWriter(self._partial / name, dtype, lengths.get(name))
            for name, dtype in dtypes.items()
        }
        if not lengths:
            self._arrays["offsets"].append([0])
            self._arrays["id_offsets"].append([0])
        return self

    def save(self, state: Any) -> None:
        """Saves the documents added so far and `state` (JSON) for a later attempt."""
        lengths = {name: array.save() for name, array in self._arrays.items()}
        manifest = dataclasses.asdict(self.manifest)
        progress = {"manifest": manifest, "counts": self._counts, "lengths": lengths, "state": state}
        write_json(self._partial / _PROGRESS, progress)
        self.saved = state

    def add(
        self,
        ids: Sequence[int] | np.ndarray,
        id: str,
        n_bytes: int,
        mask: Sequence[int] | np.ndarray | None = None,
        label: str = "",
    ) -> None:
        """Appends a document of n > 0 token ids, with bos and eos, and `n_bytes` UTF-8 bytes of text.

        `mask` [n], 1 on supervised targets, is for a store with a loss mask, `label` for one with a label field. Raises
        ValueError for no tokens, an id outside the vocabulary, or a mask that does not fit; UserError for more than
        `MAX_LABELS` labels.
        """
        tokens, vocab_size = np.asarray(ids), self.manifest.vocab_size
        if not tokens.size or tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(f"document {id!r}: no tokens, or one outside [0, {vocab_size})")
        wanted = tokens.size if self.manifest.has_loss_mask else None
        if (None if mask is None else len(mask)) != wanted:
            raise ValueError(f"document {id!r}: the loss mask must have {wanted} entries")
        counts = self._counts
        start, stop = counts["tokens"], counts["tokens"] + tokens.size
        blocks = -(-stop // BLOCK) - -(-start // BLOCK)  # multiples of BLOCK in [start, stop)
        self._arrays["tokens"].append(tokens)
        self._arrays["offsets"].append([stop])
        if blocks:
            self._arrays["block_documents"].append(np.full(blocks, counts["documents"]))
        if mask is not None:
            mask = np.asarray(mask, np.uint8)
            self._arrays["loss_mask"].append(mask)
        # The first token of a document is never a target.
        counts["supervised_tokens"] += tokens.size - 1 if mask is None else int(np.sum(mask[1:] == 1))
        name = np.frombuffer(id.encode(), np.uint8)
        counts["id_bytes"] += name.size
        self._arrays["id_bytes"].append(name)
        self._arrays["id_offsets"].append([counts["id_bytes"]])
        if self.manifest.label_field:
            self._add_label(label, n_bytes)
        counts["tokens"] = stop
        counts["documents"] += 1
        counts["bytes"] += n_bytes

    def copy(self, store: TokenStore, documents: np.ndarray, n_bytes: Sequence[int]) -> None:
        """Appends documents of another store, with their names, masks and labels; `n_bytes`: of each."""
        columns = (*store.read_documents(documents), n_bytes, store.labels_of(documents))
        for ids, mask, name, size, label in zip(*columns, strict=True):
            self.add(ids, name, size, mask, label)

    def append(self, name: str, values: Sequence[int] | np.ndarray) -> None:
        """Appends to an additional array of a draft."""
        self._arrays[name].append(values)

    def read_saved(self) -> tuple["TokenStore", dict[str, Any]]:
        """A draft's saved store and its additional arrays (TensorStore); nothing can be added afterwards."""
        self._arrays = {}  # frees their buffers
        arrays = {name: open_array(self._partial / name, cache=False).result() for name in self._draft or ()}
        return TokenStore(self._partial, self._finished_manifest()), arrays

    def _finished_manifest(self, arrays: Mapping[str, str] | None = None) -> Manifest:
        counts = {key: value for key, value in self._counts.items() if key != "id_bytes"}
        return dataclasses.replace(self.manifest, **counts, arrays=arrays or {})

    def _add_label(self, label: str, n_bytes: int) -> None:
        labels = self._counts["labels"]
        entry = labels.setdefault(label, {"number": len(labels), "documents": 0, "bytes": 0})
        if len(labels) > MAX_LABELS:
            raise UserError(
                f"the metadata field {self.manifest.label_field!r} of the task {self.manifest.task} has more than"
                f" {MAX_LABELS:,} values: choose one with few values, such as the language"
            )
        entry["documents"] += 1
        entry["bytes"] += n_bytes
        self._arrays["labels"].append([entry["number"]])

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None and not self.is_draft:
                for array in self._arrays.values():
                    array.close()
                self._commit()
        finally:
            done = kind is None or not (self._partial / _PROGRESS).exists()
            if self._partial.exists() and done:
                self._partial.rmtree()

    def _commit(self) -> None:
        (self._partial / _PROGRESS).unlink(missing_ok=True)
        if self._path.exists():
            self._path.rmtree()
        self._partial.rename(self._path)
        # The manifest is written last: on gs:// the rename copies file by file.
        arrays = {name: metadata_digest(self._path / name) for name in self._arrays}
        manifest = self._finished_manifest(arrays=arrays)
        write_sealed(self._path / "manifest.json", dataclasses.asdict(manifest))
