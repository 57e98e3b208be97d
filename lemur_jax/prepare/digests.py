"""Digests of tasks, by which `prepare` knows that a token store is up to date."""

import functools
import hashlib
import inspect
import json
import re
from typing import Any

from etils import epath

from lemur_jax.common.hub import DATASETS


def task_digest(task: Any) -> str:
    """Changes with the definition of a task: its source's description and the code of its preprocessors."""
    described = [task.name, _without_addresses(repr(task.source)), *sorted(task.output_features)]
    described += [_describe(preprocessor) for preprocessor in task.preprocessors]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _describe(function: Any) -> str:
    if isinstance(function, functools.partial):
        arguments = _without_addresses(repr((function.args, sorted(function.keywords.items()))))
        return f"{_describe(function.func)} with {arguments}"
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # an object, or a function made at run time
        return _without_addresses(repr(function))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def input_digest(task: Any, split: str) -> str:
    """Changes with the names, sizes and times of a task's files.

    A source without files may have a method `fingerprint(split) -> str`; without one, changes are not noticed.
    """
    if hasattr(task.source, "fingerprint"):
        described = [task.source.fingerprint(split)]
    else:
        described = [_describe_file(shard) for shard in task.source.list_shards(split)]
    return hashlib.sha256(json.dumps([split, *described]).encode()).hexdigest()


def _describe_file(name: str) -> str:
    if name.startswith(DATASETS):
        return name  # with its commit
    try:
        status = epath.Path(name).stat()
    except (OSError, ValueError):  # TFDS names its shards without their directory
        return name
    return f"{name} {status.length} {status.mtime}"
