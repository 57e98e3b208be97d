"""The manifest of a token store: what is in it and what it was made from."""

import dataclasses
import json
from collections.abc import Mapping

from etils import epath

import lemur_jax
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.json_files import digest_of, read_sealed

_SHOWN_LABELS = 20

FORMAT_VERSION = 2
REJECTED = 2  # in a loss mask, whose other values are 0 and 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`, apart from its seal."""

    format_version: int = FORMAT_VERSION
    task: str
    split: str
    source: str
    documents: int = 0
    tokens: int = 0  # separators included
    bytes: int = 0  # UTF-8 bytes of the text that the tokens stand for
    supervised_tokens: int = 0  # targets with loss: those of the mask, else all but each document's first
    has_loss_mask: bool = False
    # a document is a chosen conversation, a rejected one, or both in this order; the mask is `REJECTED` where the
    # rejected one begins
    preferences: bool = False
    tokenizer_digest: str  # of the tokenizer that made it
    added_tokens: Mapping[str, int]
    vocab_size: int
    task_digest: str = ""  # of the task's definition
    input_digest: str = ""  # of the data it read
    label_field: str = ""  # the metadata field whose value is each document's label; "": they have none
    # for each label its number, and how many documents and bytes have it
    labels: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    created_with: str = f"lemur_jax {lemur_jax.__version__}"
    # sha256 (hex) of each array's `zarr.json`, by the array's name
    arrays: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 (hex) of what determines the tokens, independent of program version and storage format."""
        fields = dataclasses.asdict(self)
        del fields["created_with"], fields["arrays"]
        fields["format_version"] = 1  # so that a run that began with a store of format 1 can continue
        if not self.preferences:  # the same with or without these fields
            del fields["preferences"]
        if not self.label_field:
            del fields["label_field"], fields["labels"]
        return digest_of(fields)


def read_manifest(path: epath.PathLike) -> Manifest:
    """The manifest of a store; UserError: there is no whole store of this format at `path`."""
    directory = epath.Path(path)
    file = directory / "manifest.json"
    if not file.exists():
        below = [*directory.glob("*/manifest.json"), *directory.glob("*/*/manifest.json")]
        stores = sorted(str(child.parent.relative_to(directory)) for child in below)
        if stores:
            names = " or ".join(stores[:_SHOWN_LABELS])
            raise UserError(f"{path} is no token store but has some in it: name {names} as well")
        state = "is none, or unfinished (it has no manifest.json)" if directory.exists() else "does not exist"
        raise UserError(f"the token store {path} {state}: make it with `lemur prepare --config ...`")
    remake = "make it again with `lemur prepare --config ...`"
    try:
        version = json.loads(file.read_text())["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"the token store {path} has format version {version}, this program reads {FORMAT_VERSION}: {remake}"
            )
        return Manifest(**read_sealed(file))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({reason_of(error)}): {remake}") from error


def describe_labels(manifest: Manifest) -> str:
    """The labels with most documents, for people."""
    labels = manifest.labels
    top = sorted(labels, key=lambda label: (-labels[label]["documents"], label))
    text = ", ".join(f"{label or '(none)'} {labels[label]['documents']:,}" for label in top[:_SHOWN_LABELS])
    return text + (f" and {len(top) - _SHOWN_LABELS:,} more" if len(top) > _SHOWN_LABELS else "")
