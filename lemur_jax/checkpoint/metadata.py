"""The `metadata` item of a checkpoint: model, config, tokenizer, and shape, dtype and digest of every leaf, sealed."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import digest_of

FORMAT = 2


class Damaged(UserError):
    """A checkpoint is not what was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf as it was saved; `digest` as in `checkpoint.digest`."""

    shape: tuple[int, ...]
    dtype: str
    digest: int


def make_metadata(
    *,
    model: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `metadata` item as plain JSON, without the leaves, which `seal` adds.

    `tokenizer_files` are contents by file name, `config` is None for imported weights, and `data` has the digests of
    the stores that the run reads.
    """
    return {
        "format": FORMAT,
        "model": dict(model),
        "tokenizer": {name: base64.b64encode(data).decode() for name, data in tokenizer_files.items()},
        "config": None if config is None else dict(config),
        "data": dict(data or {}),
    }


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files in a `metadata` item, by name."""
    return {name: base64.b64decode(data) for name, data in metadata["tokenizer"].items()}


def seal(metadata: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Leaf]]) -> dict[str, Any]:
    """The metadata of `make_metadata` with its leaves, by item and name, and a SHA-256 of both."""
    described = {
        item: {name: dataclasses.asdict(leaf) for name, leaf in tree.items()} for item, tree in leaves.items()
    }
    content = json.loads(json.dumps({**metadata, "leaves": described}))  # tuples become lists, as when read
    return {**content, "seal": digest_of(content)}


def unseal(content: Any, where: str) -> dict[str, Any]:
    """The inverse of `seal`, with `leaves` as `Leaf`s; Damaged: not what was sealed, UserError: of another format."""
    if not isinstance(content, dict) or "format" not in content:
        raise Damaged(f"{where} is damaged: its metadata is empty")
    if content["format"] != FORMAT:
        raise UserError(f"{where} has checkpoint format {content['format']}, this version reads {FORMAT}")
    content = dict(content)
    if content.pop("seal", None) != digest_of(content):
        raise Damaged(f"{where} is damaged: its metadata is not what was saved")
    content["leaves"] = {
        item: {name: Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for name, leaf in tree.items()}
        for item, tree in content["leaves"].items()
    }
    return content


def check_leaves(stored: Mapping[str, Leaf] | None, wanted: Any, where: str, *, dtypes: bool = True) -> None:
    """Compares the leaves of a checkpoint's item, None if it has no such item, with a tree of arrays or
    ShapeDtypeStructs.

    Raises UserError, which names the first leaf that differs in name, shape or dtype; `where` names checkpoint and
    item.
    """
    if stored is None:
        raise UserError(f"{where}: there is none; it is an export or import of parameters alone")
    expected = named_leaves(wanted)
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{where}: {missing[0]} is missing ({len(missing)} missing in all)")
    if unexpected := sorted(stored.keys() - expected.keys()):
        raise UserError(
            f"{where}: {unexpected[0]} is not wanted by this config ({len(unexpected)} such in all)"
        )
    for name, leaf in expected.items():
        saved = stored[name]
        if saved.shape != tuple(leaf.shape):
            raise UserError(f"{where}: {name} has shape {saved.shape}, this config wants {leaf.shape}")
        if dtypes and saved.dtype != str(leaf.dtype):
            raise UserError(f"{where}: {name} is {saved.dtype}, this config wants {leaf.dtype}")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their "/"-joined path, as Orbax names them: a named tuple counts as a dictionary."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
