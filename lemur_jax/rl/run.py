"""What `lemur rl` gives to the training loop: episodes of the policy as its batches."""

import dataclasses
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.infer.session import check_mesh
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.rl.objective import ARRAYS, policy
from lemur_jax.rl.rollouts import Rollouts
from lemur_jax.text.chat_template import chat_template
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train import step
from lemur_jax.train.inputs import Inputs


def open_inputs(config: RunConfig, build: Any = step.build) -> Inputs:
    """Tokenizer, program and environments: the `open_inputs` of `train.loop.train`; UserError as `Rollouts.update`."""
    ignored = {
        "adapter.dropout": config.adapter.dropout,
        "preference.loss": config.preference.loss,
        "eval.tasks": config.eval.tasks,
        # They would set rows and updates from counts of conversations.
        "train.batch_documents": config.train.batch_documents,
        "data.sources.NAME.epochs": config.data.by_epochs,
    }
    if keys := [name for name, value in ignored.items() if value]:
        raise UserError(f"lemur rl does not use config.{', config.'.join(keys)}: unset those of lemur train")
    mesh = make_mesh(config.mesh)
    check_mesh(mesh)  # episodes are generated on it
    tokenizer = Tokenizer.from_config(config.tokenizer)
    chat_template(tokenizer)  # raises where there is none, before weights are read
    # On the policy's own tokens; rewards are then only metrics.
    teacher = step.distillation_objective(config.distill)
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
