"""What a token store says of itself."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from etils import epath

import lemur_jax
from lemur_jax.common.errors import UserError, reason_of

_SHOWN_LABELS = 20

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store says of itself; the content of `manifest.json`.

    Attributes:
      documents, tokens: counts; tokens include bos and eos.
      bytes: UTF-8 bytes of the text that the tokens stand for.
      supervised_tokens: targets with loss: those of the mask, else all but each document's first.
      tokenizer_digest, added_tokens, vocab_size: of the tokenizer that made it.
      task_digest, input_digest: of the task's definition and of the data it read.
      label_field: the metadata field whose value is each document's label; "": they have none.
      labels: for each label its number, and how many documents and bytes have it.
      created_with: the program and its version.
    """

    format_version: int = FORMAT_VERSION
    task: str
    split: str
    source: str
    documents: int
    tokens: int
    bytes: int
    supervised_tokens: int
    has_loss_mask: bool
    tokenizer_digest: str
    added_tokens: Mapping[str, int]
    vocab_size: int
    task_digest: str = ""
    input_digest: str = ""
    label_field: str = ""
    labels: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    created_with: str = f"lemur_jax {lemur_jax.__version__}"

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything but the program's version: changes when the content does."""
        fields = dataclasses.asdict(self)
        del fields["created_with"]
        if not self.label_field:  # the same with or without these fields
            del fields["label_field"], fields["labels"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(path: epath.PathLike) -> Manifest:
    """The manifest of a store.

    Raises:
      UserError: there is no whole store of this format at `path`.
    """
    directory = epath.Path(path)
    file = directory / "manifest.json"
    if not file.exists():
        inside = sorted(found.parent.name for found in directory.glob("*/manifest.json"))
        if inside:
            raise UserError(
                f"{path} is no token store but has some in it: name {' or '.join(inside)} as well"
            )
        what = "is unfinished (it has no manifest.json)" if directory.exists() else "does not exist"
        raise UserError(f"the token store {path} {what}: make it with `lemur prepare --config ...`")
    remake = "make it again with `lemur prepare --config ...`"
    try:
        fields = json.loads(file.read_text())
        version = fields["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({reason_of(error)}): {remake}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"the token store {path} has format version {version}, this program reads {FORMAT_VERSION}: {remake}"
        )
    try:
        return Manifest(**fields)
    except TypeError as error:
        raise UserError(f"{file} is damaged ({error}): {remake}") from error


def describe_labels(manifest: Manifest) -> str:
    """The labels with most documents, for people."""
    labels = manifest.labels
    most = sorted(labels, key=lambda label: (-labels[label]["documents"], label))
    shown = ", ".join(f"{label or '(none)'} {labels[label]['documents']:,}" for label in most[:_SHOWN_LABELS])
    return shown + (f" and {len(most) - _SHOWN_LABELS:,} more" if len(most) > _SHOWN_LABELS else "")
