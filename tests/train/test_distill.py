"""Distillation against torch and NumPy, and a student that comes nearer to a teacher of another size."""

import jax
import numpy as np
import pytest
import torch

from lemur_jax.common.errors import UserError
from lemur_jax.config import replace
from lemur_jax.models import decoder
from lemur_jax.train.config import DistillConfig
from lemur_jax.train.distill import distillation, divergence
from lemur_jax.train.initial import InitialParams
from lemur_jax.train.state import start
from tests.helpers.runs import write_model
from tests.helpers.tiny import first_state, placed, program_on, tiny_config

V = 23


@pytest.fixture
def logits():
    """Of student and teacher, float32 [4, 7, V]."""
    return np.random.default_rng(0).normal(size=(2, 4, 7, V)).astype(np.float32) * 2


@pytest.mark.parametrize("reverse", [False, True])
def test_all_tokens_give_the_whole_divergence(logits, reverse):
    """Values and gradients of torch's."""
    student, teacher = (torch.tensor(array, requires_grad=True) for array in logits)
    logprobs = [torch.log_softmax(array, -1) for array in (teacher, student)]
    target, given = reversed(logprobs) if reverse else logprobs
    expected = torch.nn.functional.kl_div(given, target, log_target=True, reduction="none").sum(-1)
    expected.sum().backward()

    def ours(student, teacher):
        top, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), V)
        return divergence(jax.nn.log_softmax(student), top, ids, reverse)

    np.testing.assert_allclose(ours(*logits), expected.detach(), atol=1e-5)
    gradient = jax.grad(lambda student: ours(student, logits[1]).sum())(logits[0])
    np.testing.assert_allclose(gradient, student.grad, atol=1e-5)


def test_other_tokens_are_one_outcome(logits):
    q, p = (np.exp(array.astype(np.float64)) for array in logits)
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    top, ids = jax.lax.top_k(np.log(p).astype(np.float32), 5)
    found = divergence(np.log(q).astype(np.float32), top, ids)
    for index in np.ndindex(found.shape):
        best = np.argsort(-p[index])[:5]
        outcomes = [np.append(x[index][best], 1 - x[index][best].sum()) for x in (p, q)]
        assert found[index] == pytest.approx(
            (outcomes[0] * np.log(outcomes[0] / outcomes[1])).sum(), abs=1e-5
        )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of a narrower model of three layers."""
    model = tiny_config(num_hidden_layers=3, hidden_size=32).model
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    params = write_model(path, model, {}, 5, lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf)
    return model, params, str(path)


@pytest.mark.process
def test_a_student_comes_nearer(teacher, batch):
    """The first divergence is that of two forward passes; chunks and microbatches change nothing."""
    model, params, path = teacher
    options = {
        "distill.teacher": path, "distill.top_k": 512, "train.microbatches": 2, "compute.loss_chunk": 16,
        "optimizer.learning_rate": 3e-3,
    }  # fmt: skip
    config = tiny_config(options)
    program = program_on((1, 2, 1, 2), config)
    initial = InitialParams(
        init=config.init, adapter=config.adapter, seed=0, tokenizer=None, program=program, teacher=path
    )
    student = first_state(program).params
    arrays = (batch["tokens"], batch["positions"], batch["segment_ids"])
    logprobs = [
        np.asarray(jax.nn.log_softmax(decoder.forward(shape, decoder.Compute(), weights, *arrays)))
        for shape, weights in ((model, params), (config.model, jax.device_get(student)))
    ]
    weights = batch["loss_weights"]
    kl = (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum(-1)
    nll = -np.take_along_axis(logprobs[1], batch["targets"][..., None], -1)[..., 0]
    objective = distillation(DistillConfig(top_k=512, weight=0.75), model)
    given = batch | objective.reference(decoder.bind(model, decoder.Compute(), params), batch)
    loss = objective.loss(decoder.bind(config.model, decoder.Compute(), jax.device_get(student)), given)
    assert float(loss.total) == pytest.approx((weights * (0.75 * kl + 0.25 * nll)).sum(), rel=1e-4)
    state = start(student, program.optimizer, program.state, frozen=initial.frozen({}))
    found = []
    for _ in range(8):
        state, metrics = program.step(state, placed(batch, program))
        found.append(float(metrics["loss"]))
    assert found[0] == pytest.approx((weights * kl).sum() / weights.sum(), rel=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_teachers_that_do_not_fit(teacher):
    path = teacher[2]
    config = tiny_config({"distill.teacher": path}, vocab_size=600)
    initial = InitialParams(
        init=config.init, adapter=config.adapter, seed=0, tokenizer=None, program=program_on((1, 1, 1, 1), config),
        teacher=path,
    )  # fmt: skip
    with pytest.raises(UserError, match="has a vocabulary of 512, config.model.vocab_size is 600"):
        initial.frozen({})
    with pytest.raises(UserError, match="leave out adapter.rank"):
        replace(config, {"preference.loss": "dpo"})
