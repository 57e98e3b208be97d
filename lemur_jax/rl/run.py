"""`lemur rl`: the training loop with episodes of the policy as its batches."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.rl.objective import policy
from lemur_jax.rl.rollouts import Rollouts
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import step
from lemur_jax.train.loop import Inputs, train
from lemur_jax.train.state import TrainState


def rl(config: RunConfig, workdir: epath.PathLike, *, extend: bool = False) -> bool:
    """Trains until `config.train.steps`; killed and called again, it reaches the same parameters.

    Args and what it returns are those of `train.loop.train`.

    Raises:
      UserError: as `train`; the environment fails in every episode of a step; or the log-probabilities of the update
        differ from those of sampling by more than `config.rl.max_logprob_gap`.
    """
    return train(config, workdir, open_inputs=open_inputs, extend=extend)


def open_inputs(config: RunConfig, build: Any = step.build) -> Inputs:
    """Tokenizer, program and environments; the program's step plays the episodes of its batch first."""
    if config.adapter.rank:
        raise UserError("lemur rl trains all parameters, not an adapter: set config.adapter.rank to 0")
    mesh = make_mesh(config.mesh)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    program = build(config, mesh, num_sources=1, objective=policy(config.rl))
    rollouts = Rollouts(config.rl, tokenizer, program, seed=config.seed, steps=config.train.steps)
    update = program.step

    def play_and_update(state: TrainState, number: int) -> tuple[TrainState, dict[str, Any]]:
        with jax.transfer_guard("allow"):
            batch, figures = rollouts.batch(number, state.params)
        state, metrics = update(state, batch)
        gap = float(jax.device_get(metrics["objective/logprob_gap"]))
        if not gap <= config.rl.max_logprob_gap:
            raise UserError(
                f"step {number + 1}: log-probabilities of the update and of sampling differ by {gap:.3g} nats a token,"
                f" more than config.rl.max_logprob_gap {config.rl.max_logprob_gap:g}; the last checkpoint is intact"
            )
        return state, metrics | {f"objective/{name}": np.float32(value) for name, value in figures.items()}

    program = dataclasses.replace(program, step=play_and_update)
    return Inputs(tokenizer=tokenizer, mixture=rollouts, held_out=(), program=program, loader=rollouts)
