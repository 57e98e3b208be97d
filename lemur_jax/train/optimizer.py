"""AdamW, Adafactor or Muon, with clipping, decay on matrices only, and warmup and cosine counted in updates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lemur_jax.train.config import OptimizerConfig, SpikesConfig
from lemur_jax.train.spikes import skip_spikes


def schedule(options: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at an update: linear warmup from 0, then cosine to `final_learning_rate` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if options.warmup_steps else options.learning_rate,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=steps,
        end_value=options.final_learning_rate,
    )


def decay_mask(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Which parameters are decayed: those without a `norm` axis. Same tree as `axes`, of bools."""
    return _by_axes(lambda names: "norm" not in names, axes)


def _by_axes(function: Callable[[tuple[str, ...]], Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(function, dict(axes), is_leaf=lambda x: isinstance(x, tuple))


def _adamw(options: OptimizerConfig, axes: Mapping[str, Any]) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019."""
    return optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps, mu_dtype=options.moments_dtype)


def _adafactor(options: OptimizerConfig, axes: Mapping[str, Any]) -> optax.GradientTransformation:
    """Shazeer & Stern 2018: second moments of rows and columns alone, no first moment.

    Updates are clipped at a root mean square of 1 and, unlike there, not scaled by the parameter's own: the learning
    rate means what it means for AdamW.
    """
    return each_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), axes)


def each_layer(
    inner: optax.GradientTransformation, axes: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """`inner` applied to each layer alone: leaves stacked along the first axis, `layers`, are mapped over it."""
    stacked = optax.GradientTransformation(
        init=jax.vmap(inner.init),
        update=lambda gradient, state, params=None: jax.vmap(inner.update)(gradient, state, params),
    )
    kinds = _by_axes(lambda names: "stacked" if "layers" in names else "whole", axes)
    return optax.partition({"stacked": stacked, "whole": inner}, kinds)


def _muon(options: OptimizerConfig, axes: Mapping[str, Any]) -> optax.GradientTransformation:
    """Jordan et al. 2024 for the layers' matrices, Adam for embedding, head and norm scales.

    Updates are scaled to AdamW's usual root mean square of 0.2 (Liu et al. 2025), so one learning rate serves both.
    """
    return contrib.muon(
        learning_rate=-1.0,  # the rate and its sign come later, for all optimizers alike
        eps=options.eps,
        mu_dtype=options.moments_dtype,
        adam_b1=options.b1,
        adam_b2=options.b2,
        muon_weight_dimension_numbers=muon_axes(axes),
        consistent_rms=0.2,
    )


def muon_axes(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Which axes of a matrix, or of each expert's, Muon takes as rows and columns; None where it is not used."""

    def dimension_numbers(names: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
        if "layers" not in names or not {"embed", "expert_embed"} & set(names):
            return None
        (width,) = (axis for axis, name in enumerate(names) if name in ("embed", "expert_embed"))
        others = tuple(
            axis for axis, name in enumerate(names) if axis != width and name not in ("layers", "experts")
        )
        return contrib.MuonDimensionNumbers(reduction_axis=(width,), output_axis=others)

    return _by_axes(dimension_numbers, axes)


# config.optimizer.name -> (options, logical axes) -> transformation of clipped gradients to directions
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Mapping[str, Any]], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
}


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with a float32 state: optax keeps second moments in the dtype of the parameters.

    In bfloat16 a moment that decays by less than 1/512 an update never gets smaller.
    """

    def upcast(params: Any) -> Any:
        return optax.tree.cast(params, jnp.float32)

    return optax.GradientTransformation(
        init=lambda params: inner.init(upcast(params)),
        update=lambda gradient, state, params=None: inner.update(gradient, state, upcast(params)),
    )


def make_optimizer(
    options: OptimizerConfig, steps: int, axes: Mapping[str, Any], spikes: SpikesConfig | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `config.optimizer`: clipping, a direction, decoupled weight decay, the learning rate.

    Its state carries `hyperparams["learning_rate"]`, the rate that the last update really used. `steps` are the updates
    of the whole run, `axes` the logical axes of each parameter; without `spikes` nothing is skipped.
    """

    @optax.inject_hyperparams
    def chain(learning_rate):
        clip = options.clip_norm
        update = optax.chain(
            optax.clip_by_global_norm(clip) if clip else optax.identity(),
            _in_float32(OPTIMIZERS[options.name](options, axes)),
            optax.add_decayed_weights(options.weight_decay, mask=decay_mask(axes)),
            optax.scale_by_learning_rate(learning_rate),
        )
        if spikes and spikes.factor:
            return skip_spikes(update, spikes.factor, spikes.window)
        return update

    return chain(learning_rate=schedule(options, steps))
