"""Digests of tasks, by which `prepare` knows that a token store is up to date."""

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from typing import Any

from etils import epath

from lemur_jax.common.hub import DATASETS
from lemur_jax.prepare.fields import Fields


def task_digest(task: Any) -> str:
    """Changes with the definition of a task: its source's description and the code of its preprocessors."""
    parts = [task.name, _without_addresses(repr(task.source)), *sorted(task.output_features)]
    parts += [_describe(preprocessor) for preprocessor in task.preprocessors]
    parts += _user_code([getattr(task.source, "fields", None)])
    loader = _without_addresses(repr(getattr(task.source, "tfds_dataset", None)))
    if "split_map={" in loader:  # of TFDS, whose own description names the splits without their slices
        parts.append(loader)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _describe(function: Any) -> str:
    if isinstance(function, functools.partial):
        arguments = _without_addresses(repr((function.args, sorted(function.keywords.items()))))
        code = _user_code([*function.args, *function.keywords.values()])
        return "\n".join([f"{_describe(function.func)} with {arguments}", *code])
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # an object, or a function made at run time
        return _without_addresses(repr(function))


def _user_code(values: Iterable[Any]) -> list[str]:
    """The code of the functions among `values` and in `Fields`, apart from this package's."""
    code: list[str] = []
    for value in values:
        if isinstance(value, Fields):
            code += _user_code([value.messages, value.preferences])
        elif callable(value) and not str(value.__module__).startswith("lemur_jax."):
            code.append(_describe(value))
    return code


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def input_digest(task: Any, split: str) -> str:
    """Changes with the names, sizes and times of a task's files.

    A source without files may have a method `fingerprint(split) -> str`; without one, changes are not noticed.
    """
    if hasattr(task.source, "fingerprint"):
        parts = [task.source.fingerprint(split)]
    else:
        parts = [_describe_file(shard) for shard in task.source.list_shards(split)]
    return hashlib.sha256(json.dumps([split, *parts]).encode()).hexdigest()


def _describe_file(name: str) -> str:
    if name.startswith(DATASETS):
        return name  # with its commit
    try:
        status = epath.Path(name).stat()
    except (OSError, ValueError):  # a function's split, which is no file
        return name
    return f"{name} {status.length} {status.mtime}"
