"""AdamW, clipping, decay mask and schedule against torch's, which shares no code with optax.

Adafactor and Muon against optax used directly, on a tree that is not sharded and whose layers lie apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax import contrib

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import AdapterConfig
from lemur_jax.models.decoder import abstract_params, logical_axes
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.train.config import OPTIMIZER_NAMES, OptimizerConfig
from lemur_jax.train.optimizer import OPTIMIZERS, decay_mask, make_optimizer, schedule
from lemur_jax.train.state import run_state, shardings_of
from tests.helpers.tiny import program_on, tiny_config

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


@pytest.mark.parametrize(("name", "updates"), [("adamw", 3000), ("adafactor", 6000)])
def test_second_moments_of_bfloat16_parameters_follow_smaller_gradients(name, updates):
    """In bfloat16 they would never get smaller, nor would the step of a gradient that became a tenth grow again."""
    options = OptimizerConfig(name=name, b2=0.999, learning_rate=1.0, final_learning_rate=1.0, clip_norm=0)
    optimizer = make_optimizer(options, updates, AXES)

    @jax.jit
    def last_change(params):
        def update(carry, step):
            gradient = jax.tree.map(lambda p: jnp.where(step < 1000, 1.0, 0.1) * jnp.ones(p.shape), params)
            changes, state = optimizer.update(gradient, carry[0], params)
            return (state, changes), None

        start = optimizer.init(params), jax.tree.map(lambda p: jnp.zeros(p.shape), params)
        return jax.lax.scan(update, start, jnp.arange(updates))[0][1]

    params = {"matrix": jnp.zeros((4, 3)), "layers": {"scale": jnp.zeros((2, 4))}}
    expected, found = last_change(params), last_change(optax.tree.cast(params, jnp.bfloat16))
    assert_equal(found, expected)


def test_schedule_ends_where_the_run_ends():
    """Counted in updates: Lemur's own run ended at 3.996e-5 where its log said 1.98e-5."""
    rates = schedule(OptimizerConfig(learning_rate=4e-5, final_learning_rate=4e-6, warmup_steps=0), 21_458)
    assert float(rates(0)) == pytest.approx(4e-5)
    assert float(rates(10_729)) == pytest.approx(2.2e-5)
    assert float(rates(21_458)) == pytest.approx(4e-6)


def test_norm_scales_are_not_decayed_even_stacked():
    mask = decay_mask(logical_axes(preset("tiny")))
    flat = {
        jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_flatten_with_path(mask)[0]
    }
    assert {key for key, value in flat.items() if not value} == {key for key in flat if "norm" in key}
    assert len([value for value in flat.values() if not value]) == 3


RATE, DECAY = 0.01, 0.1


def options(name):
    return OptimizerConfig(
        name=name, learning_rate=RATE, final_learning_rate=RATE, warmup_steps=0, clip_norm=0.0
    )


def sharded_updates(name, mesh_shape=(1, 4, 1, 2), steps=3):
    """(parameters before, gradients, parameters after) of a model whose matrices are large enough to be factored."""
    config = tiny_config({"optimizer": options(name)}, hidden_size=256, intermediate_size=512, head_dim=128)
    program = program_on(mesh_shape, config)
    rng = np.random.default_rng(0)
    shapes = abstract_params(program.model)
    first = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    gradients = [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        for _ in range(steps)
    ]
    for step, gradient in enumerate(gradients):
        for leaf in jax.tree.leaves(gradient["layers"]):
            leaf[1:] *= (
                1 + 3 * step
            )  # faster than what is remembered: these are clipped, the first layer's are not
    where = shardings_of(program.state)
    params = jax.device_put(first, where.params)
    state = jax.jit(program.optimizer.init, out_shardings=where.optimizer)(params)

    def update(params, state, gradient):
        changes, state = program.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    update = jax.jit(update, out_shardings=(where.params, where.optimizer))
    for gradient in gradients:
        params, state = update(params, state, jax.device_put(gradient, where.params))
    return first, gradients, jax.device_get(params)


def alone(optimizer, first, gradients):
    state, params = optimizer.init(first), first
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        changes, state = update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    return params


def assert_equal(ours, theirs):
    for (path, mine), other in zip(
        jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(mine, other, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_adafactor_equals_optax_on_each_layer():
    """Clipped and factored layer by layer: one layer's large update does not shrink the others'."""
    first, gradients, ours = sharded_updates("adafactor")
    for layer in range(len(first["layers"]["mlp"]["gate"])):

        def own(tree, layer=layer):
            return {**tree, "layers": jax.tree.map(lambda leaf: leaf[layer], tree["layers"])}

        reference = optax.adafactor(
            RATE,
            multiply_by_parameter_scale=False,
            weight_decay_rate=RATE * DECAY,
            weight_decay_mask=lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, _: "norm" not in jax.tree_util.keystr(path), tree
            ),
        )
        assert_equal(own(ours), alone(reference, own(first), [own(gradient) for gradient in gradients]))


def test_muon_equals_optax_on_each_layers_own_matrices():
    first, gradients, ours = sharded_updates("muon")
    first, gradients, ours = (apart(tree) for tree in (first, gradients, ours))
    reference = contrib.muon(RATE, weight_decay=DECAY, adam_b2=0.95, consistent_rms=0.2)
    embedding = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95, nesterov=True),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(RATE),
    )
    for name, leaf in first.items():
        # Embedding and head are not orthogonalized.
        optimizer = embedding if name.startswith(("['embed']", "['head']")) else reference
        assert_equal(ours[name], alone(optimizer, leaf, [gradient[name] for gradient in gradients]))


def apart(tree):
    """Every layer's matrices as [D, all the rest] or [all the rest, D], by name and layer; other leaves as they are."""
    if isinstance(tree, list):
        return [apart(each) for each in tree]
    axes = jax.tree_util.tree_flatten_with_path(
        logical_axes(preset("tiny", hidden_size=256)), is_leaf=lambda x: isinstance(x, tuple)
    )[0]
    found = {}
    for (path, names), leaf in zip(axes, jax.tree.leaves(tree), strict=True):
        name = jax.tree_util.keystr(path)
        if names[0] != "layers":
            found[name] = leaf
            continue
        for layer, matrix in enumerate(leaf):
            if names[-1] == "embed":
                matrix = matrix.reshape(-1, 256)
            elif names[1] == "embed":
                matrix = matrix.reshape(256, -1)
            found[f"{name} {layer}"] = matrix
    return found


@pytest.mark.parametrize(("name", "share"), [("adamw", 2.0), ("muon", 1.2), ("adafactor", 0.05)])
def test_every_state_is_cut_like_its_parameter(name, share):
    """Bytes a device, against those of the parameters, on a mesh of eight."""
    config = tiny_config({"optimizer.name": name}, hidden_size=256, intermediate_size=512, head_dim=128)
    program = program_on((1, 8, 1, 1), config)
    cut = [leaf for leaf in jax.tree.leaves(program.state.optimizer) if leaf.size > 4096]
    assert all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in cut if 256 in leaf.shape)

    def held(tree):
        return sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))

    assert held(program.state.optimizer) < share * held(program.state.params) * 1.05


def test_moments_in_bfloat16():
    config = tiny_config({"optimizer.moments_dtype": "bfloat16"})
    state = program_on((1, 8, 1, 1), config).state.optimizer.inner_state[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.mu)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.nu)} == {"float32"}


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match=r"'adam': .*'adamw', 'adafactor', 'muon'; did you mean 'adamw'\?"):
        OptimizerConfig(name="adam")
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES


def test_a_large_leaf_without_a_parameter_is_refused():
    mesh = make_mesh({"fsdp": 8})
    odd = optax.GradientTransformation(lambda params: np.zeros(10_000), lambda g, s, p=None: (g, s))
    with pytest.raises(UserError, match="no sharding rule"):
        run_state(preset("tiny"), AdapterConfig(), "float32", odd, mesh)
