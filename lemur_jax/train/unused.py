"""Options that have no effect because the feature that they belong to is off."""

import json
from collections.abc import Mapping
from typing import Any

from lemur_jax.common import sections
from lemur_jax.config import RunConfig, flatten

# (prefixes of keys, the key that decides whether they are read, its values with which they are). Without values: all
# but an empty one or 0.
_READ_WITH: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (("adapter.",), "adapter.rank", ()),
    (("distill.",), "distill.teacher", ()),
    (("preference.",), "preference.loss", ()),
    (("preference.label_smoothing",), "preference.loss", ("dpo", "simpo")),
    (("preference.margin",), "preference.loss", ("simpo",)),
    (("preference.desirable_weight", "preference.undesirable_weight"), "preference.loss", ("kto",)),
    (("rl.",), "rl.environment", ()),
    (("init.",), "init.checkpoint", ()),
    (("eval.",), "eval.tasks", ()),
    (("spikes.",), "spikes.factor", ()),
    (("spikes.max_rollbacks",), "spikes.rollback_after", ()),
    (("optimizer.b", "optimizer.eps", "optimizer.moments_dtype"), "optimizer.name", ("adamw", "muon")),
    (("optimizer.router_",), "model.num_experts", ()),
    (("optimizer.z_loss", "optimizer.router_"), "preference.loss", ("",)),
    (("optimizer.z_loss", "optimizer.router_"), "distill.teacher", ("",)),
    (("compute.attention_blocks",), "compute.attention", ("auto", "splash")),
)


def unused_options(values: Mapping[str, Any]) -> list[str]:
    """Keys of a config, as JSON, that differ from their defaults and are not read, each with the key that decides."""
    options, defaults = flatten(values), flatten(json.loads(json.dumps(sections.defaults(RunConfig))))
    unused: dict[str, str] = {}
    for prefixes, switch, required in _READ_WITH:
        value = options[switch]
        if value in required if required else value:
            continue
        for key in options:
            if key.startswith(prefixes) and options[key] != defaults.get(key):
                unused.setdefault(key, f"{key} ({switch} is {value!r})")
    return list(unused.values())
