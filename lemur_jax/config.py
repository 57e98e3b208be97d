"""The config of a run: one typed tree, made once from a config file and its overrides.

A config file is Python with `get_config()`, or `get_config(arg="")`, that starts from `default_config(...)` and
returns an `ml_collections.ConfigDict`. `load` runs it, applies `--config.a.b=value` overrides and turns the
result into a `RunConfig`, whose sections are defined beside the code that uses them. A mistake is reported in one line.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from ml_collections import ConfigDict

from lemur_jax.checkpoint.config import CheckpointConfig
from lemur_jax.cluster.config import HostsConfig
from lemur_jax.common import sections
from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.json_files import digest_of
from lemur_jax.common.sections import did_you_mean, replace
from lemur_jax.data.config import (
    DataConfig,
    SourceConfig,
    SourceCounts,
    documents_per_row,
    read_record,
    shares_of_epochs,
)
from lemur_jax.models.config import AdapterConfig, ComputeConfig, DecoderConfig
from lemur_jax.parallel.config import MeshConfig
from lemur_jax.prepare.config import PrepareConfig
from lemur_jax.rl.config import RlConfig
from lemur_jax.telemetry.config import LogConfig
from lemur_jax.text.config import TokenizerConfig
from lemur_jax.train.config import (
    DistillConfig,
    EvalConfig,
    InitConfig,
    OptimizerConfig,
    PreferenceConfig,
    SpikesConfig,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every option of a run."""

    model: DecoderConfig  # the shape of the model
    seed: int = 42  # seed of the initial parameters and of the data order
    compute: ComputeConfig = field(default_factory=ComputeConfig)  # how the model is computed
    mesh: MeshConfig = field(default_factory=MeshConfig)  # how work is sharded over devices
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # the tokenizer
    data: DataConfig = field(default_factory=DataConfig)  # what is trained on
    prepare: PrepareConfig = field(default_factory=PrepareConfig)  # how the token stores are made
    train: TrainConfig = field(default_factory=TrainConfig)  # updates and batch
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # optimizer and learning rate
    rl: RlConfig = field(default_factory=RlConfig)  # episodes and rewards of `lemur rl`
    spikes: SpikesConfig = field(default_factory=SpikesConfig)  # updates that are skipped
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)  # preference losses
    distill: DistillConfig = field(default_factory=DistillConfig)  # distillation from a teacher
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # low-rank adapters
    init: InitConfig = field(default_factory=InitConfig)  # first parameters
    eval: EvalConfig = field(default_factory=EvalConfig)  # held-out loss
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # saves
    log: LogConfig = field(default_factory=LogConfig)  # metrics
    hosts: HostsConfig = field(default_factory=HostsConfig)  # runs of several hosts

    def __post_init__(self):
        """Refuses sections that do not fit together; what the mesh and the model allow is checked by train/step.py."""
        sections.require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a number of 64 bits")
        steps = self.train.steps
        warmup, must = self.optimizer.warmup_steps, f"below train.steps ({steps})"
        sections.require(warmup < steps, "optimizer.warmup_steps", warmup, must)
        for name, stage in self.data.stages.items():
            must = f"a whole number above 0 and below train.steps ({steps})"
            sections.require(0 < stage.step < steps, f"data.stages.{name}.step", stage.step, must)
        if self.adapter.rank and not self.init.checkpoint:
            raise UserError("config.adapter.rank needs config.init.checkpoint: the model that is adapted")
        if self.compute.gate_share and (self.model.num_experts or self.model.mlp_bias or self.adapter.rank):
            raise UserError(
                "config.compute.gate_share splits the matrices of an mlp: set it to 0 with experts, with biases in the"
                " mlp, and with config.adapter.rank"
            )
        if self.distill.teacher:
            if self.adapter.rank or self.preference.loss or self.rl.kl:
                raise UserError(
                    "config.distill.teacher takes the place of a reference: leave out adapter.rank, preference.loss and"
                    " rl.kl"
                )
            top_k, tokens = self.distill.top_k, self.model.vocab_size
            must = f"at most config.model.vocab_size ({tokens})"
            sections.require(top_k <= tokens, "distill.top_k", top_k, must)
        if self.spikes.rollback_after and (self.checkpoint.keep == 1 or not self.checkpoint.every_steps):
            raise UserError(
                "config.spikes.rollback_after goes back to an older checkpoint: set config.checkpoint.keep to at"
                " least 2, and config.checkpoint.every_steps above 0"
            )
        best = self.checkpoint.keep_best
        must = f"among config.eval.tasks {self.eval.tasks}"
        sections.require(not best or best in self.eval.tasks, "checkpoint.keep_best", best, must)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; tuples become lists."""
        return json.loads(json.dumps(sections.to_plain(self)))

    def fingerprint(self) -> str:
        """The same for the same options, in whatever order they were set."""
        return digest_of(self.to_json())

    def with_counts(self) -> "RunConfig":
        """With the shares, rows and updates that follow from its `epochs` and `train.batch_documents`.

        They are computed from the counts that `lemur prepare` recorded; without a record nothing changes. Rows are
        rounded to a multiple of `train.microbatches` and of the mesh axes that cut the batch, where the config has
        their sizes; updates are rounded up.
        """
        data, train, mesh = self.data, self.train, self.mesh
        if not (data.by_epochs or train.batch_documents):
            return self
        counts = read_record(data.counts_record, SourceCounts)
        if not data.sources or not set(data.sources) <= set(counts):
            return self
        if data.by_epochs:
            shares = shares_of_epochs(data.sources, counts)
            data = replace(data, {f"sources.{name}.share": share for name, share in shares.items()})
        if train.batch_documents:
            unit = train.microbatches * max(1, mesh.data) * max(1, mesh.fsdp) * max(1, mesh.expert)
            rows = train.batch_documents / documents_per_row(data.sources, counts)
            train = replace(train, {"batch_rows": unit * max(1, round(rows / unit))})
        if data.by_epochs:
            rows = sum(source.epochs * counts[name].rows for name, source in data.sources.items())
            train = replace(train, {"steps": max(1, math.ceil(rows / train.batch_rows))})
        return dataclasses.replace(self, data=data, train=train)


def default_config(model: DecoderConfig | Mapping[str, Any]) -> ConfigDict:
    """Every option of a run with its default, for a config file to change.

    Args:
      model: the decoder, e.g. `preset("llama2_7b")`, or its fields as a mapping.
    """
    fields = model.to_dict() if isinstance(model, DecoderConfig) else dict(model)
    config = ConfigDict({**sections.defaults(RunConfig), "model": fields})
    # A mistyped key in a config file is an error there and then; only these have keys of the user's own.
    config.lock()
    for mapping in (config.data.sources, config.data.stages, config.eval.groups, config.prepare.steps):
        mapping.unlock()
    return config


def from_config_dict(values: ConfigDict) -> RunConfig:
    """The typed config of a `ConfigDict`.

    Raises:
      UserError: an unknown key (the nearest one is named), a value of the wrong type, or one that cannot work.
    """
    config = from_json(values.to_dict())
    if config.data.mixture and config.data.sources:
        names = ", ".join(config.data.sources)
        raise UserError(
            f"config.data.mixture is {config.data.mixture!r} and config.data.sources has {names}: set one of them"
        )
    return config


def from_json(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `RunConfig.to_json`; keys that are missing have their defaults. Raises as `from_config_dict`."""
    return sections.from_plain(RunConfig, values)


def load(argument: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Runs a config file and applies overrides; `data.mixture` is resolved to the sources that `prepare` recorded.

    Args:
      argument: `path/to/config.py` or `path/to/config.py:arg`, as for ml_collections.
      overrides: strings `--config.a.b=value`.

    Raises:
      UserError: no such file, an unknown key (the nearest one is named), a value of the wrong type, or one
        that cannot work.
    """
    config = from_config_dict(load_config_dict(argument, overrides))
    if config.data.mixture and (sources := read_record(config.data.mixture_record, SourceConfig)):
        config = replace(config, {"data.sources": sources})
    return config


def load_config_dict(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """As `load`, but returns the file's `ConfigDict`, for another config file to change."""
    from absl import flags
    from ml_collections import config_flags

    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise UserError(f"cannot read {override!r}: overrides are written --config.section.key=value")
    argv = ["lemur", *overrides]
    values = flags.FlagValues()
    config = _run_config_file(argument)
    sources, stages = (_section(_section(config, "data"), key) for key in ("sources", "stages"))
    for name in sources:
        _complete(_section(sources, name), sections.defaults(SourceConfig))
    for name in stages:
        shares = _section(_section(stages, name), "shares")
        _complete(shares, dict.fromkeys(shares, 0.0))
    options = flatten(config.to_dict())
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        if isinstance(options.get(key), tuple) and value.lstrip().startswith("{"):  # absl would take its keys
            raise UserError(f"config.{key} is {value}: it must be a tuple, e.g. (x,) or (x, y)")
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
        return values.config
    except flags.IllegalFlagValueError as error:
        raise UserError(f"wrong value for {argument}: {error}") from error
    except (AttributeError, KeyError, IndexError) as error:
        raise _explain_key(argument, overrides, error) from error
    except Exception as error:
        raise UserError(f"cannot apply {' '.join(overrides)} to {argument}: {reason_of(error)}") from error


def _section(values: ConfigDict, key: str) -> ConfigDict:
    """A section; empty if `key` holds something else, which the conversion refuses."""
    section = values.get(key)
    return section if isinstance(section, ConfigDict) else ConfigDict()


def _complete(values: ConfigDict, defaults: Mapping[str, Any]) -> None:
    """Adds a section's missing keys, and converts integers to floats where the default is one: absl only overrides
    existing keys, with values of their type.
    """
    with values.unlocked(), values.ignore_type():
        for key, default in defaults.items():
            value = values.get(key, default)
            # A larger integer may overflow a float; it is refused later.
            is_int = type(value) is int and abs(value) < 2**63
            values[key] = float(value) if is_int and isinstance(default, float) else value


def _run_config_file(argument: str) -> ConfigDict:
    path, colon, arg = argument.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"there is no config file {path}")
    # Modules of tasks, and configs that this one imports, may be in the same directory.
    directory = os.path.dirname(os.path.abspath(path))
    if directory not in sys.path:
        sys.path.append(directory)
    spec = importlib.util.spec_from_file_location("lemur_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: a config is a .py file with get_config()")
    module = sys.modules["lemur_config"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg) if colon else module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        location = f" (line {lines[-1]} of {path})" if lines else ""
        raise UserError(f"cannot load the config {argument}: {reason_of(error)}{location}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{argument}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config


def _explain_key(argument: str, overrides: Sequence[str], error: Exception) -> UserError:
    """Names the override whose key does not exist and the valid key nearest to it."""
    keys = sorted(flatten(load_config_dict(argument).to_dict())) if overrides else []
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        # A section can be replaced, and a name be quoted: data.sources['code/C++'].share.
        plain = re.sub(r"""\[(['"])(.*?)\1\]""", r".\2", key)
        if not any(f"{known}.".startswith(f"{plain}.") for known in keys):
            return UserError(
                f"unknown config key {key} (value {value!r}) for {argument}"
                f"{did_you_mean(key, keys) or '; docs/configuration.md lists all'}"
            )
    return UserError(f"cannot load the config {argument}: {error}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; an empty mapping stays as a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs of plain values differ, with both values; None stands for a missing one."""
    before, now = ({key: value for key, value in flatten(tree).items() if value != {}} for tree in (old, new))
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
