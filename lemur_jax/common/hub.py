"""Models on Hugging Face's hub, named ORG/NAME or ORG/NAME@REVISION wherever a checkpoint is named."""

import os
import re

from etils import epath

from lemur_jax.common.errors import UserError, reason_of

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")


def local_model(path: epath.PathLike) -> epath.PathLike:
    """The directory of a model: `path` itself, or for a name on the hub its files in the hub's cache.

    It is a name on the hub if its first component is no file or directory here. What is in the cache is not downloaded
    again, and an interrupted download continues; `hf auth login` keeps the token of private and gated models.

    Raises:
      UserError: no such model, it is gated, or the hub cannot be reached and the cache lacks it.
    """
    found = _NAME.fullmatch(os.fspath(path))
    if not found or os.path.exists(os.fspath(path).partition("/")[0]):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = found.groups()
    try:
        return snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns="*/*")
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no directory {path} here, and no model {name} on the hub (private ones need `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision} on the hub") from error
    except Exception as error:  # of the HTTP client, which differs between versions
        reason = " ".join(reason_of(error, 200).split())
        raise UserError(
            f"there is no directory {path} here, and {name} cannot be had from the hub: {reason}"
        ) from error
