"""The parameters of a checkpoint as arrays that are read slice by slice.

Orbax restores whole arrays; converting a 70B model needs one layer at a time. Orbax writes each array
as a TensorStore zarr array in an OCDBT store, and that is opened here.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore as ts
from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import absolute


def open_params(path: epath.PathLike, step: int, item: str = "params") -> dict[str, ts.TensorStore]:
    """The parameters of one checkpoint by "/"-joined path; reads their shapes alone.

    Args:
      path: checkpoint directory, or a workdir that holds one, local or gs://.
      step: a finished step in it.
      item: "params", or "optimizer".

    Raises:
      UserError: there is no such step, or its arrays cannot be opened.
    """
    directory = absolute(path)
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    location = directory / str(step) / item
    try:
        description = json.loads((location / "_METADATA").read_text())
        base = str(location) if "://" in str(location) else f"file://{location}"
        driver = "zarr3" if description.get("use_zarr3") else "zarr"
        arrays = {}
        for entry in description["tree_metadata"].values():
            if entry["value_metadata"]["skip_deserialize"]:  # an empty part of the tree
                continue
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            store = {"driver": "ocdbt", "base": base + "/", "path": ".".join(keys) + "/"}
            arrays["/".join(keys)] = ts.open({"driver": driver, "kvstore": store}, open=True, read=True)
        return {name: future.result() for name, future in arrays.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the arrays in {location} cannot be opened: {reason_of(error)}") from error


def read_parts(array: ts.TensorStore, cuts: Sequence[Any], name: str) -> Iterator[Any]:
    """Slices of an array as NumPy, one after the other; the next is read while the caller has one.

    Raises:
      UserError: the file behind it is damaged.
    """
    try:
        ahead = array[cuts[0]].read()
        for number in range(len(cuts)):
            part = ahead.result()
            if number + 1 < len(cuts):
                ahead = array[cuts[number + 1]].read()
            yield part
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {reason_of(error)}") from error
