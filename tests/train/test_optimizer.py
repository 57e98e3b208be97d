"""AdamW, clipping, decay mask and schedule against torch's, which shares no code with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lemur_jax.models.llama import logical_axes
from lemur_jax.models.presets import preset
from lemur_jax.train.optimizer import decayed, make_optimizer, schedule
from tests.train.tiny import tiny_config

AXES = {"matrix": ("embed", "mlp"), "layers": {"scale": ("layers", "norm")}}


def test_ten_updates_equal_torch():
    config = tiny_config()
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(4, 3)), "layers": {"scale": rng.normal(size=(2, 4))}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params) for _ in range(10)
    ]

    optimizer = make_optimizer(config.optimizer, 10, AXES)
    state = optimizer.init(params)
    theirs = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in jax.tree.leaves(params)]
    scale, matrix = theirs
    reference = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": 0.1}, {"params": [scale], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step, gradient in enumerate(gradients):
        changes, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        for leaf, value in zip(theirs, jax.tree.leaves(gradient), strict=True):
            leaf.grad = torch.tensor(np.asarray(value))
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        rate = cosine(step)
        assert float(state.hyperparams["learning_rate"]) == pytest.approx(rate, rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for ours, leaf in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, leaf.detach().numpy(), atol=2e-6)


def cosine(step, steps=10, warmup=2, peak=1e-2, end=1e-3):
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))


def test_schedule_ends_where_the_run_ends():
    """Counted in updates: Lemur's own run ended at 3.996e-5 where its log said 1.98e-5."""
    rates = schedule(dict(learning_rate=4e-5, final_learning_rate=4e-6, warmup_steps=0), 21_458)
    assert float(rates(0)) == pytest.approx(4e-5)
    assert float(rates(10_729)) == pytest.approx(2.2e-5)
    assert float(rates(21_458)) == pytest.approx(4e-6)


def test_norm_scales_are_not_decayed_even_stacked():
    mask = decayed(logical_axes(preset("tiny")))
    flat = {
        jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_flatten_with_path(mask)[0]
    }
    assert {key for key, value in flat.items() if not value} == {key for key in flat if "norm" in key}
    assert len([value for value in flat.values() if not value]) == 3
