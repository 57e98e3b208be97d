"""Mixtures of experts: the router's losses against transformers, and the same step on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lemur_jax.infer.generate import generate
from lemur_jax.infer.session import make_session
from lemur_jax.models.experts import choose, router_statistics
from lemur_jax.models.presets import preset
from tests.helpers.sessions import fresh_params, mesh_of
from tests.helpers.tiny import first_state, placed, program_on, rows, tiny_config

EXPERTS = dict(num_experts=8, experts_per_token=3, intermediate_size=32)
LOSSES = {"optimizer.router_balance_loss": 0.5, "optimizer.router_z_loss": 0.1}


def trained(mesh, options=None):
    """(losses of three steps, last metrics), on rows with padding."""
    batch = rows()
    batch["segment_ids"][:, 50:], batch["loss_weights"][:, 50:] = 0, 0
    program = program_on(mesh, tiny_config({**LOSSES, **(options or {})}, **EXPERTS))
    state, batch = first_state(program), placed(batch, program)
    found = []
    for _ in range(3):
        state, metrics = program.step(state, batch)
        found.append(float(metrics["loss"]))
    return found, jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone():
    return trained((1, 1, 1, 1))


MESHES = [
    dict(expert=4),
    dict(fsdp=2, expert=2, tensor=2),
    pytest.param(dict(expert=2, sequence=2, data=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
def test_same_step_on_every_mesh(alone, sizes):
    found, metrics = trained({"fsdp": 1, **sizes})
    np.testing.assert_allclose(found, alone[0], rtol=1e-5)
    for key in ("grad_norm", *(f"objective/router_{name}" for name in ("balance", "z", "max_load"))):
        np.testing.assert_allclose(metrics[key], alone[1][key], rtol=2e-5)


@pytest.mark.slow
def test_router_losses_change_the_gradient(alone):
    _, metrics = trained((1, 1, 1, 1), dict.fromkeys(LOSSES, 0.0))
    assert abs(metrics["grad_norm"] - alone[1]["grad_norm"]) > 1e-4


def test_statistics_against_transformers():
    logits = np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)
    valid = np.arange(20)[None] < np.array([[20], [13]])
    weights, chosen = choose(jnp.asarray(logits), 3, normalized=True)
    found = router_statistics(jnp.asarray(logits), chosen, jnp.asarray(valid))
    theirs = load_balancing_loss_func((torch.tensor(logits.reshape(-1, 8)),), 8, 3, torch.tensor(valid))
    np.testing.assert_allclose(found["balance"], theirs, rtol=1e-5)
    z = torch.logsumexp(torch.tensor(logits[valid]), -1).square().mean()
    np.testing.assert_allclose(found["z"], z, rtol=1e-5)
    load = np.bincount(np.asarray(chosen)[valid].ravel(), minlength=8)
    np.testing.assert_allclose(found["max_load"], load.max() / load.mean(), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.slow
def test_sharded_experts_generate_the_same_tokens():
    model = preset("tiny", **EXPERTS, initializer_range=0.2)
    params = fresh_params(model)
    prompts = [np.random.default_rng(row).integers(0, 512, 20 + 9 * row).tolist() for row in range(4)]
    answers = []
    for mesh in ("", "expert=4", "fsdp=2,expert=2,tensor=2"):
        session = make_session(model, params, mesh_of(mesh), "float32")
        found = generate(session, prompts, max_new_tokens=64, stop_ids=[])
        answers.append([list(answer.tokens) for answer in found])
    assert answers[1] == answers[0] == answers[2]
    assert len({tuple(answer) for answer in answers[0]}) == 4
