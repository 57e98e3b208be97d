"""Imports the modules of a config, which register seqio tasks and mixtures."""

import importlib
import traceback
from collections.abc import Sequence

from lemur_jax.common.errors import UserError, reason_of


def import_modules(modules: Sequence[str]) -> None:
    """Imports modules that register tasks and mixtures; UserError for one that cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[2:]  # of the import system, then of the module
            files = [frame.filename for frame in frames if not frame.filename.startswith("<frozen ")]
            lines = [frame.lineno for frame in frames if frame.filename in files[:1]]
            location = f" (line {lines[-1]} of {files[0]})" if files else ""
            hint = "; install it, or add its directory to PYTHONPATH" * isinstance(error, ImportError)
            reason = str(error) if isinstance(error, UserError) else reason_of(error)
            raise UserError(f"cannot import {module!r} of data.modules: {reason}{location}{hint}") from error
