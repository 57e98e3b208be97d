"""Token stores: the documents of one task and split as flat arrays, read at random in O(1).

A store is a directory of one-dimensional zarr3 arrays and a manifest:

    tokens           uint16 or uint32 [N]     ids of all documents, one after the other
    offsets          int64 [documents + 1]    where each document begins in `tokens`, and N
    block_documents  int64 [ceil(N / 4096)]   the document that contains token 4096 * b
    loss_mask        uint8 [N]                1: a supervised target (chat only)
    id_bytes         uint8 [bytes of ids]     UTF-8 of all document ids, one after the other
    id_offsets       int64 [documents + 1]
    labels           uint16 [documents]       numbers of labels in the manifest (with a label field only)
    manifest.json                             written last: a directory without one is no store

A corpus is a few large files, locally or on gs://, and a random read of one row touches one or two
compressed chunks of one of them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.data.arrays import ArrayWriter, finish, open_array, read_spans
from lemur_jax.data.manifest import Manifest, read_manifest
from lemur_jax.text.tokenizer import Tokenizer, compatible

_PROGRESS = "progress.json"  # in a store that is being written
BLOCK = 4096  # tokens between two entries of `block_documents`
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
        unfinished = self._path / ".manifest.json"
        unfinished.write_text(json.dumps(dataclasses.asdict(self._manifest()), indent=2) + "\n")
        unfinished.rename(self._path / "manifest.json")


class TokenStore:
    """Reads a store; nothing is loaded but what is asked for. Opened by `open`.

    Attributes:
      path: where it is.
      manifest: its manifest.
    """

    def __init__(self, path: epath.Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        names = ["tokens", "offsets", "block_documents", "id_bytes", "id_offsets"]
        names += ["loss_mask"] * manifest.has_loss_mask + ["labels"] * bool(manifest.label_field)
        opening = {name: open_array(path / name) for name in names}
        try:
            self._arrays = {name: future.result() for name, future in opening.items()}
        except ValueError as error:
            raise UserError(
                f"the token store {path} is damaged; make it again with `lemur prepare --config ...`: {error}"
            ) from error

    @classmethod
    def open(cls, path: epath.PathLike, tokenizer: Tokenizer | None = None) -> "TokenStore":
        """Opens a store, for use with `tokenizer` if one is given.

        Raises:
          UserError: no whole store there, another format, an empty one, or one made with a
            tokenizer whose ids mean something else.
        """
        manifest = read_manifest(path)
        if tokenizer is not None:
            _check_tokenizer(path, manifest, tokenizer)
        if not manifest.documents:
            raise UserError(
                f"the token store {path} is empty: the task {manifest.task} has no documents in its"
                f" split {manifest.split}"
            )
        return cls(epath.Path(path), manifest)

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        return self.manifest.tokens

    def tokens(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens [start, start + length) for each of R spans, joined: uint16 or uint32 [sum of lengths]."""
        return self._spans("tokens", starts, lengths)

    def loss_mask(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The loss mask of the same spans: uint8 [sum of lengths]; needs `manifest.has_loss_mask`."""
        return self._spans("loss_mask", starts, lengths)

    def offsets(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Where each document begins, and the number of tokens: [first, stop) of int64 [documents + 1], in memory."""
        return finish(
            self._arrays["offsets"][first : self.num_documents + 1 if stop is None else stop].read()
        )

    def document_starts(
        self, starts: np.ndarray, stops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which documents touch each of R non-empty spans [start, stop) of the token stream.

        Returns:
          spans, documents, positions, int64 of one length: document `documents[k]` touches span
          `spans[k]` and begins at token `positions[k]`, which may lie before the span. Sorted by span,
          then by position.
        """
        blocks = self._arrays["block_documents"]
        after = (stops - 1) // BLOCK + 1  # the first block that begins at `stop` or later
        inside = after < blocks.shape[0]
        ends = np.full(len(stops), self.num_documents - 1)
        first, last = blocks[starts // BLOCK].read(), blocks[after[inside]].read()
        first, ends[inside] = finish(first), finish(last)
        counts = ends - first + 1
        # One offset more than documents: where each one ends.
        bounds = self._spans("offsets", first, counts + 1)
        tail = np.cumsum(counts + 1) - 1
        begins, finishes = np.delete(bounds, tail), np.delete(bounds, tail - counts)
        spans = np.repeat(np.arange(len(starts)), counts)
        documents = np.arange(len(spans)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        touch = (finishes > starts[spans]) & (begins < stops[spans])
        return spans[touch], documents[touch], begins[touch]

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of a document, and its loss mask if the store has one."""
        start, stop = finish(self._arrays["offsets"][index : index + 2].read())
        span = np.array([start]), np.array([stop - start])
        return self.tokens(*span), self.loss_mask(*span) if self.manifest.has_loss_mask else None

    def read_documents(
        self, indices: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray] | list[None], list[str]]:
        """Ids, loss masks (None in a store without) and names of documents."""
        starts, lengths = self._bounds("offsets", indices)
        cuts = np.cumsum(lengths)[:-1]
        masks: list[np.ndarray] | list[None] = [None] * len(indices)
        if self.manifest.has_loss_mask:
            masks = np.split(self.loss_mask(starts, lengths), cuts)
        return np.split(self.tokens(starts, lengths), cuts), masks, self.document_ids(indices)

    def document_ids(self, indices: np.ndarray) -> list[str]:
        """Names of documents."""
        starts, lengths = self._bounds("id_offsets", indices)
        names = self._spans("id_bytes", starts, lengths).tobytes()
        ends = np.cumsum(lengths)
        pairs = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        return [names[start:end].decode() for start, end in pairs]

    def document_id(self, index: int) -> str:
        return self.document_ids(np.array([index]))[0]

    def documents_of(self, label: str, first: int, stop: int) -> np.ndarray:
        """Which of the documents [first, stop) have a label: int64; needs `manifest.label_field`."""
        numbers = finish(self._arrays["labels"][first : min(stop, self.num_documents)].read())
        return first + np.flatnonzero(numbers == self.manifest.labels[label]["number"])

    def labels_of(self, indices: np.ndarray) -> list[str]:
        """Labels of documents; "" in a store without."""
        if not self.manifest.label_field:
            return [""] * len(indices)
        names = {of_label["number"]: label for label, of_label in self.manifest.labels.items()}
        numbers = self._spans("labels", indices, np.ones(len(indices), np.int64))
        return [names[number] for number in numbers.tolist()]

    def _bounds(self, name: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, length) of documents by an array of offsets."""
        one = np.ones(len(indices), np.int64)
        starts, stops = (self._spans(name, np.asarray(indices) + end, one) for end in (0, 1))
        return starts, stops - starts

    def _spans(self, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return read_spans(self._arrays[name], starts, lengths)


def _check_tokenizer(path: epath.PathLike, manifest: Manifest, tokenizer: Tokenizer) -> None:
    if compatible(tokenizer, manifest.tokenizer_digest, manifest.added_tokens):
        return
    theirs, ours = manifest.tokenizer_digest[:8], tokenizer.digest[:8]
    odd = sorted(manifest.added_tokens.items() - tokenizer.added_tokens.items(), key=lambda pair: pair[1])
    more = f", and its control token {odd[0][0]} has id {odd[0][1]}" if odd and theirs == ours else ""
    raise UserError(
        f"the token store {path} was made with the tokenizer {theirs}{more}; the one given is {ours}"
        f"{' without that' if more else ''}: point tokenizer.path at the one that made it, or make the store"
        " again with `lemur prepare --config ...`"
    )
