"""Preference losses: formulas against NumPy and TRL, packed rows against one conversation at a time."""

import collections
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.models import decoder
from lemur_jax.train import preferences
from lemur_jax.train.config import PreferenceConfig
from lemur_jax.train.preferences import exchange_completions
from lemur_jax.train.state import start
from tests.helpers.tiny import LENGTH, placed, program_on, tiny_config

PAIRS = 7
OPTIONS = {"beta": 0.3, "margin": 0.7, "desirable_weight": 1.2, "undesirable_weight": 0.8}
LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")


def sums(seed=0):
    """Log-ratios or, all negative, mean log-probabilities of chosen and rejected."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, PAIRS)).astype(np.float32) * 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def in_float64(loss, chosen, rejected, kl=0.0):
    """Mean loss by the papers' formulas."""
    beta = OPTIONS["beta"]
    if loss == "dpo":
        return -np.log(sigmoid(beta * (chosen - rejected))).mean()
    if loss == "ipo":
        return ((chosen - rejected - 1 / (2 * beta)) ** 2).mean()
    if loss == "simpo":
        return -np.log(sigmoid(beta * (chosen - rejected) - OPTIONS["margin"])).mean()
    if loss == "orpo":
        odds = [np.exp(x) / (1 - np.exp(x)) for x in (chosen, rejected)]
        return -beta * np.log(sigmoid(np.log(odds[0] / odds[1]))).mean()
    good = OPTIONS["desirable_weight"] * (1 - sigmoid(beta * (chosen - kl)))
    bad = OPTIONS["undesirable_weight"] * (1 - sigmoid(beta * (kl - rejected)))
    return np.concatenate([good, bad]).mean()


def ours(loss, chosen, rejected, kl=0.0):
    options = PreferenceConfig(loss=loss, **OPTIONS)
    if loss == "kto":
        return jnp.mean(jnp.concatenate(preferences.kto(options, chosen, rejected, kl)))
    return jnp.mean(preferences.PAIRS[loss][0](options, chosen, rejected))


def arguments(loss):
    scores = sums()
    return -np.abs(scores) if loss in ("simpo", "orpo") else scores


class Model:
    """Returns given log-probabilities of tokens, as a TRL trainer asks for them."""

    training = True

    def __init__(self, *log_probs):
        self.log_probs = list(log_probs)

    def __call__(self, **_):
        log_probs = self.log_probs.pop(0)
        zeros = log_probs.detach() * 0
        correct = types.SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), loss=zeros.sum()
        )
        correct.accuracy = correct.num_correct_tokens = correct.num_tokens = zeros
        return correct


def trainer(**attributes):
    made = mock.MagicMock(
        beta=OPTIONS["beta"], label_smoothing=0.0, aux_loss_enabled=False, use_weighting=False, **attributes
    )
    made.accelerator.gather_for_metrics = lambda value: value
    made.accelerator.device = "cpu"
    made._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    made._total_train_tokens, made._tp_size = 0, 1
    return made


def theirs(loss, torch, chosen, rejected, lengths):
    """TRL's loss of summed log-ratios (log-probabilities) of completions of 1 + `lengths` tokens."""
    if loss in ("simpo", "orpo"):
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer

        made = trainer(loss_type="simpo", simpo_gamma=OPTIONS["margin"], alpha=0.0)
        if loss == "orpo":
            return -ORPOTrainer.odds_ratio_loss(made, chosen, rejected)[0].mean()
        return CPOTrainer.cpo_loss(made, chosen, rejected)[0].mean()
    from trl import DPOTrainer, KTOTrainer

    summed = torch.cat([chosen, rejected])
    tokens = torch.zeros(2 * PAIRS, lengths.max() + 1, dtype=torch.long)
    mask = (torch.arange(tokens.shape[1])[None] <= torch.tensor(lengths)[:, None]).long()
    mask[:, 0] = 0
    log_probs = mask[:, 1:] * (summed / mask.sum(1))[:, None]
    zeros = torch.zeros(2 * PAIRS)
    inputs = {"input_ids": tokens, "attention_mask": mask * 0 + 1, "completion_mask": mask}
    if loss == "kto":
        made = trainer(loss_type="kto", calculate_KL=True, precompute_ref_logps=True)
        made.desirable_weight, made.undesirable_weight = (
            OPTIONS[key] for key in ("desirable_weight", "undesirable_weight")
        )
        made._compute_kl_logps = lambda model, batch: zeros + 0.2
        label = torch.arange(2 * PAIRS) < PAIRS
        inputs |= {"label": label, "ref_logps": zeros, "ref_KL_logps": zeros}
        return KTOTrainer._compute_loss(made, Model(log_probs), inputs, False)
    made = trainer(
        loss_types=["sigmoid" if loss == "dpo" else loss], loss_weights=[1.0], ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl",
    )  # fmt: skip
    inputs |= {"ref_chosen_logps": zeros[:PAIRS], "ref_rejected_logps": zeros[:PAIRS]}
    return DPOTrainer._compute_loss(made, Model(log_probs), inputs, False)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_equal_those_of_trl(loss):
    pytest.importorskip("trl")
    import torch

    scores = arguments(loss)
    lengths = np.random.default_rng(3).integers(2, 9, 2 * PAIRS)
    leaves = [torch.tensor(side, requires_grad=True) for side in scores]
    expected = theirs(loss, torch, *leaves, lengths)
    expected.backward()
    counts = (
        lengths.reshape(2, PAIRS).astype(np.float32) if loss == "ipo" else np.ones((2, PAIRS), np.float32)
    )

    def of_sums(chosen, rejected):
        return ours(loss, chosen / counts[0], rejected / counts[1], 0.2)

    found, gradients = jax.value_and_grad(of_sums, (0, 1))(*map(jnp.asarray, scores))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-6)


@pytest.fixture(scope="module")
def packed():
    """Rows with one to three pairs each, and conversations alone by (row, segment): (tokens, supervised)."""
    rng = np.random.default_rng(5)
    batch = {
        key: np.zeros((16, LENGTH), np.int32) for key in ("tokens", "targets", "segment_ids", "positions")
    }
    batch |= {"loss_weights": np.zeros((16, LENGTH), np.float32), "source_ids": np.zeros(16, np.int32)}
    alone = {}
    for row in range(16):
        at = 0
        for segment in range(2, 2 + 2 * rng.integers(1, 4)):
            size, prompt = int(rng.integers(6, 11)), int(rng.integers(2, 4))
            tokens = rng.integers(1, 512, size)
            supervised = np.arange(size) >= prompt
            here = slice(at, at + size)
            batch["tokens"][row, here], batch["segment_ids"][row, here] = tokens, segment
            batch["positions"][row, here] = np.arange(size)
            batch["targets"][row, at : at + size - 1] = tokens[1:]
            batch["loss_weights"][row, at : at + size - 1] = supervised[1:]
            alone[row, segment] = tokens, supervised
            at += size
    return batch, alone


def scores_alone(config, params, conversations):
    """For each: sum of supervised log-probabilities, their number, and the same of all targets; float64 [n, 4]."""
    tokens, supervised, real = (np.zeros((len(conversations), LENGTH), np.int32) for _ in range(3))
    for row, (ids, mask) in enumerate(conversations):
        tokens[row, : len(ids)], supervised[row, : len(ids)], real[row, : len(ids)] = ids, mask, 1
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    logits = jax.jit(decoder.forward, static_argnums=(0, 1))(
        config.model, decoder.Compute(), params, tokens, positions, real
    )
    logits = np.asarray(logits, np.float64)[:, :-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = np.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    masks = supervised[:, 1:], real[:, 1:]
    return np.stack([x.sum(-1) for mask in masks for x in (each * mask, mask)], axis=-1)


@pytest.mark.parametrize(
    ("loss", "microbatches"), [("dpo", 2), ("ipo", 1), ("simpo", 1), ("orpo", 1), ("kto", 1)]
)
def test_packed_rows_equal_conversations_alone(packed, loss, microbatches):
    batch, alone = packed
    config = tiny_config({"preference.loss": loss, "train.microbatches": microbatches, "optimizer.warmup_steps": 0,
                          **{f"preference.{key}": value for key, value in OPTIONS.items()}})  # fmt: skip
    program = program_on((1, 2, 1, 1), config)
    params, other = (decoder.init_params(config.model, jax.random.key(seed)) for seed in (0, 1))
    params, other = jax.device_put(
        (params, other), jax.tree.map(lambda leaf: leaf.sharding, (program.state.params,) * 2)
    )
    frozen = None if program.state.frozen is None else other
    assert (frozen is None) == (loss in ("simpo", "orpo"))
    conversations = [alone[key] for key in sorted(alone)]
    table = scores_alone(config, params, conversations)
    if frozen is not None:
        table[:, 0] -= scores_alone(config, other, conversations)[:, 0]
    kl = kl_by_hand(config, params, other, alone) if loss == "kto" else 0.0
    state = start(params, program.optimizer, program.state, frozen=frozen)
    _, metrics = program.step(state, placed(batch, program))

    scores = table[:, 0] / (table[:, 1] if loss in ("ipo", "simpo", "orpo") else 1)
    expected = in_float64(loss, scores[::2], scores[1::2], kl)
    if loss == "orpo":
        expected -= table[::2, 2].sum() / table[::2, 3].sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
    assert metrics["source_weight"].sum() == len(alone) / (1 if loss == "kto" else 2)
    assert metrics["source_tokens"].sum() == batch["loss_weights"].sum()
    np.testing.assert_allclose(metrics["objective/accuracy"], (scores[::2] > scores[1::2]).mean(), rtol=1e-6)
    assert 0 < metrics["grad_norm"] < np.inf


def exchanged(alone):
    """(row, segment) -> prompt and the completion of the document before it, around each row."""
    made = {}
    for (row, segment), (tokens, supervised) in alone.items():
        count = max(s for r, s in alone if r == row) // 2
        before = 2 * (segment // 2 - 1 or count) + segment % 2
        others, theirs = alone[row, before]
        made[row, segment] = (
            np.concatenate([tokens[~supervised], others[theirs]]),
            np.arange((~supervised).sum() + theirs.sum()) >= (~supervised).sum(),
        )
    return made


def kl_by_hand(config, params, reference, alone):
    rows = collections.Counter(row for row, _ in alone)
    mismatched = [each for (row, _), each in exchanged(alone).items() if rows[row] > 2]
    found = np.subtract(*(scores_alone(config, each, mismatched)[:, 0] for each in (params, reference)))
    assert np.mean(found) != 0
    return max(np.mean(found), 0.0)


def test_completions_are_exchanged_within_a_row(packed):
    batch, alone = packed
    other = jax.device_get(exchange_completions(batch))
    for (row, segment), (tokens, supervised) in exchanged(alone).items():
        (here,) = np.nonzero(other["segment_ids"][row] == segment)
        np.testing.assert_array_equal(np.diff(here), 1)
        np.testing.assert_array_equal(other["tokens"][row, here], tokens)
        np.testing.assert_array_equal(other["positions"][row, here], np.arange(len(tokens)))
        np.testing.assert_array_equal(other["targets"][row, here[:-1]], tokens[1:])
        np.testing.assert_array_equal(other["loss_weights"][row, here[:-1]], supervised[1:])
        assert other["loss_weights"][row, here[-1]] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_equal_the_formulas_in_float64(loss):
    chosen, rejected = arguments(loss)
    expected = in_float64(loss, chosen.astype(np.float64), rejected.astype(np.float64), 0.2)
    np.testing.assert_allclose(ours(loss, chosen, rejected, 0.2), expected, rtol=1e-5)
