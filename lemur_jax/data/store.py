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
"""

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.data.arrays import finish, map_array, open_array, read_bounds, read_spans
from lemur_jax.data.manifest import REJECTED, Manifest, read_manifest
from lemur_jax.text.tokenizer import Tokenizer, compatible

BLOCK = 4096  # tokens between two entries of `block_documents`
_PAIRED = 1000  # documents that `has_pairs` reads at once
_VERIFIED = 1 << 24  # elements that `verify` reads at a time


class TokenStore:
    """Reads a store; opened by `open`."""

    def __init__(self, path: epath.Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        names = ["tokens", "offsets", "block_documents", "id_bytes", "id_offsets"]
        names += ["loss_mask"] * manifest.has_loss_mask + ["labels"] * bool(manifest.label_field)
        digests = manifest.arrays
        try:
            futures = {name: open_array(path / name, digest=digests.get(name, "")) for name in names}
            self._arrays = {name: future.result() for name, future in futures.items()}
        except (ValueError, AttributeError) as error:  # the second: metadata that is JSON but no object
            raise UserError(
                f"the token store {path} is damaged; make it again with `lemur prepare --config ...`:"
                f" {reason_of(error)}"
            ) from error

    @classmethod
    def open(cls, path: epath.PathLike, tokenizer: Tokenizer | None = None) -> "TokenStore":
        """Opens a store, for use with `tokenizer` if one is given.

        Raises UserError: no whole store there, another format, an empty one, or one made with a tokenizer whose ids
        mean something else.
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
        """Tokens [start, start + length) for each of R spans, joined: uint16 or uint32 [sum of lengths].

        Raises UserError: the store is damaged, or has an id outside its vocabulary.
        """
        ids = self._spans("tokens", starts, lengths)
        if ids.size and ids.max() >= self.manifest.vocab_size:
            raise UserError(
                f"the token store {self.path} has the id {ids.max()}, its vocabulary {self.manifest.vocab_size:,}"
                " tokens: it is damaged; make it again with `lemur prepare --config ...`"
            )
        return ids

    def loss_mask(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The loss mask of the same spans: uint8 [sum of lengths]; needs `manifest.has_loss_mask`."""
        return self._spans("loss_mask", starts, lengths)

    def offsets(self) -> np.ndarray:
        """Where each document begins, then the count of tokens: int64 [documents + 1]."""
        return finish(self._arrays["offsets"][: self.num_documents + 1].read())

    def map_offsets(self, path: epath.PathLike) -> np.ndarray:
        """The offsets, mapped from a new local file."""
        return map_array(path, self._arrays["offsets"], (self.num_documents + 1,))

    def verify(self) -> None:
        """Reads the whole store once; UserError: a file is missing or damaged, or an id lies outside the vocabulary."""
        for start in range(0, self.num_tokens, _VERIFIED):
            self.tokens(np.array([start]), np.array([min(_VERIFIED, self.num_tokens - start)]))
        for name, array in self._arrays.items():
            if name != "tokens":
                for start in range(0, array.shape[0], _VERIFIED):
                    finish(array[start : min(start + _VERIFIED, array.shape[0])].read())

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
        next_block = (stops - 1) // BLOCK + 1  # the first block that begins at `stop` or later
        in_range = next_block < blocks.shape[0]
        ends = np.full(len(stops), self.num_documents - 1)
        first, last = blocks[starts // BLOCK].read(), blocks[next_block[in_range]].read()
        first, ends[in_range] = finish(first), finish(last)
        counts = ends - first + 1
        bounds = self._spans("offsets", first, counts + 1)
        tail = np.cumsum(counts + 1) - 1
        begins, finishes = np.delete(bounds, tail), np.delete(bounds, tail - counts)
        spans = np.repeat(np.arange(len(starts)), counts)
        documents = np.arange(len(spans)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        touch = (finishes > starts[spans]) & (begins < stops[spans])
        return spans[touch], documents[touch], begins[touch]

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of a document, and its loss mask if the store has one."""
        ids, masks, _ = self.read_documents(np.array([index]))
        return ids[0], masks[0]

    def read_documents(
        self, indices: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray] | list[None], list[str]]:
        """Ids, loss masks (None in a store without) and names of documents."""
        starts, lengths = read_bounds(self._arrays["offsets"], indices)
        cuts = np.cumsum(lengths)[:-1]
        masks: list[np.ndarray] | list[None] = [None] * len(indices)
        if self.manifest.has_loss_mask:
            masks = np.split(self.loss_mask(starts, lengths), cuts)
        return np.split(self.tokens(starts, lengths), cuts), masks, self.document_ids(indices)

    def document_ids(self, indices: np.ndarray) -> list[str]:
        """Names of documents."""
        starts, lengths = read_bounds(self._arrays["id_offsets"], indices)
        names = self._spans("id_bytes", starts, lengths).tobytes()
        ends = np.cumsum(lengths)
        pairs = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        return [names[start:end].decode() for start, end in pairs]

    def has_pairs(self) -> bool:
        """Whether a document is a chosen and a rejected conversation; of a store of preferences."""
        for start in range(0, self.num_documents, _PAIRED):
            documents = np.arange(start, min(start + _PAIRED, self.num_documents))
            starts, lengths = read_bounds(self._arrays["offsets"], documents)
            mask = self.loss_mask(starts, lengths)
            if (np.delete(mask, starts - starts[0]) == REJECTED).any():
                return True
        return False

    def documents_of(self, label: str, first: int, stop: int) -> np.ndarray:
        """Which of the documents [first, stop) have a label: int64; needs `manifest.label_field`."""
        numbers = finish(self._arrays["labels"][first : min(stop, self.num_documents)].read())
        return first + np.flatnonzero(numbers == self.manifest.labels[label]["number"])

    def labels_of(self, indices: np.ndarray) -> list[str]:
        """Labels of documents; "" in a store without."""
        if not self.manifest.label_field:
            return [""] * len(indices)
        names = {entry["number"]: label for label, entry in self.manifest.labels.items()}
        numbers = self._spans("labels", indices, np.ones(len(indices), np.int64))
        return [names[number] for number in numbers.tolist()]

    def _spans(self, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return read_spans(self._arrays[name], starts, lengths)


def _check_tokenizer(path: epath.PathLike, manifest: Manifest, tokenizer: Tokenizer) -> None:
    if compatible(tokenizer, manifest.tokenizer_digest, manifest.added_tokens):
        return
    stored, current = manifest.tokenizer_digest[:8], tokenizer.digest[:8]
    odd = sorted(manifest.added_tokens.items() - tokenizer.added_tokens.items(), key=lambda pair: pair[1])
    more = f", and its control token {odd[0][0]} has id {odd[0][1]}" if odd and stored == current else ""
    raise UserError(
        f"the token store {path} was made with the tokenizer {stored}{more}; the one given is {current}"
        f"{' without that' if more else ''}: point tokenizer.path at the one that made it, or make the store"
        " again with `lemur prepare --config ...`"
    )
