"""Objectives: the step adds and divides whatever they sum, on every mesh and in any split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.models import decoder
from lemur_jax.train.losses import RowSums
from lemur_jax.train.objectives import Loss, Objective, token_logprobs
from tests.helpers.tiny import LENGTH, ROWS, first_state, placed, program_on, tiny_config


def policy_loss(model, batch):
    """A policy gradient with advantages by token, weighted by row."""
    logprobs = token_logprobs(model, batch)
    weights = batch["loss_weights"] * batch["row_weights"][:, None]
    losses = -batch["advantages"] * logprobs * weights
    rows = RowSums(loss=jnp.sum(losses, axis=-1), z=None, weight=jnp.sum(weights, axis=-1))
    metrics = {"logprob": (jnp.sum(logprobs * batch["loss_weights"]), jnp.sum(batch["loss_weights"]))}
    return Loss(jnp.sum(rows.loss), rows, metrics)


OBJECTIVE = Objective(loss=policy_loss, arrays={"advantages": (2, "float32"), "row_weights": (1, "float32")})


@pytest.fixture(scope="module")
def more(batch):
    rng = np.random.default_rng(1)
    advantages = rng.normal(size=(ROWS, LENGTH)).astype(np.float32)
    return batch | {"advantages": advantages, "row_weights": rng.random(ROWS).astype(np.float32)}


def step(batch, shape, options=None):
    program = program_on(shape, tiny_config(options), OBJECTIVE)
    _, metrics = program.step(first_state(program), placed(batch, program))
    return program, jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone(more):
    return step(more, (1, 1, 1, 1))


def test_a_policy_loss_equals_numpy(alone, more):
    program, metrics = alone
    arrays = (more[key] for key in ("tokens", "positions", "segment_ids"))
    logits = decoder.forward(program.model, program.compute, first_state(program).params, *arrays)
    logits = np.asarray(logits, np.float64)
    chosen = np.take_along_axis(logits, more["targets"][..., None], axis=-1)[..., 0]
    logprobs = chosen - np.log(np.exp(logits).sum(-1))
    weights = more["loss_weights"] * more["row_weights"][:, None]
    expected = -(more["advantages"] * logprobs * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    mean = (logprobs * more["loss_weights"]).sum() / more["loss_weights"].sum()
    np.testing.assert_allclose(metrics["objective/logprob"], mean, rtol=1e-5)


@pytest.mark.parametrize(("shape", "microbatches", "chunk"), [((1, 1, 1, 1), 4, 16), ((1, 2, 2, 2), 2, 16)])
def test_same_update_in_any_split(alone, more, shape, microbatches, chunk):
    options = {"train.microbatches": microbatches, "compute.loss_chunk": chunk}
    _, metrics = step(more, shape, options)
    for key in ("loss", "grad_norm", "source_weight"):
        np.testing.assert_allclose(metrics[key], alone[1][key], rtol=2e-5)
    np.testing.assert_allclose(metrics["objective/logprob"], alone[1]["objective/logprob"], rtol=1e-5)
