"""What `lemur smoke` generated on a trusted machine, in a file for other machines to compare with."""

import dataclasses
import json

import numpy as np
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

    def __post_init__(self):
        rows = list(zip(self.prompts, self.tokens, self.logprobs, strict=True))
        if any(len(tokens) != len(logprobs) for _, tokens, logprobs in rows):
            raise ValueError("a row has more tokens than logprobs, or fewer")
        for name, kind in (("prompts", np.integer), ("tokens", np.integer), ("logprobs", np.number)):
            if not all(np.issubdtype(np.asarray(row).dtype, kind) for row in getattr(self, name)):
                raise ValueError(f"{name} is not lists of numbers")


def read(path: epath.PathLike) -> Reference:
    """A reference from its file, local or gs://.

    Raises:
      UserError: no such file, or not a whole reference.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no reference {path}: make one with --write-reference where results are trusted")
    try:
        return Reference(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no reference of lemur smoke, write a new one: {error}") from error


def check_free(path: epath.PathLike) -> None:
    """Checks before the run that its result can be written to `path`.

    Raises:
      UserError: the file exists, or nothing can be written there.
    """
    if epath.Path(path).exists():
        raise UserError(f"{path} exists already: remove it to write a new reference")
    _write(epath.Path(path), "").unlink(missing_ok=True)  # all hosts try


def write(path: epath.PathLike, reference: Reference) -> None:
    """Writes the file; it is whole or not there.

    Raises:
      UserError: it cannot be written.
    """
    _write(epath.Path(path), json.dumps(dataclasses.asdict(reference)) + "\n").replace(path)


def _write(path: epath.Path, text: str) -> epath.Path:
    """Writes a temporary file beside `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{path.name}.tmp"
        temporary.write_text(text)
    except OSError as error:
        raise UserError(f"the reference cannot be written: {error}") from error
    return temporary
