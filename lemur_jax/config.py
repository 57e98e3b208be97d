"""Run configs: every option with its default, and loading a config file with overrides.

A config is a Python file with `get_config()`, or `get_config(arg="")`, that starts from `default_config(...)` and
returns an `ml_collections.ConfigDict`. `load` runs it, applies `--config.a.b=value` overrides and turns every mistake
into one line.
"""

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lemur_jax.common.errors import UserError, reason_of


def default_config(model: Mapping[str, Any]) -> ConfigDict:
    """Every option of a run with its default.

    Args:
      model: the fields of `models.config.LlamaConfig`, e.g. `preset("llama2_7b").to_dict()`.
    """
    config = ConfigDict()
    config.seed = 42
    config.model = ConfigDict(dict(model))

    # How the model is computed; none of this changes what is computed beyond rounding.
    config.compute = ConfigDict(
        dict(
            dtype="bfloat16",  # of activations and matmul inputs
            param_dtype="float32",  # of the master parameters
            remat="full",  # a name in models.remat.POLICIES: what the backward pass keeps
            reduce_dtype="",  # of weight gradients between devices: "float32", "bfloat16"; "": as dtype
            attention="auto",  # "auto" or a name in models.attention.IMPLEMENTATIONS
            attention_blocks=(0, 0),  # positions a block of splash, forward and backward; 0: by the TPU
            loss_chunk=512,  # positions whose logits exist at a time, cut to what divides the length; 0: all
            compiler_options=(),  # more for XLA:TPU, "name=value" each; those of parallel/compiler_flags.py are on
        )
    )

    # Device mesh; one axis may be -1: whatever devices are left.
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, sequence=1, tensor=1))

    config.tokenizer = ConfigDict(
        dict(
            path="",  # directory with tokenizer.model or tokenizer.json
            train_vocab_size=0,  # > 0: `prepare` trains a SentencePiece BPE there if none exists
            train_tasks=(),  # ... on the train splits of these tasks
            extend="",  # `prepare` makes `path` from this tokenizer directory ...
            add_tokens=(),  # ... by adding these control tokens at the end
            chat_template="",  # Jinja file; "": ChatML
        )
    )

    config.data = ConfigDict(
        dict(
            modules=(),  # Python modules that register more seqio tasks; may lie beside the config
            stores="stores",  # directory of token stores, one folder a task and split
            sequence_length=2048,  # T
            # name of a seqio task, or task/label for a part of it (see the step "label") -> share (of
            # tokens), packing ("concat" or "fit") and max_epochs (0: repeat without limit)
            sources=ConfigDict(),
            # other shares later in the run, e.g. to anneal: name of a stage -> step (its first update)
            # and shares (source -> share of tokens; a source that is not named has none)
            stages=ConfigDict(),
        )
    )
    config.prepare = ConfigDict(
        dict(
            workers=0,  # processes; 0: one a core
            held_out_tasks=(),  # tasks of which only the validation split is prepared
            max_bad_share=0.01,  # of records that cannot be used, above which preparing fails
            steps=ConfigDict(),  # name of a task -> cleaning and code steps, see data.cleaning.DEFAULTS
        )
    )

    config.train = ConfigDict(
        dict(
            steps=1000,  # updates
            batch_rows=128,  # rows B of one update, over all hosts and microbatches
            microbatches=1,  # B is split into this many passes
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # a name in train.optimizer.OPTIMIZERS: "adamw", "adafactor" or "muon"
            learning_rate=3e-4,  # peak, in updates, not in microbatches
            final_learning_rate=3e-5,
            warmup_steps=0,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,  # of matrices; norm scales are never decayed
            clip_norm=1.0,  # of the global gradient norm; 0: off
            moments_dtype="float32",  # of first moments
            z_loss=0.0,  # weight of log(Z)^2
        )
    )
    # Updates that are skipped by rule, see train.spikes; what is skipped is the same on any hosts and after any
    # restart. All off: a gradient that is not finite stops the run.
    config.spikes = ConfigDict(
        dict(
            factor=0.0,  # > 0: skip where the gradient norm is above so many times the running median, or not finite
            window=100,  # ... of so many accepted norms; before there are so many, only what is not finite is skipped
            rollback_after=0,  # so many skips in a row undo the updates since the last regular checkpoint; 0: never
            max_rollbacks=3,  # after which the run stops instead
        )
    )
    # Where the parameters come from; all empty: fresh ones from `seed`.
    config.init = ConfigDict(
        dict(
            checkpoint="",  # ours, or a Hugging Face directory; its parameters are taken, its optimizer is not
            drop_rows_above=0,  # > 0: forget vocabulary rows from this id on before extending
            new_rows="refuse",  # "mean": extend the vocabulary with the mean of the old rows
        )
    )

    config.eval = ConfigDict(
        dict(
            every_steps=0,  # held-out loss every so many updates and at the end; 0: only at the end
            tasks=(),  # tasks whose validation stores are scored, each for itself
            batch_rows=0,  # 0: as train.batch_rows
            max_rows=0,  # rows a task; 0: all
            # name of a group -> its tasks, e.g. code=("stack_python", "stack_java"); the balance score weighs
            # groups alike. Empty: each task is a group
            groups=ConfigDict(),
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every_steps=500,
            every_minutes=0.0,  # besides, when so long ago; looked at every log.every_steps
            keep=3,  # newest checkpoints kept
            keep_every=0,  # besides, those of steps that this divides; 0: none
            keep_best="",  # besides, the one with the lowest held-out loss on this task of eval.tasks
            grace_s=0.0,  # after SIGTERM a save may take so long, then the process ends; 0: no limit
            max_failures=3,  # saves that may fail in a row; each is tried again
            other_optimizer="refuse",  # "fresh": where the stored optimizer is another one, start it anew
            broadcast=False,  # with mesh.data > 1: one slice reads a checkpoint and sends it to the others
            # besides, emergency checkpoints on each host's own disk, where $VARIABLES are that host's; "": none.
            # Hosts serve them to each other on an open port: within a trusted network only
            local_directory="",
            local_every_steps=50,
        )
    )
    config.log = ConfigDict(
        dict(
            every_steps=10,
            tensorboard=False,  # also write WORKDIR/tensorboard; needs the extra "tensorboard"
            wandb=False,  # also send to Weights & Biases, set up by WANDB_*; needs the extra "wandb"
        )
    )
    # Runs of several hosts.
    config.hosts = ConfigDict(
        dict(
            connect_seconds=300,  # how long the first hosts wait for the last one at the start
            lost_seconds=100,  # a host silent for so long is lost, and the others stop
        )
    )
    # A mistyped key in a config file is an error there and then; only these bring keys of their own.
    config.lock()
    config.data.sources.unlock()
    config.data.stages.unlock()
    config.eval.groups.unlock()
    config.prepare.steps.unlock()
    return config


def load(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs a config file and applies overrides.

    Args:
      argument: `path/to/config.py` or `path/to/config.py:arg`, as for ml_collections.
      overrides: strings `--config.a.b=value`.

    Returns:
      The locked config.

    Raises:
      UserError: no such file, an unknown key (the nearest valid one is named), or a value of the
        wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise UserError(f"cannot read {override!r}: overrides are written --config.section.key=value")
    path = argument.partition(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"there is no config file {path}")
    # Modules of tasks may lie beside their config.
    directory = os.path.dirname(os.path.abspath(path))
    if directory not in sys.path:
        sys.path.append(directory)
    argv = ["lemur", f"--config={argument}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
    except flags.IllegalFlagValueError as error:
        # What `get_config` raised with an argument comes as a traceback in the message; its last line says it.
        raised = str(error).rpartition("Error whilst parsing config file:")[2].strip().splitlines()
        if len(raised) > 1:
            raise UserError(f"cannot load the config {argument}: {raised[-1].strip()}") from error
        raise UserError(f"wrong value in {argument}: {error}") from error
    except (AttributeError, KeyError) as error:
        raise _explain_key(argument, overrides, error) from error
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"cannot load the config file {path}: {reason_of(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{argument}: get_config returned {type(config).__name__}, not a ConfigDict")
    config.lock()
    return config


def _explain_key(argument: str, overrides: Sequence[str], error: Exception) -> UserError:
    """Names the override whose key does not exist and the valid key nearest to it."""
    known = sorted(flatten(load(argument).to_dict())) if overrides else []
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            return UserError(f"unknown config key {key} (value {value!r}) for {argument}{hint}")
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


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def fingerprint(config: ConfigDict) -> str:
    """The same for the same options, whatever the order in which they were set."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()
