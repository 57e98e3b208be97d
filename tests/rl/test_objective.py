"""Advantages and policy losses against NumPy in float64, and against TRL's GRPOTrainer where it is installed."""

import collections
import types

import numpy as np
import pytest
import torch

from lemur_jax.rl import objective
from lemur_jax.rl.config import RlConfig
from lemur_jax.rl.objective import advantages, policy
from lemur_jax.train.objectives import REFERENCE

B, T = 6, 11
CASES = [
    {"algorithm": "grpo"},
    {"algorithm": "dr_grpo", "kl": 0.1},
    {"algorithm": "dapo", "clip_high": 0.05, "importance": "sequence"},
    {"algorithm": "dapo", "clip_low": 0.1, "kl": 0.05},
]


@pytest.fixture
def arrays(monkeypatch):
    """New, old and reference log-probabilities, advantages and a ragged mask with a hole; no row is empty."""
    rng = np.random.default_rng(0)
    new, reference = (-rng.exponential(size=(B, T)).astype(np.float32) for _ in range(2))
    mask = (np.arange(T) < rng.integers(3, T + 1, B)[:, None]).astype(np.float32)
    mask[:, 1] = 0
    monkeypatch.setattr(objective, "token_logprobs", lambda *_: new)
    return new, (new + rng.normal(size=(B, T)) / 3).astype(np.float32), reference, rng.normal(size=B), mask


def ours(options, arrays):
    """The loss, and the metrics as (sum, weight)."""
    _, old, reference, scores, mask = arrays
    batch = {"loss_weights": mask, "sampling_logprobs": old, "advantages": scores[:, None].astype(np.float32)}
    found = policy(options).loss(None, batch | {REFERENCE: reference})
    return float(found.rows.loss.sum() / found.rows.weight.sum()), found.metrics


@pytest.mark.parametrize("changes", CASES)
def test_losses_in_float64(arrays, changes):
    options = RlConfig(**changes)
    arrays[4][2] = 0  # an episode that does not train counts in no mean
    new, old, reference, scores, mask = (array.astype(np.float64) for array in arrays)
    per_row, outside = [], 0
    for b in np.flatnonzero(mask.any(1)):
        own = np.flatnonzero(mask[b])
        difference = new[b, own] - old[b, own]
        if options.importance == "sequence":
            difference = np.full(len(own), difference.mean())
        ratio = np.exp(difference)
        low, high = 1 - options.clip_low, 1 + options.clip_high
        outside += np.sum((ratio < low) | (ratio > high))
        losses = [-min(r * scores[b], min(max(r, low), high) * scores[b]) for r in ratio]
        excess = reference[b, own] - new[b, own]
        per_row.append(losses + options.kl * (np.exp(excess) - excess - 1))
    expected = {
        "grpo": np.mean([row.mean() for row in per_row]),
        "dr_grpo": sum(row.sum() for row in per_row) / (len(per_row) * T),
        "dapo": np.concatenate(per_row).mean(),
    }[options.algorithm]
    loss, metrics = ours(options, arrays)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert tuple(map(int, metrics["clip_fraction"])) == (outside, mask.sum())
    assert 0 < outside < mask.sum()


@pytest.mark.parametrize("changes", CASES)
def test_losses_of_trl(arrays, changes):
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed: pip install trl")
    options = RlConfig(**changes)
    new, old, reference, scores, mask = map(torch.tensor, arrays)
    accelerator = types.SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, new, None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level=options.importance, beta=options.kl, loss_type=options.algorithm,
        epsilon_low=options.clip_low, epsilon_high=options.clip_high, max_completion_length=T,
        model=types.SimpleNamespace(training=False), current_gradient_accumulation_steps=1,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=accelerator, _entropy_bonus_enabled=False,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": mask, "advantages": scores.float(), "old_per_token_logps": old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    assert ours(options, arrays)[0] == pytest.approx(float(expected), abs=1e-5)


def test_advantages():
    rewards = np.array([[1.0, 0.0, 0.5, 9.0], [2.0, 2.0, 2.0, 2.0]])
    valid = np.array([[True, True, True, False], [True] * 4])
    kept = rewards[0, :3]
    expected = {
        "grpo": (kept - kept.mean()) / (torch.tensor(kept).std().item() + 1e-4),
        "dr_grpo": kept - kept.mean(),
        "rloo": [reward - np.delete(kept, index).mean() for index, reward in enumerate(kept)],
    }
    for algorithm, values in expected.items():
        found = advantages(rewards, valid, algorithm)
        np.testing.assert_allclose(found[0], [*values, 0], atol=1e-12)
        np.testing.assert_array_equal(found[1], 0)
    assert not advantages(rewards, np.zeros_like(valid), "grpo").any()


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_have_no_advantage(algorithm):
    """Eight episodes with 0.1 in each of two turns: their mean in float64 is another number."""
    rewards = np.full((1, 8, 2), 0.1 + 0.1)
    assert (rewards != rewards.sum(1, keepdims=True) / 8).all()
    assert not advantages(rewards, np.ones_like(rewards, bool), algorithm).any()
    rewards[0, 0] += 1e-6
    assert advantages(rewards, np.ones_like(rewards, bool), algorithm).all()
