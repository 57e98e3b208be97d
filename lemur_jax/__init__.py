"""lemur_jax: code-heavy pretraining, chat tuning, evaluation and export of language models in JAX.

The names in `__all__` are the public Python API. Each one is imported from its module when it is first used, so that
`import lemur_jax` stays fast and does not import JAX or TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lemur_jax.common.errors import UserError
    from lemur_jax.config import default_config
    from lemur_jax.config import load as load_config
    from lemur_jax.convert.export_hf import export_hf
    from lemur_jax.convert.import_hf import import_hf
    from lemur_jax.convert.start_config import config_from_checkpoint
    from lemur_jax.infer.complete import complete
    from lemur_jax.infer.session import load as load_session
    from lemur_jax.models.presets import preset
    from lemur_jax.parallel.mesh import parse_mesh
    from lemur_jax.plan.plan import plan as plan_run
    from lemur_jax.prepare.prepare import prepare as prepare_data
    from lemur_jax.text.tokenizer import Tokenizer
    from lemur_jax.train.loop import train as train_model

__version__ = "0.2.0"

# Public name -> module and name there.
_EXPORTS = {
    "Tokenizer": ("lemur_jax.text.tokenizer", "Tokenizer"),
    "UserError": ("lemur_jax.common.errors", "UserError"),
    "complete": ("lemur_jax.infer.complete", "complete"),
    "config_from_checkpoint": ("lemur_jax.convert.start_config", "config_from_checkpoint"),
    "default_config": ("lemur_jax.config", "default_config"),
    "export_hf": ("lemur_jax.convert.export_hf", "export_hf"),
    "import_hf": ("lemur_jax.convert.import_hf", "import_hf"),
    "load_config": ("lemur_jax.config", "load"),
    "load_session": ("lemur_jax.infer.session", "load"),
    "parse_mesh": ("lemur_jax.parallel.mesh", "parse_mesh"),
    "plan_run": ("lemur_jax.plan.plan", "plan"),
    "prepare_data": ("lemur_jax.prepare.prepare", "prepare"),
    "preset": ("lemur_jax.models.presets", "preset"),
    "train_model": ("lemur_jax.train.loop", "train"),
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lemur_jax' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(module), attribute)
