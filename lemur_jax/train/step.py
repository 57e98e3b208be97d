"""The update: what `lemur train` runs and `lemur plan` compiles.

Axis legend: B batch row, T position, M microbatch, S source.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.convert.source import open_source
from lemur_jax.models import decoder, lora
from lemur_jax.models.config import AdapterConfig, DecoderConfig
from lemur_jax.models.decoder import Compute
from lemur_jax.parallel.compiler_flags import check_product_dtype, compiler_options
from lemur_jax.parallel.mesh import mesh_of_copies
from lemur_jax.parallel.rules import RULES, batch_shards, replicated
from lemur_jax.train.config import DistillConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from lemur_jax.train.copies import Copies
from lemur_jax.train.distill import distillation
from lemur_jax.train.losses import RowSums
from lemur_jax.train.objectives import Batch, Objective, abstract_batch, next_token
from lemur_jax.train.optimizer import make_optimizer
from lemur_jax.train.preferences import preference
from lemur_jax.train.spikes import spike_state
from lemur_jax.train.state import TrainState, run_state, shardings_of, trained_axes

_NOISE = "noise"  # key of the batch: uint32 [B], from which the dropout of each row is drawn
Metrics = Mapping[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A config made into functions over a mesh."""

    model: DecoderConfig
    compute: Compute
    optimizer: optax.GradientTransformation
    mesh: Mesh
    param_dtype: str  # of the master parameters
    state: TrainState  # abstract TrainState with shardings
    # TrainState -> the parameters of the model, for `score`, `decoder.bind` and a session: those of the state, or
    # `lora.adapt`; nothing is copied
    weights: Callable[[TrainState], Any]
    batch: Batch  # abstract batch with shardings: `objectives.ARRAYS` and the objective's own
    # jitted (state, batch) -> (state, metrics); the old state is donated. Those of the objective are in
    # metrics["objective/NAME"]
    step: jax.stages.Wrapped
    # jitted (params, batch) -> RowSums, for held-out loss; takes any number of rows
    score: jax.stages.Wrapped

    def trace(self) -> None:
        """Raises UserError where a kernel refuses the batch; JAX keeps the trace for the first step."""
        self.step.trace(self.state, self.batch)


def check(train: TrainConfig, sequence_length: int, model: DecoderConfig, mesh: Mesh) -> None:
    """UserError, which names the keys: the mesh cannot divide the batch, or the rows are too long for the model."""
    rows, accum = train.batch_rows, train.microbatches
    shards = batch_shards(mesh)
    if rows % (accum * shards):
        raise UserError(
            f"config.train.batch_rows {rows} must be a multiple of {accum * shards}: config.train.microbatches {accum}"
            f" × {shards}, the product of mesh axes data, fsdp and expert"
        )
    if sequence_length % mesh.shape["sequence"]:
        raise UserError(
            f"config.data.sequence_length {sequence_length} is not divisible by config.mesh.sequence"
            f" {mesh.shape['sequence']}"
        )
    if sequence_length > model.max_position_embeddings:
        raise UserError(
            f"config.data.sequence_length {sequence_length} is longer than"
            f" config.model.max_position_embeddings {model.max_position_embeddings}"
        )


def build(config: RunConfig, mesh: Mesh, num_sources: int, objective: Objective | None = None) -> Program:
    """The program of a config on a mesh, which may be of real or of described devices.

    Args:
      config: a run config.
      mesh: from `parallel.mesh.make_mesh`.
      num_sources: S, sources of the mixture.
      objective: what is minimized; None: next-token loss, or as `config.preference` or `config.distill` say.

    Raises:
      UserError: the mesh does not divide the model or the batch.
    """
    check(config.train, config.data.sequence_length, config.model, mesh)
    device_kind = mesh.devices.flat[0].device_kind
    check_product_dtype(config.compute.product_dtype, device_kind, bool(config.adapter.rank))
    model, dtype = config.model, config.compute.param_dtype
    compute = dataclasses.replace(Compute.from_config(config.compute, mesh), frozen=config.adapter.rank > 0)
    objective = objective or _objective(config.preference, config.distill, config.optimizer)
    optimizer = make_optimizer(
        config.optimizer, config.train.steps, trained_axes(model, config.adapter), config.spikes
    )
    frozen = None
    if objective.reference:
        frozen_args = (objective.teacher, compute.dtype) if objective.teacher else (model, dtype)
        frozen = decoder.abstract_params(*frozen_args, mesh)
    state = run_state(model, config.adapter, dtype, optimizer, mesh, frozen)
    step = _Step(
        model=model,
        compute=compute,
        objective=objective,
        optimizer=optimizer,
        adapter=config.adapter,
        train=config.train,
        seed=config.seed,
        mesh=mesh,
        num_sources=num_sources,
        copies=_copies(config.train, model, compute, objective, state),
    )

    def sums(params, batch: Batch) -> RowSums:
        return next_token().loss(decoder.bind(model, compute, params), batch).rows

    options = compiler_options(device_kind, config.compute.compiler_options)
    return Program(
        model=model,
        compute=compute,
        optimizer=optimizer,
        mesh=mesh,
        param_dtype=dtype,
        state=state,
        weights=step.weights,
        batch=abstract_batch(config.train.batch_rows, config.data.sequence_length, mesh, objective.arrays),
        step=jax.jit(
            step.update,
            donate_argnums=0,
            out_shardings=(shardings_of(state), replicated(mesh)),
            compiler_options=options,
        ),
        score=jax.jit(sums, out_shardings=replicated(mesh), compiler_options=options),
    )


def _objective(pairs: PreferenceConfig, distill: DistillConfig, optimizer: OptimizerConfig) -> Objective:
    """A loss of pairs or of a teacher, where the config names one; else next-token loss."""
    if pairs.loss:
        return preference(pairs)
    return distillation_objective(distill) or next_token(optimizer)


def distillation_objective(options: DistillConfig) -> Objective | None:
    """The objective of `config.distill`, if it names a teacher."""
    return distillation(options, open_source(options.teacher).model) if options.teacher else None


def _copies(
    train: TrainConfig, model: DecoderConfig, compute: Compute, objective: Objective, state: TrainState
) -> Copies | None:
    """How gradients are accumulated by copy of the parameters; None: autodiff sums them in each microbatch."""
    mesh = compute.mesh
    assert mesh is not None
    # Balance losses are of all copies' tokens, and grouped products of several copies are not one kernel.
    if mesh.shape["data"] == 1 or train.microbatches == 1 or not objective.additive or model.num_experts:
        return None
    dtype = compute.reduce_dtype or compute.dtype
    return Copies(mesh=mesh_of_copies(mesh), shardings=shardings_of(state.params), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """The update of a state by a batch, and what it is computed from; see `Program`."""

    model: DecoderConfig
    compute: Compute
    objective: Objective
    optimizer: optax.GradientTransformation
    adapter: AdapterConfig
    train: TrainConfig
    seed: int
    mesh: Mesh
    num_sources: int
    copies: Copies | None

    def weights(self, state: TrainState, keys: jax.Array | None = None) -> Any:
        """The parameters of the model; `keys`: of the adapter's dropout, by row."""
        if not self.adapter.rank:
            return state.params
        return lora.adapt(self.adapter, state.frozen, state.params, keys)

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after one update, and the metrics of the batch."""
        if self.adapter.dropout:
            # By update and row of the whole batch: the noise depends neither on the mesh nor on microbatches.
            key = jax.random.fold_in(jax.random.key(self.seed), state.step)
            batch = {**batch, _NOISE: jax.random.bits(key, self.train.batch_rows, jnp.uint32)}
        microbatches = _split(batch, self.train.microbatches, self.mesh)
        gradient_of = jax.grad(functools.partial(self._loss, state), has_aux=True)
        gradient, (rows, means) = _accumulate(gradient_of, state.params, microbatches, self.copies)
        weight = jnp.maximum(jnp.sum(rows.weight), 1.0)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        changes, optimizer_state = self.optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        metrics = {
            "grad_norm": optax.tree.norm(gradient),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(changes),
            **_loss_metrics(rows, weight, optimizer_state),
            **_by_source(rows, microbatches, self.num_sources),
            **{f"objective/{name}": _mean(*sums) for name, sums in means.items()},
        }
        updated = dataclasses.replace(state, step=state.step + 1, params=params, optimizer=optimizer_state)
        return updated, metrics

    def _loss(
        self, state: TrainState, params: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[RowSums, Metrics]]:
        """The objective of a microbatch with `params` in place of the state's."""
        compute = self.compute
        if self.copies:
            compute = dataclasses.replace(compute, mesh=self.copies.mesh)
        if self.objective.reference:
            reference = decoder.bind(self.objective.teacher or self.model, compute, state.frozen)
            batch = {**batch, **jax.lax.stop_gradient(self.objective.reference(reference, batch))}
        keys = jax.vmap(jax.random.key)(batch[_NOISE]) if self.adapter.dropout else None
        weights = self.weights(dataclasses.replace(state, params=params), keys)
        total, rows, means = self.objective.loss(decoder.bind(self.model, compute, weights), batch)
        return total, (rows, means)


def _split(batch: Batch, M: int, mesh: Mesh) -> Batch:
    """[B, ...] -> [M, B/M, ...]; every device keeps the rows that it has."""

    def split(x):
        x = jnp.moveaxis(x.reshape(x.shape[0] // M, M, *x.shape[1:]), 1, 0)
        spec = PartitionSpec(None, RULES["batch"], *([RULES["length"]] if x.ndim == 3 else []))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


def _mean(sums: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(sums) / jnp.maximum(jnp.sum(weights), 1e-8)


def _accumulate(
    gradient_of: Callable, params: Any, microbatches: Batch, copies: Copies | None
) -> tuple[Any, tuple[RowSums, Metrics]]:
    """Sums the gradients of the microbatches; RowSums come back as [M, B/M], sums of metrics as [M] or [M, copies].

    The objective is a sum over tokens, so adding up microbatches needs no weights. Sums are float32: in bfloat16 they
    stop growing at about 256 times what is added.
    """
    if jax.tree.leaves(microbatches)[0].shape[0] == 1:
        gradient, sums = gradient_of(params, jax.tree.map(lambda x: x[0], microbatches))
        return gradient, jax.tree.map(lambda x: x[None], sums)
    differentiate = copies.differentiate(gradient_of) if copies else gradient_of
    zeros = copies.zeros(params) if copies else optax.tree.zeros_like(params, dtype=jnp.float32)

    def add(total, microbatch):
        gradient, sums = differentiate(params, microbatch)
        return jax.tree.map(jnp.add, total, gradient), sums

    gradient, sums = jax.lax.scan(add, zeros, microbatches)
    return copies.sum(gradient) if copies else gradient, sums


def _loss_metrics(rows: RowSums, weight: jax.Array, optimizer_state: Any) -> dict[str, jax.Array]:
    """Figures of rows [M, B/M], which come back in the batch's own order [B], and of the optimizer."""
    metrics = {
        "loss": jnp.sum(rows.loss) / weight,
        "learning_rate": optimizer_state.hyperparams["learning_rate"],
        "finite_rows": jnp.isfinite(jnp.moveaxis(rows.loss, 0, 1).reshape(-1)),
    }
    if spikes := spike_state(optimizer_state):
        metrics |= {"grad_norm_limit": spikes.limit, "skips_in_a_row": spikes.in_a_row}
        metrics["row_loss"] = jnp.moveaxis(rows.loss / jnp.maximum(rows.weight, 1.0), 0, 1).reshape(-1)
    return metrics


def _by_source(rows: RowSums, microbatches: Batch, num_sources: int) -> dict[str, jax.Array]:
    """Of each source: sums of losses and their weights in the objective, float32 [S], and target tokens, int32 [S]."""
    hit = microbatches["source_ids"].reshape(-1)[None] == jnp.arange(num_sources)[:, None]
    tokens = jnp.sum(microbatches["loss_weights"] > 0, axis=-1, dtype=jnp.int32)
    values = {"source_loss": rows.loss, "source_weight": rows.weight, "source_tokens": tokens}
    return {key: jnp.sum(jnp.where(hit, x.reshape(-1)[None], 0), axis=-1) for key, x in values.items()}
