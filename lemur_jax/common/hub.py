"""Hugging Face's hub: models named ORG/NAME[@REVISION] and files named hf://datasets/ORG/NAME[@REVISION]/FILE."""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from etils import epath

from lemur_jax.common.errors import UserError, reason_of

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
DATASETS = "hf://datasets/"
_DATASET_FILE = re.compile(DATASETS + r"([\w.-]+/[\w.-]+)(?:@((?:refs/\w+/)?[\w.-]+))?/(.+)")
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_OTHERS = ("*/*", "consolidated*")  # Mistral's own layout, beside the same weights


def hub_name(path: epath.PathLike) -> tuple[str, str | None] | None:
    """(ORG/NAME, revision) of a name on the hub; None if its first component is a file or directory here."""
    match = _NAME.fullmatch(os.fspath(path))
    if not match or os.path.exists(os.fspath(path).partition("/")[0]):
        return None
    return match[1], match[2]


def local_model(path: epath.PathLike, *, download: bool = True) -> epath.PathLike:
    """The directory of a model: `path` itself, or for a name on the hub its files in the hub's cache.

    What is in the cache is not downloaded again, and an interrupted download continues; `hf auth login` keeps the token
    of private and gated models.

    Raises UserError: no such model, it is gated, or the cache lacks it and the hub cannot be reached or asked.
    """
    if not (parsed := hub_name(path)):
        return path
    from huggingface_hub import snapshot_download

    name, revision = parsed
    options = dict(allow_patterns=_FILES, ignore_patterns=_OTHERS, local_files_only=not download)
    with _one_line(name, revision or "", "model", f"there is no directory {path} here, and "):
        return snapshot_download(name, revision=revision, **options)


def dataset_files(pattern: str) -> list[str]:
    """The files that match `hf://datasets/ORG/NAME[@REVISION]/GLOB`, sorted, with the commit as their revision.

    Raises UserError: no such data set or revision, it is gated, or the hub cannot be reached.
    """
    name, revision, glob = _dataset_parts(pattern)
    commit, files = _list_dataset(name, revision)
    path = pathlib.PurePosixPath(glob)
    inside = path / "*"  # of a directory
    matching = (
        file
        for file in map(pathlib.PurePosixPath, files)
        if any(len(file.parts) == len(each.parts) and file.match(str(each)) for each in (path, inside))
    )
    return [f"{DATASETS}{name}@{commit}/{file}" for file in sorted(matching)]


def local_file(path: str) -> str:
    """`path` itself, or for a file that `dataset_files` names the downloaded one in the hub's cache."""
    if not path.startswith(DATASETS):
        return path
    from huggingface_hub import hf_hub_download

    name, revision, file = _dataset_parts(path)
    with _one_line(name, revision, "data set"):
        return hf_hub_download(name, file, repo_type="dataset", revision=revision)


def _dataset_parts(path: str) -> tuple[str, str, str]:
    """(ORG/NAME, revision or "", the rest)."""
    match = _DATASET_FILE.fullmatch(path)
    if not match:
        raise UserError(f"cannot read {path}: files of the hub are hf://datasets/ORG/NAME[@REVISION]/FILE")
    return match[1], match[2] or "", match[3]


@functools.cache  # one commit for all shards and splits that this process reads
def _list_dataset(name: str, revision: str) -> tuple[str, Sequence[str]]:
    from huggingface_hub import HfApi

    with _one_line(name, revision, "data set"):
        info = HfApi().dataset_info(name, revision=revision or None)
        return info.sha or "main", [file.rfilename for file in info.siblings or ()]


@contextlib.contextmanager
def _one_line(name: str, revision: str, kind: str, prefix: str = "") -> Iterator[None]:
    """Turns errors of the hub into a UserError of one line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{prefix}there is no {kind} {name} on the hub (private ones need `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision} on the hub") from error
    except Exception as error:  # of the HTTP client, which differs between versions
        reason = " ".join(reason_of(error, 200).split())
        raise UserError(f"{prefix}{name} cannot be had from the hub: {reason}") from error
