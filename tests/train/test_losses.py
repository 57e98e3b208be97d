"""Cross-entropy and z-loss against NumPy in float64, and the logits that are never there at once."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.models import decoder
from lemur_jax.train.losses import row_sums
from tests.helpers.tiny import LENGTH, ROWS, first_state, placed, program_on, tiny_config

B, T, D, V = 3, 24, 8, 40
Z = 0.1


@pytest.mark.parametrize("chunk", [0, 8, 10, 100])  # 10 does not divide T: chunks of 8
def test_sums_and_gradient_against_float64(chunk):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    targets, weights = rng.integers(0, V, (B, T)), rng.random((B, T)) * (rng.random((B, T)) < 0.7)
    head = jnp.asarray(kernel, jnp.float32)
    model = types.SimpleNamespace(
        logits=lambda x: jnp.matmul(x, head, precision="highest"),
        compute=types.SimpleNamespace(loss_chunk=chunk, mesh=None),
    )

    def objective(hidden):
        sums = row_sums(model, hidden, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32))
        return jnp.sum(sums.loss + Z * sums.z), sums

    (_, sums), gradient = jax.value_and_grad(objective, has_aux=True)(jnp.asarray(hidden, jnp.float32))

    logits = hidden @ kernel
    log_z = np.log(np.exp(logits).sum(-1))
    hit = np.eye(V)[targets]
    np.testing.assert_allclose(sums.loss, ((log_z - (logits * hit).sum(-1)) * weights).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(sums.z, (log_z**2 * weights).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(sums.weight, weights.sum(-1), rtol=1e-6)
    share = np.exp(logits - log_z[..., None])
    upstream = (share - hit + 2 * Z * log_z[..., None] * share) * weights[..., None]
    np.testing.assert_allclose(gradient, upstream @ kernel.T, rtol=1e-4, atol=1e-5)


def test_the_step_trains_on_the_z_loss_and_logs_the_loss_without_it(batch):
    config = tiny_config({"optimizer.z_loss": Z})
    program = program_on((1, 1, 1, 1), config)
    state = first_state(program)

    def objective(params):
        logits = decoder.forward(
            program.model,
            program.compute,
            params,
            *(batch[k] for k in ("tokens", "positions", "segment_ids")),
        )
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        weights = batch["loss_weights"]
        loss = jnp.sum((log_z - chosen) * weights) / jnp.sum(weights)
        return loss + Z * jnp.sum(log_z**2 * weights) / jnp.sum(weights), loss

    gradient, loss = jax.jit(jax.grad(objective, has_aux=True))(state.params)
    _, metrics = program.step(state, placed(batch, program))
    norm = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def largest_with_vocabulary(chunk):
    """Elements of the largest array of the whole update that has the vocabulary and is no parameter."""
    # A prime vocabulary, the size of nothing else.
    config = tiny_config({"compute.loss_chunk": chunk}, vocab_size=499)
    program = program_on((1, 1, 1, 1), config)
    jaxpr = jax.make_jaxpr(program.step)(program.state, program.batch)
    sizes = [0]

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                shape = getattr(variable.aval, "shape", ())
                if 499 in shape:
                    sizes.append(int(np.prod(shape)))
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jaxpr.jaxpr)
    return max(sizes)


def test_logits_of_all_positions_never_exist():
    whole = ROWS * LENGTH * 499
    assert largest_with_vocabulary(0) == whole
    assert largest_with_vocabulary(16) == whole // (LENGTH // 16)
    assert largest_with_vocabulary(24) == whole // (LENGTH // 16)  # 24 does not divide 64
