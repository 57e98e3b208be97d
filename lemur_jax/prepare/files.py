"""Files as the documents of a task: which files each split reads, and which of their documents."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from lemur_jax.common.errors import UserError
from lemur_jax.common.hub import local_file
from lemur_jax.prepare import readers
from lemur_jax.prepare.fields import Document, Fields, is_held_out, to_documents
from lemur_jax.prepare.readers import Rows

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a task.

    Raises UserError: an unknown format, or no share; when read, no matching file, or a name without a known format.
    """

    patterns: Mapping[str, str | Sequence[str]]  # globs or directories for "train" and perhaps "validation"
    fields: Fields
    kind: str = ""  # a name in `readers.FORMATS`; "": by each file's name
    held_out: float = 0.0  # share of documents in the validation split if `patterns` has none
    max_bytes: int = readers.MAX_BYTES  # longer lines, elements of arrays and text files are refused

    def __post_init__(self) -> None:
        if self.kind and self.kind not in readers.FORMATS:
            raise UserError(f"there is no format {self.kind!r}; there are {', '.join(readers.FORMATS)}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}: it must be a share, 0 or more and below 1")
        if self.held_out and "validation" in self.patterns:
            raise UserError("held_out has no effect beside files of the validation split: leave one out")

    @property
    def splits(self) -> tuple[str, ...]:
        return (*self.patterns, *["validation"] * self.divides)

    @property
    def divides(self) -> bool:
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
        if split == "validation" and not self.divides:
            shared = sorted(set(files) & set(readers.find_files(self.patterns.get("train", ()))))
            if shared:
                logger.warning("held-out files that are trained on too: %d, e.g. %s", len(shared), shared[0])
        return files

    def documents(
        self, split: str, files: Sequence[str], read_tfrecord: Callable[[str], Rows] | None = None
    ) -> Iterator[Document]:
        """The documents of some files of a split.

        `read_tfrecord` needs TensorFlow, which this module does not import.
        """
        for file in files:
            kind, local = self.kind or readers.format_of(file), local_file(file)
            if kind == "tfrecord" and read_tfrecord:
                rows = read_tfrecord(local)
            else:
                rows = readers.read_rows(local, kind, *self._columns(), self.max_bytes)
            for document, key in to_documents(file, rows, self.fields):
                if not self.divides or is_held_out(key, self.held_out) == (split == "validation"):
                    yield document

    def _columns(self) -> tuple[Sequence[str] | None, Sequence[str]]:
        """The Parquet columns to read, None: all; and the fields that each file must have."""
        fields = self.fields
        required = [name for name in (fields.id, fields.group, fields.gather) if name]
        if fields.content != "text":
            return None, required
        required = [fields.text, *required]
        names = (*required, *fields.meta)
        return sorted({column for name in names for column in (name, name.partition(".")[0])}), required
