"""Paths, local or on an object store (gs://), and what is found there."""

import os
from urllib.parse import quote

from etils import epath


def is_object_store(path: epath.PathLike) -> bool:
    """Whether directories there are only names: they cannot be renamed, and files cannot grow."""
    return "://" in os.fspath(path)


# TensorFlow's errors of access, not of the file; the first two are 401 and 403.
_REFUSALS_OF_TENSORFLOW = (
    *("PermissionDeniedError", "UnauthenticatedError"),
    *("UnavailableError", "AbortedError", "DeadlineExceededError", "FailedPreconditionError"),
)


def is_refused_by_store(error: BaseException) -> bool:
    """Whether an object store could not be reached or refused the request."""
    kind = type(error)
    # Raised or passed on by gcsfs; by name, without importing them.
    if kind.__module__.startswith(("aiohttp.", "google.auth.", "gcsfs.")):
        return True
    # Where TensorFlow is installed, etils reads and writes through it.
    return (
        kind.__module__.startswith("tensorflow.python.framework.errors")
        and kind.__name__ in _REFUSALS_OF_TENSORFLOW
    )


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; epath's own `resolve` turns gs:// into a local path."""
    path = epath.Path(path)
    return path if is_object_store(path) else path.resolve()


def store_url(path: epath.PathLike) -> str:
    """A directory as TensorStore names it: a URL, in which characters such as # and % are quoted."""
    path = os.fspath(absolute(path))
    return f"{quote(path, safe='/:')}/" if is_object_store(path) else f"file://{quote(path)}/"


def recovery_hint(content: bytes) -> str:
    """What to do about a damaged download, judged by its first bytes."""
    if content.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
    return "copy or download it again"
