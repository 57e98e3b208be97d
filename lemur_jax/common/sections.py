"""Config sections: frozen dataclasses that are made from plain values and turn back into them."""

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lemur_jax.common.errors import UserError

T = TypeVar("T")
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def require(condition: bool, key: str, value: Any, must: str) -> None:
    """Raises UserError, `config.KEY is VALUE: it must be MUST`, where the condition does not hold."""
    if not condition:
        raise UserError(f"config.{key} is {value!r}: it must be {must}")


def require_one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Raises UserError, with the nearest known name, where a value is not among `known`."""
    names = list(known)
    if value not in names:
        raise UserError(
            f"config.{key} is {value!r}: it must be one of {', '.join(map(repr, names))}{did_you_mean(value, names)}"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` with the nearest of `known`; "" where none is like it."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def to_plain(value: Any) -> Any:
    """A section as nested dicts; tuples and scalars stay as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[T], values: Any, key: str = "") -> T:
    """A section from nested mappings, e.g. JSON; missing keys have their defaults.

    `key` is the section's dotted key, for errors; "": the whole config. Raises UserError: an unknown or missing key, a
    value of the wrong type, or what the section refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    kinds = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    if not isinstance(values, Mapping):
        raise UserError(f"config.{key} is {values!r}: it must be a section with {', '.join(fields)}")
    for name in values:
        if name not in fields:
            raise UserError(f"unknown config key {prefix}{name}{did_you_mean(str(name), fields)}")
    for name, field in fields.items():
        if name not in values and _default(field) is dataclasses.MISSING:
            raise UserError(f"config.{prefix}{name} is missing")
    return cls(**{name: _convert(kinds[name], value, f"{prefix}{name}") for name, value in values.items()})


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a section as plain values; fields without one are left out."""
    values = {field.name: _default(field) for field in dataclasses.fields(cls)}
    return {name: to_plain(value) for name, value in values.items() if value is not dataclasses.MISSING}


def fill(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a section, e.g. of an older version, with the defaults of keys that are missing."""
    filled = {**defaults(cls), **values}
    for name, kind in typing.get_type_hints(cls).items():
        value, arguments = filled.get(name), typing.get_args(kind)
        if not isinstance(value, Mapping):
            continue
        if dataclasses.is_dataclass(kind):
            filled[name] = fill(typing.cast(type, kind), value)
        elif arguments and dataclasses.is_dataclass(arguments[-1]):
            filled[name] = {key: fill(arguments[-1], item) for key, item in value.items()}
    return filled


def replace(section: T, changes: Mapping[str, Any]) -> T:
    """A copy with other values at dotted keys: `replace(config, {"mesh.fsdp": 4, "train.steps": 10})`."""
    nested: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    is_mapping = isinstance(section, Mapping)
    for name, inner in nested.items():
        values[name] = replace(section[name] if is_mapping else getattr(section, name), inner)  # type: ignore[index]
    return {**section, **values} if is_mapping else dataclasses.replace(section, **values)  # type: ignore


def _default(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as a field's type; whole numbers become floats, lists tuples, and `~/` the home directory."""
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return from_plain(typing.cast(type, kind), value, key)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise UserError(f"config.{key} is {value!r}: it must be a tuple, e.g. (x,) or (x, y)")
        return tuple(_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise UserError(f"config.{key} is {value!r}: it must be a mapping by name")
        return {str(name): _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # A whole number may be too large for a float.
        require(abs(value) <= sys.float_info.max, key, value, "a finite number")
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"config.{key} is {value!r}: it must be {_TYPE_NAMES[kind]}")
    return os.path.expanduser(value) if kind is str else value
