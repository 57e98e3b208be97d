"""What `lemur smoke` generated where it is trusted, kept in a file for other machines to compare with."""

import dataclasses
import json
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Greedy answers and how they were computed.

    Attributes:
      dtype, weights: of the session, e.g. "float32" and "int8".
      prompts: ids.
      tokens: ids that followed each prompt.
      logprobs: of these tokens, in nats.
    """

    dtype: str
    weights: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


def read(path: epath.PathLike) -> Reference:
    """A reference from its file, local or gs://.

    Raises:
      UserError: no such file, or not a whole reference.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no reference {path}: make one with --write-reference where results are trusted")
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no reference of lemur smoke: {error}") from error
    if fault := _fault(value):
        raise UserError(f"{path} is no reference of lemur smoke: {fault}; write a new one")
    return Reference(**{field.name: value[field.name] for field in dataclasses.fields(Reference)})


def _fault(value: Any) -> str:
    """What keeps a JSON value from being a reference, or ""."""
    if not isinstance(value, dict):
        return "it is not a JSON object"
    for field in dataclasses.fields(Reference):
        if field.name not in value:
            return f"it has no {field.name}"
    for name, kind in (("prompts", int), ("tokens", int), ("logprobs", int | float)):
        rows = value[name]
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            return f"{name} is not a list of rows"
        if len(rows) != len(value["prompts"]):
            return f"{name} has {len(rows)} rows for {len(value['prompts'])} prompts"
        if not all(isinstance(entry, kind) for row in rows for entry in row):
            return f"{name} has an entry that is no number"
    for row, (tokens, logprobs) in enumerate(zip(value["tokens"], value["logprobs"], strict=True)):
        if len(tokens) != len(logprobs):
            return f"row {row} has {len(tokens)} tokens and {len(logprobs)} logprobs"
    return ""


def check_free(path: epath.PathLike) -> None:
    """That a file can be written, and would overwrite none: before what is to be in it has been computed.

    Raises:
      UserError: there is one, or nothing can be written there.
    """
    if epath.Path(path).exists():
        raise UserError(f"{path} exists already: remove it to write a new reference")
    try:
        temporary = _temporary(epath.Path(path))
        temporary.write_text("")
        temporary.unlink(missing_ok=True)  # all hosts try
    except OSError as error:
        raise UserError(f"the reference cannot be written: {error}") from error


def _temporary(path: epath.Path) -> epath.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f"{path.name}.tmp"


def write(path: epath.PathLike, reference: Reference) -> None:
    """Writes the file; it is whole or not there.

    Raises:
      UserError: it cannot be written.
    """
    path = epath.Path(path)
    try:
        temporary = _temporary(path)
        temporary.write_text(json.dumps(dataclasses.asdict(reference)) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"the reference cannot be written: {error}") from error
