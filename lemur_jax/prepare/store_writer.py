"""Writes token stores (`data/store.py` describes the files)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.data.arrays import ArrayWriter, metadata_digest, open_array
from lemur_jax.data.manifest import FORMAT_VERSION, Manifest, write_sealed
from lemur_jax.data.store import BLOCK, TokenStore

_PROGRESS = "progress.json"  # in a store that is being written
MAX_LABELS = 1000


class StoreWriter:
    """Writes one store, document by document, and puts it in place when whole.

    with StoreWriter(path, task=..., ...) as writer:
        writer.add(ids, id="doc-1", n_bytes=123)

    It is written beside `path` under another name and renamed at the end of the `with` block; an
    exception in the block leaves what lay at `path` before as it was, and nothing else behind but what
    was saved. A draft, from which another store is written, is removed at the end of the block instead.

    Args:
      draft: for a draft, its arrays besides a store's, which `append` fills: dtypes by name.

    Attributes:
      saved: what was given to `save` by an attempt that did not come to its end and was to write the
        same store: this one goes on from there. None: it begins anew.
      documents: how many were added.
      has_saved: whether `save` was called, in this attempt or one that it goes on from.
      fields: of the manifest, counts apart.
      is_draft: whether it is a draft.
    """

    def __init__(
        self,
        path: epath.PathLike,
        *,
        task: str,
        split: str,
        source: str,
        tokenizer_digest: str,
        added_tokens: Mapping[str, int],
        vocab_size: int,
        has_loss_mask: bool = False,
        task_digest: str = "",
        input_digest: str = "",
        label_field: str = "",
        draft: Mapping[str, str] | None = None,
    ):
        self._path = epath.Path(path)
        self._draft = draft
        # One name for every attempt: the next one clears what a killed one left.
        self._partial = self._path.parent / f".{self._path.name}.{'partial' if draft is None else 'draft'}"
        self._vocab_size = vocab_size
        self._has_loss_mask = has_loss_mask
        self.fields = {
            "format_version": FORMAT_VERSION,
            "task": task,
            "split": split,
            "source": source,
            "tokenizer_digest": tokenizer_digest,
            "added_tokens": dict(added_tokens),
            "vocab_size": vocab_size,
            "has_loss_mask": has_loss_mask,
            "task_digest": task_digest,
            "input_digest": input_digest,
            "label_field": label_field,
        }
        self._counts: dict[str, Any] = dict.fromkeys(
            ("documents", "tokens", "bytes", "supervised_tokens", "id_bytes"), 0
        )
        self._counts["labels"] = {}
        self.saved: Any = None

    @property
    def documents(self) -> int:
        return self._counts["documents"]

    @property
    def is_draft(self) -> bool:
        return self._draft is not None

    @property
    def has_saved(self) -> bool:
        return self.saved is not None

    def __enter__(self) -> "StoreWriter":
        lengths: dict[str, int] = {}
        if (self._partial / _PROGRESS).exists():
            progress = json.loads((self._partial / _PROGRESS).read_text())
            if progress["fields"] == self.fields:
                self._counts, lengths, self.saved = (progress[key] for key in ("counts", "lengths", "state"))
        if not lengths:
            if self._partial.exists():
                self._partial.rmtree()
            self._partial.mkdir(parents=True)
        dtypes = {"tokens": "uint16" if self._vocab_size <= 1 << 16 else "uint32", "offsets": "int64"}
        dtypes |= {"block_documents": "int64", "id_bytes": "uint8", "id_offsets": "int64"}
        if self._has_loss_mask:
            dtypes["loss_mask"] = "uint8"
        if self.fields["label_field"]:
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
        """Makes sure that a later attempt finds the documents added so far, and `state` (JSON)."""
        lengths = {name: array.save() for name, array in self._arrays.items()}
        progress = {"fields": self.fields, "counts": self._counts, "lengths": lengths, "state": state}
        unfinished = self._partial / f".{_PROGRESS}"
        unfinished.write_text(json.dumps(progress))
        unfinished.replace(self._partial / _PROGRESS)
        self.saved = state

    def add(
        self,
        ids: Sequence[int] | np.ndarray,
        id: str,
        n_bytes: int,
        mask: Sequence[int] | np.ndarray | None = None,
        label: str = "",
    ) -> None:
        """Appends a document.

        Args:
          ids: all its tokens, bos and eos included; at least one.
          id: its name, shown to the user.
          n_bytes: UTF-8 bytes of the text that it stands for.
          mask: for a store with a loss mask, 1 for each token that is a supervised target.
          label: for a store with a label field, its value.

        Raises:
          ValueError: no tokens, an id outside the vocabulary, or a mask that does not fit.
          UserError: more than `MAX_LABELS` labels.
        """
        tokens = np.asarray(ids)
        if not tokens.size or tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(f"document {id!r}: no tokens, or one outside [0, {self._vocab_size})")
        if (mask is not None) != self._has_loss_mask or (mask is not None and len(mask) != tokens.size):
            raise ValueError(
                f"document {id!r}: a loss mask of {tokens.size} entries is wanted if has_loss_mask, else none"
            )
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
        # A document's first token has nothing before it to be predicted from.
        counts["supervised_tokens"] += tokens.size - 1 if mask is None else int(np.count_nonzero(mask[1:]))
        name = np.frombuffer(id.encode(), np.uint8)
        counts["id_bytes"] += name.size
        self._arrays["id_bytes"].append(name)
        self._arrays["id_offsets"].append([counts["id_bytes"]])
        if self.fields["label_field"]:
            self._add_label(label, n_bytes)
        counts["tokens"] = stop
        counts["documents"] += 1
        counts["bytes"] += n_bytes

    def append(self, name: str, values: Sequence[int] | np.ndarray) -> None:
        """Appends to an array of a draft."""
        self._arrays[name].append(values)

    def read_saved(self) -> tuple["TokenStore", dict[str, Any]]:
        """Of a draft, the store and the other arrays (TensorStore's) as they were saved; nothing more can be added."""
        self._arrays = {}  # and their buffers
        arrays = {name: open_array(self._partial / name, cache=False).result() for name in self._draft or ()}
        return TokenStore(self._partial, self._manifest()), arrays

    def _manifest(self) -> Manifest:
        counts = {key: value for key, value in self._counts.items() if key != "id_bytes"}
        return Manifest(**self.fields, **counts)

    def _add_label(self, label: str, n_bytes: int) -> None:
        labels = self._counts["labels"]
        of_label = labels.setdefault(label, {"number": len(labels), "documents": 0, "bytes": 0})
        if len(labels) > MAX_LABELS:
            raise UserError(
                f"the metadata field {self.fields['label_field']!r} of the task {self.fields['task']} has more than"
                f" {MAX_LABELS:,} values: documents can be told apart by language or the like, not by this"
            )
        of_label["documents"] += 1
        of_label["bytes"] += n_bytes
        self._arrays["labels"].append([of_label["number"]])

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None and self._draft is None:
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
        # After the rename, which on gs:// copies file by file: a reader sees a manifest only when
        # everything else is there.
        arrays = {name: metadata_digest(self._path / name) for name in self._arrays}
        manifest = dataclasses.replace(self._manifest(), arrays=arrays)
        write_sealed(self._path / "manifest.json", dataclasses.asdict(manifest))
