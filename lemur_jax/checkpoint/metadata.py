"""The `metadata` item: what a checkpoint says about itself, under a seal."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from lemur_jax.checkpoint.leaves import Leaf
from lemur_jax.common.errors import UserError

FORMAT = 2


class Damaged(UserError):
    """A checkpoint that is not what was saved."""


def make_metadata(
    *,
    model: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `metadata` item, as plain JSON; what is said of the leaves comes with the save.

    Args:
      model: fields of `LlamaConfig`.
      tokenizer_files: contents by file name.
      config: the run config, None for imported weights.
      data: digests of the stores that the run reads.
    """
    return {
        "format": FORMAT,
        "model": dict(model),
        "tokenizer": {name: base64.b64encode(data).decode() for name, data in tokenizer_files.items()},
        "config": None if config is None else dict(config),
        "data": dict(data or {}),
    }


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files out of a `metadata` item."""
    return {name: base64.b64decode(data) for name, data in metadata["tokenizer"].items()}


def seal(metadata: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Leaf]]) -> dict[str, Any]:
    """The metadata with its leaves and a SHA-256 of all that.

    Args:
      metadata: as `make_metadata` gives it; of one that was read, leaves and step are replaced.
      leaves: of each item, by name.
    """
    described = {
        item: {name: dataclasses.asdict(leaf) for name, leaf in of.items()} for item, of in leaves.items()
    }
    content = {**metadata, "leaves": described}
    content.pop("step", None)
    content = json.loads(json.dumps(content))  # tuples as the lists that a reader gets
    return {**content, "seal": _digest(content)}


def unseal(content: Any, where: str) -> dict[str, Any]:
    """The inverse of `seal`, with `leaves` as `Leaf`s.

    Raises:
      Damaged: not what was sealed.
      UserError: of another format.
    """
    if not isinstance(content, dict) or "format" not in content:
        raise Damaged(f"{where} is damaged: its metadata says nothing")
    if content["format"] != FORMAT:
        raise UserError(f"{where} has checkpoint format {content['format']}, this reads {FORMAT}")
    content = dict(content)
    if content.pop("seal", None) != _digest(content):
        raise Damaged(f"{where} is damaged: its metadata is not what was saved")
    content["leaves"] = {
        item: {name: Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for name, leaf in of.items()}
        for item, of in content["leaves"].items()
    }
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Late:
    """What a function gives, called once; one of Orbax's futures."""

    def __init__(self, content: Callable[[], Any]):
        self._content: Callable[[], Any] | None = content
        self._future: Future[Any] = Future()

    def result(self, timeout: float | None = None) -> Any:
        del timeout
        content, self._content = self._content, None  # it knows the arrays
        if content is not None:
            try:
                self._future.set_result(content())
            except Exception as error:
                self._future.set_exception(error)
        return self._future.result()


class LateJsonHandler(ocp.JsonCheckpointHandler):
    """Writes JSON once all arrays are written: only then are the digests of streamed ones known."""

    async def async_save(self, directory: epath.Path, item: Any = None, args: Any = None) -> list[Any]:
        self._late = _Late(args.content)
        return [self._late] if args.on_every_host else []

    def finalize(self, directory: epath.Path) -> None:
        (directory / "metadata").write_text(json.dumps(self._late.result()))


@ocp.args.register_with_handler(LateJsonHandler, for_save=True)
@dataclasses.dataclass
class SaveLateJson(ocp.args.CheckpointArgs):
    """Attributes:
    content: gives the JSON value; called by the first host when all arrays are written.
    on_every_host: it is called by all of them, beside the write; where it raises, no host takes the checkpoint for
      written.
    """

    content: Callable[[], Any]
    on_every_host: bool = False


@ocp.args.register_with_handler(LateJsonHandler, for_restore=True)
@dataclasses.dataclass
class RestoreLateJson(ocp.args.CheckpointArgs):
    """The JSON value that was saved."""
