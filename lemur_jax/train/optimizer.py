"""AdamW as the recipe has it: clipping, decay on matrices only, warmup and cosine counted in updates."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lemur_jax.common.errors import UserError
from lemur_jax.train.spikes import check_options, skip_spikes


def schedule(options: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Learning rate at an update: linear warmup from 0, then cosine to `final_learning_rate` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if options["warmup_steps"] else options["learning_rate"],
        peak_value=options["learning_rate"],
        warmup_steps=options["warmup_steps"],
        decay_steps=steps,
        end_value=options["final_learning_rate"],
    )


def decayed(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Which parameters are decayed: those without a `norm` axis. Same tree as `axes`, of bools."""
    return jax.tree.map(lambda names: "norm" not in names, dict(axes), is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(
    options: Mapping[str, Any], steps: int, axes: Mapping[str, Any], spikes: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `config.optimizer` (Loshchilov & Hutter 2019).

    Its state carries `hyperparams["learning_rate"]`, the rate that the last update really used.

    Args:
      options: `config.optimizer`.
      steps: updates of the whole run.
      axes: logical axes of each parameter.
      spikes: `config.spikes`; None: nothing is skipped.

    Raises:
      UserError: a warmup longer than the run, rates that are not positive, or spikes that make no sense.
    """
    if spikes:
        check_options(spikes)
    if not 0 <= options["warmup_steps"] < steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {options['warmup_steps']} but config.train.steps is {steps}:"
            " the warmup must be shorter than the run"
        )
    if options["learning_rate"] <= 0:
        raise UserError(f"config.optimizer.learning_rate is {options['learning_rate']}: it must be positive")

    @optax.inject_hyperparams
    def adamw(learning_rate):
        clip = options["clip_norm"]
        update = optax.chain(
            optax.clip_by_global_norm(clip) if clip else optax.identity(),
            optax.scale_by_adam(
                b1=options["b1"], b2=options["b2"], eps=options["eps"], mu_dtype=options["moments_dtype"]
            ),
            optax.add_decayed_weights(options["weight_decay"], mask=decayed(axes)),
            optax.scale_by_learning_rate(learning_rate),
        )
        if spikes and spikes["factor"]:
            return skip_spikes(update, spikes["factor"], spikes["window"])
        return update

    return adamw(learning_rate=schedule(options, steps))
