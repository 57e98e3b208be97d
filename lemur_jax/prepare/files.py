"""Files as the documents of a task: which files each split reads, and which of their documents."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import local_file
from lemur_jax.prepare import readers
from lemur_jax.prepare.fields import Document, Fields, is_held_out, to_documents
from lemur_jax.prepare.readers import BadRow, Row

# Reads a file whose format is not one of `readers.read_rows`.
ReadRows = Callable[[str], Iterator[tuple[str, Row | BadRow]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a task.

    Raises UserError: an unknown format; when read, no matching file, or a name without a known format.
    """

    patterns: Mapping[str, str | Sequence[str]]  # globs or directories for "train" and perhaps "validation"
    fields: Fields
    kind: str = ""  # a name in `readers.FORMATS`; "": by each file's name
    held_out: float = 0.0  # share of documents in the validation split if `patterns` has none
    max_bytes: int = readers.MAX_BYTES  # longer lines, elements of arrays and text files are refused

    def __post_init__(self) -> None:
        if self.kind and self.kind not in readers.FORMATS:
            raise UserError(f"there is no format {self.kind!r}; there are {', '.join(readers.FORMATS)}")

    @property
    def splits(self) -> tuple[str, ...]:
        return (*self.patterns, *["validation"] * self._divides)

    @property
    def _divides(self) -> bool:
        """Whether both splits read the same files."""
        return bool(self.held_out) and "validation" not in self.patterns

    def list(self, split: str) -> list[str]:
        """The files of a split, sorted."""
        patterns = self.patterns[split if split in self.patterns else "train"]
        files = readers.find_files(patterns)
        if not files:
            raise UserError(f"no file matches {patterns} (split {split})")
        for file in files if not self.kind else ():
            readers.format_of(file)
        return files

    def documents(
        self, split: str, files: Sequence[str], other: Mapping[str, ReadRows]
    ) -> Iterator[Document]:
        """The documents of some files of a split.

        `other` has functions for formats that `readers.read_rows` does not read.
        """
        for file in files:
            kind, local = self.kind or readers.format_of(file), local_file(file)
            if kind in other:
                rows = other[kind](local)
            else:
                rows = readers.read_rows(local, kind, self._columns(), self.max_bytes)
            for document, key in to_documents(file, rows, self.fields):
                if not self._divides or is_held_out(key, self.held_out) == (split == "validation"):
                    yield document

    def _columns(self) -> Sequence[str] | None:
        """The Parquet columns to read; None: all."""
        fields = self.fields
        if fields.content != "text":
            return None
        names = (fields.text, fields.id, fields.group, *fields.meta)
        return sorted({part for name in names if name for part in (name, name.partition(".")[0])})
