"""The environment of a process of a run: git commit, host, devices and versions."""

import contextlib
import functools
import importlib.metadata
import pathlib
import platform
import subprocess
import time

from lemur_jax.common.json_files import digest_of
from lemur_jax.telemetry.metrics import Record

_PACKAGES = (
    *("lemur_jax", "jax", "jaxlib", "libtpu", "flax", "optax"),
    *("orbax-checkpoint", "tensorstore", "numpy"),
)


def start_record(step: int) -> Record:
    """The record of kind `start` that a process writes before its first step, number `step`."""
    import jax

    others = jax.process_count() - 1
    return {
        "step": step,
        "kind": "start",
        "unix_seconds": time.time(),
        "commit": git_commit(),
        "host": platform.node() + (f" and {others} more" if others else ""),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": versions(),
    }


def git_commit() -> str | None:
    """The commit of the package's checkout, with "-dirty" if files differ from it; None outside a checkout."""
    package = pathlib.Path(__file__).parents[1]
    archived = (package / "commit.txt").read_text().strip()  # filled in by `git archive`, see .gitattributes
    if not archived.startswith("$"):
        return archived
    # An installed copy may lie in a checkout, e.g. in `.venv`, which does not track it.
    if not _git(package, "ls-files", "commit.txt"):
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(directory: pathlib.Path, *words: str) -> str | None:
    """What git prints; None if nothing."""
    command = ["git", "-C", str(directory), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow network disk
        return None
    return result.stdout.strip() or None


@functools.cache
def code_digest() -> str:
    """sha256 (hex) of the source files of this package."""
    package = pathlib.Path(__file__).parents[1]
    return digest_of([file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))])


def versions() -> list[str]:
    """Names and versions of Python and of the packages that are installed."""
    names = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            names.append(f"{package} {importlib.metadata.version(package)}")
    return names
