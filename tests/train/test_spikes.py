"""Skipped updates against optax run by hand over the accepted ones; roll backs and restarts to the bit."""

import collections
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lemur_jax.cluster.preemption import Interruption
from lemur_jax.models import decoder
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.train.losses import row_sums
from lemur_jax.train.optimizer import decay_mask, schedule
from lemur_jax.train.spikes import rollback_target, skip_spikes
from tests.helpers.planted import plant
from tests.helpers.runs import STEPS, asked_at, final_params, without_clock
from tests.helpers.tiny import first_state, placed, program_on, tiny_config


def test_rule_is_the_median_of_the_accepted_norms():
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.5, 2.0, 60)
    norms[[3, 20, 21, 40]] = [np.nan, 50.0, 60.0, np.inf]
    rule = skip_spikes(optax.sgd(1.0), factor=1.4, window=5)
    params = jnp.zeros(2)
    state = rule.init(params)
    accepted, expected, found = [], [], []
    for norm in norms:
        limit = 1.4 * np.median(accepted[-5:]) if len(accepted) >= 5 else np.inf
        expected.append(not (np.isfinite(norm) and norm <= limit))
        if not expected[-1]:
            accepted.append(norm)
        changes, state = rule.update(jnp.array([norm * 0.6, norm * -0.8]), state, params)
        found.append(bool(state.in_a_row > 0))
        np.testing.assert_allclose(changes, 0 if found[-1] else [norm * -0.6, norm * 0.8], rtol=1e-6)
    assert found == expected
    assert sum(found) > 6  # natural fluctuations too
    assert int(state.accepted) == len(accepted)


@pytest.fixture(scope="module")
def spiking():
    return tiny_config({"spikes.factor": 3.0, "spikes.window": 2})


def by_hand(config, program, *runs):
    """Parameters of optax over the batches {step: batch} of each run, with the gradient of a plain token mean."""
    options = config.optimizer
    rate = schedule(options, config.train.steps)
    adam = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.scale_by_adam(options.b1, options.b2, options.eps),
        optax.add_decayed_weights(options.weight_decay, mask=decay_mask(decoder.logical_axes(program.model))),
    )

    def loss(params, batch):
        bound = decoder.bind(program.model, program.compute, params)
        hidden, _, _ = bound(batch["tokens"], batch["positions"], bound.packed(batch["segment_ids"]))
        rows = row_sums(bound, hidden, batch["targets"], batch["loss_weights"])
        return jnp.sum(rows.loss) / jnp.sum(rows.weight)

    gradient_of = jax.jit(jax.grad(loss))
    for batches in runs:
        params = first_state(program).params
        state = adam.init(params)
        for step, batch in batches.items():
            changes, state = adam.update(gradient_of(params, batch), state, params)
            params = jax.tree.map(lambda p, c, step=step: p - rate(step) * c, params, changes)
        yield params


def constant(batch):
    """A batch of one token over and over: forty times the gradient of random tokens."""
    return dict(batch, tokens=np.full_like(batch["tokens"], 7), targets=np.full_like(batch["targets"], 7))


def test_planted_spikes_change_nothing(spiking, batch):
    program = program_on((1, 2, 1, 1), spiking)
    batch = dict(batch, loss_weights=np.ones_like(batch["loss_weights"]))
    poisoned = dict(batch, loss_weights=np.where(np.arange(64) == 9, np.nan, batch["loss_weights"]))
    planted = {1: poisoned, 4: constant(batch)}
    state = first_state(program)
    for step in range(6):
        state, metrics = program.step(state, placed(planted.get(step, batch), program))
        assert int(metrics["skips_in_a_row"]) == (step in planted)
    np.testing.assert_allclose(metrics["learning_rate"], schedule(spiking.optimizer, 10)(5), rtol=1e-6)
    with_spike = {step: planted.get(step, batch) for step in (0, 2, 3, 4, 5)}
    good, spoiled = by_hand(spiking, program, dict.fromkeys((0, 2, 3, 5), batch), with_spike)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-5), state.params, good)
    differences = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), spoiled, good)
    assert max(jax.tree.leaves(differences)) > 1e-3  # the spike would have been seen


@pytest.mark.parametrize(
    ("step", "in_a_row", "rolled_back_at", "target"),
    [(9, 3, 0, 6), (8, 3, 0, 3), (2, 2, 0, 0), (9, 3, 5, 6), (10, 3, 7, 7)],
)
def test_rollback_goes_to_the_last_regular_checkpoint_before_the_skips(
    step, in_a_row, rolled_back_at, target
):
    assert rollback_target(step, in_a_row, 3, rolled_back_at) == target


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, project):
    """A project in whose code some documents are one token over and over."""
    root = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(project, root, dirs_exist_ok=True)
    shutil.rmtree(root / "stores/code/train")
    plant(root)
    shutil.rmtree(root / "undisturbed", ignore_errors=True)
    return root


class Killed(Exception):
    """The end of a process."""


def kill(*_):
    raise Killed


def test_killed_run_skips_and_rolls_back_the_same(poisoned, train, tmp_path, monkeypatch):
    monkeypatch.chdir(poisoned)
    options = {"train.steps": STEPS, "checkpoint.keep": 2}
    out = " ".join(train(tmp_path / "alone", **options))
    records = read_metrics(tmp_path / "alone")
    kinds = collections.Counter(record["kind"] for record in records)
    assert kinds["skip"] >= 3, kinds
    assert kinds["rollback"] >= 1, kinds
    for record in records:
        if record["kind"] == "skip":
            assert any(name.startswith("code/poison-") for name in record["documents"])
    assert "update skipped, gradient norm" in out
    for polls in (5, 12):
        with monkeypatch.context() as process:
            process.setattr(Interruption, "should_stop", asked_at(polls, kill))
            with pytest.raises(Killed):
                train(tmp_path / "run", **options)
    train(tmp_path / "run", **options)
    jax.tree.map(
        np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(tmp_path / "alone")
    )
    assert without_clock(read_metrics(tmp_path / "run")) == without_clock(records)
