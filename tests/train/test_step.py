"""The update: the same number on every mesh and in any split, and the number that NumPy gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.models import decoder
from lemur_jax.train.losses import RowSums
from lemur_jax.train.objectives import Loss, Objective
from lemur_jax.train.state import shardings_of
from tests.helpers.tiny import first_state, placed, program_on, tiny_config

STEPS = 3


def losses(program, batch, steps=STEPS):
    state, batch = first_state(program), placed(batch, program)
    found = []
    for _ in range(steps):
        state, metrics = program.step(state, batch)
        found.append(float(metrics["loss"]))
    return found, jax.device_get(metrics), state


@pytest.fixture(scope="module")
def alone(batch):
    return losses(program_on((1, 1, 1, 1)), batch)


@pytest.mark.parametrize(
    ("shape", "microbatches", "chunk"),
    [
        ((1, 8, 1, 1), 1, 0), ((2, 2, 1, 2), 1, 0), ((1, 2, 2, 2), 1, 0),
        ((1, 1, 1, 1), 4, 0), ((1, 1, 1, 1), 1, 16), ((1, 1, 1, 1), 2, 32),
        # Positions and chunks are cut over devices.
        ((1, 2, 4, 1), 1, 16),
        # Gradients are summed over copies after the last microbatch.
        ((2, 2, 1, 2), 2, 0), ((4, 1, 2, 1), 2, 0),
    ],
)  # fmt: skip
def test_same_loss_on_every_mesh_and_in_any_split(alone, batch, shape, microbatches, chunk):
    config = tiny_config({"train.microbatches": microbatches, "compute.loss_chunk": chunk})
    program = program_on(shape, config)
    found, metrics, state = losses(program, batch)
    np.testing.assert_allclose(found, alone[0], rtol=1e-5)
    for key in ("grad_norm", "source_loss", "source_weight", "finite_rows"):
        np.testing.assert_allclose(metrics[key], alone[1][key], rtol=2e-5)
    assert int(state.step) == STEPS
    assert shardings_of(state.params) == shardings_of(program.state.params)


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1, 1), 1), ((2, 2, 1, 2), 2), ((1, 2, 2, 1), 1)])
def test_gradients_in_bfloat16_lose_no_frequent_token(batch, shape, microbatches):
    """Sums over all positions: in bfloat16 they stop growing at 256 times what is added."""
    batch = {**batch, "tokens": np.where(np.arange(64) % 8, 7, batch["tokens"])}
    batch = {key: np.concatenate([values] * 8) for key, values in batch.items()}
    options = {"optimizer.clip_norm": 0.0, "train.microbatches": microbatches, "train.batch_rows": 128}

    def gradient(dtype, shape):
        config = tiny_config({**options, "compute.dtype": dtype}, attention_bias="qkvo", mlp_bias=True)
        state = losses(program_on(shape, config), batch, steps=1)[2]
        return jax.device_get(state.optimizer.inner_state[1].mu)  # a tenth of it

    expected, found = gradient("float32", (1, 1, 1, 1)), gradient("bfloat16", shape)
    for (path, mine), true in zip(
        jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        assert np.linalg.norm(mine - true) < 0.03 * np.linalg.norm(true), jax.tree_util.keystr(path)


def count_rows(model, batch):
    """A loss whose gradient by each scale of the last norm is the number of rows."""
    rows = jnp.sum(batch["loss_weights"], axis=-1) * jnp.sum(model.final_norm.scale[...])
    return Loss(jnp.sum(rows), RowSums(loss=rows, z=None, weight=jnp.ones_like(rows)))


@pytest.mark.parametrize("copies", [1, 2])
def test_bfloat16_parameters_get_the_whole_sum_of_many_microbatches(copies):
    """A sum in bfloat16 would stop at 256 of the 1,024."""
    options = {"compute.param_dtype": "bfloat16", "data.sequence_length": 1, "optimizer.name": "adafactor"}
    options |= {"train.batch_rows": 2048, "train.microbatches": 1024, "optimizer.clip_norm": 0.0}
    config = tiny_config(options)
    program = program_on((copies, 1, 1, 1), config, Objective(loss=count_rows))
    batch = {name: jnp.ones(like.shape, like.dtype) for name, like in program.batch.items()}
    _, metrics = program.step(first_state(program), placed(batch, program))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(config.model.hidden_size), rtol=1e-5)


def test_policies_that_keep_every_product_compute_none_again():
    """On a mesh the products have gradients of their own, into which a policy must see all the same."""

    def flops(remat):
        config = tiny_config({"compute.remat": remat}, hidden_size=128, intermediate_size=512)
        program = program_on((1, 2, 1, 1), config)
        return program.step.lower(program.state, program.batch).compile().cost_analysis()["flops"]

    none, full = flops("none"), flops("full")
    assert full > 1.1 * none
    for remat in ("dots", "mlp_all"):
        assert flops(remat) < none + 0.1 * (full - none)


def test_a_kept_share_of_the_gate_changes_memory_alone(batch):
    """The numbers are those of an mlp in one part, also where `tensor` cuts it; half the gate is computed again."""
    kept = {"compute.remat": "mlp", "compute.gate_share": 0.5}

    def program(options, shape=(1, 1, 1, 1)):
        return program_on(shape, tiny_config(options, hidden_size=128, intermediate_size=512))

    def flops(options):
        made = program(options)
        return made.step.lower(made.state, made.batch).compile().cost_analysis()["flops"]

    found, metrics, _ = losses(program({}), batch)
    for shape in (1, 1, 1, 1), (1, 2, 1, 2):
        in_parts, others, _ = losses(program(kept, shape), batch)
        np.testing.assert_allclose(in_parts, found, rtol=1e-5)
        np.testing.assert_allclose(others["grad_norm"], metrics["grad_norm"], rtol=2e-5)
    none, whole, half = (
        flops(options) for options in ({"compute.remat": "mlp"}, {"compute.remat": "mlp_gate"}, kept)
    )
    assert 0.4 < (none - half) / (none - whole) < 0.6


def test_loss_is_the_weighted_token_mean(alone, batch):
    """Against float64: sum of weighted losses / sum of weights, not a mean of row means."""
    program = program_on((1, 1, 1, 1))
    logits = decoder.forward(
        program.model,
        program.compute,
        first_state(program).params,
        *(batch[key] for key in ("tokens", "positions", "segment_ids")),
    )
    logits = np.asarray(logits, np.float64)
    chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    token_loss = np.log(np.exp(logits).sum(-1)) - chosen
    weights = batch["loss_weights"].astype(np.float64)
    np.testing.assert_allclose(alone[0][0], (token_loss * weights).sum() / weights.sum(), rtol=1e-5)
    row_means = (token_loss * weights).sum(1) / np.maximum(weights.sum(1), 1)
    assert abs(alone[0][0] - row_means.mean()) > 1e-3  # the wrong mean is another number here


def test_learning_rate_and_sources_in_the_metrics(alone, batch):
    _, metrics, state = alone
    assert metrics["learning_rate"] == state.optimizer.hyperparams["learning_rate"]
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2)  # warmup 0, 0.005, then the peak
    np.testing.assert_allclose(metrics["source_weight"].sum(), batch["loss_weights"].sum())
    np.testing.assert_allclose(
        metrics["source_loss"].sum() / metrics["source_tokens"].sum(), alone[0][-1], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["int8", "float8", "float8_per_tensor"])
def test_narrow_products_change_losses_a_little(batch, dtype):
    expected, found = (
        losses(program_on((2, 2, 1, 2), tiny_config({"compute.product_dtype": each})), batch)[0]
        for each in ("", dtype)
    )
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    assert np.all(np.asarray(found) != np.asarray(expected))


def test_state_lies_where_the_rules_say(batch):
    state = losses(program_on((1, 4, 1, 2)), batch, steps=1)[2]
    assert shardings_of(state.optimizer.inner_state[1].mu) == shardings_of(state.params)
    assert state.params["layers"]["mlp"]["gate"].sharding.shard_shape((2, 64, 160)) == (2, 16, 80)


def test_finite_rows_name_the_bad_ones_through_microbatches(batch):
    config = tiny_config({"train.microbatches": 2})
    program = program_on((1, 2, 1, 1), config)
    state = first_state(program)
    bad = dict(batch, loss_weights=batch["loss_weights"].copy())
    bad["loss_weights"][5, 3] = np.nan
    _, metrics = program.step(state, placed(bad, program))
    assert np.flatnonzero(~np.asarray(metrics["finite_rows"])).tolist() == [5]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.batch_rows", 12, "batch_rows 12"),
        ("train.microbatches", 3, "microbatches 3"),
        ("data.sequence_length", 4096, "max_position_embeddings"),
        ("optimizer.warmup_steps", 10, "warmup_steps"),
        ("optimizer.learning_rate", 0.0, "learning_rate"),
        ("compute.product_dtype", "int4", "product_dtype"),
        ("compute.param_dtype", "float16", "param_dtype"),
    ],
)
def test_impossible_combination_is_named(key, value, words):
    with pytest.raises(UserError, match=words):
        program_on((1, 8, 1, 1), tiny_config({key: value}))
