"""`lemur rl`: the training loop with episodes of the policy as its batches."""

import dataclasses
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.rl.objective import ARRAYS, policy
from lemur_jax.rl.rollouts import Rollouts
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import step
from lemur_jax.train.inputs import Inputs
from lemur_jax.train.loop import train


def rl(config: RunConfig, workdir: epath.PathLike, *, extend: bool = False) -> bool:
    """Trains until `config.train.steps`; killed and called again, it reaches the same parameters.

    Args and what it returns are those of `train.loop.train`.

    Raises:
      UserError: as `train`, or as `Rollouts.update`.
    """
    return train(config, workdir, open_inputs=open_inputs, extend=extend)


def open_inputs(config: RunConfig, build: Any = step.build) -> Inputs:
    """Tokenizer, program and environments."""
    if config.adapter.dropout:
        raise UserError("lemur rl samples without dropout: set config.adapter.dropout to 0")
    mesh = make_mesh(config.mesh)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    teacher = step.distilled(config.distill)  # on the policy's own tokens; rewards are then figures alone
    objective = dataclasses.replace(teacher, arrays=ARRAYS) if teacher else policy(config.rl)
    program = build(config, mesh, num_sources=1, objective=objective)
    rollouts = Rollouts(config.rl, tokenizer, program, seed=config.seed, steps=config.train.steps)
    return Inputs(
        tokenizer=tokenizer,
        mixture=rollouts,
        held_out=(),
        program=program,
        loader=rollouts,
        rollouts=rollouts,
    )
