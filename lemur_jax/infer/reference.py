"""What `lemur smoke` generated on a trusted machine, in a file for other machines to compare with."""

import dataclasses
import json

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
      UserError: no such file, or not a reference.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no reference {path}: make one with --write-reference where results are trusted")
    try:
        return Reference(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no reference of lemur smoke, write a new one: {error}") from error


def check_free(path: epath.PathLike) -> None:
    """Raises UserError if the file exists."""
    if epath.Path(path).exists():
        raise UserError(f"{path} exists already: remove it to write a new reference")


def write(path: epath.PathLike, reference: Reference) -> None:
    """Writes the file; it is whole or not there."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(reference)) + "\n")
    temporary.replace(path)
