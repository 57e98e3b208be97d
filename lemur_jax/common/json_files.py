"""JSON files that are written atomically, and digests of JSON values."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

_SEAL = "seal"  # the key of the digest in a sealed file


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(file: epath.Path, value: Any) -> None:
    """Writes a file that readers see whole or not at all; several processes may write it at once."""
    temporary = file.parent / f".{uuid.uuid4().hex}"
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(file)
    except OSError:  # a full disk
        temporary.unlink(missing_ok=True)
        raise


def write_sealed(file: epath.Path, fields: Mapping[str, Any]) -> None:
    """`write_json` of an object with a digest of itself."""
    write_json(file, {**fields, _SEAL: digest_of(fields)})


def read_sealed(file: epath.Path) -> dict[str, Any]:
    """What `write_sealed` wrote; ValueError: it is damaged."""
    fields = json.loads(file.read_text())
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if fields.pop(_SEAL, None) != digest_of(fields):
        raise ValueError("it does not match its own digest")
    return fields
