"""A registered `seqio.Mixture` as sources of `config.data`: its tasks, and its rates as shares of tokens."""

import dataclasses
import math

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.sections import did_you_mean
from lemur_jax.data.config import DataConfig, SourceConfig
from lemur_jax.prepare import tasks
from lemur_jax.prepare.modules import import_modules


def resolve_mixture(data: DataConfig) -> DataConfig:
    """`data` with the sources of its mixture: conversations packed whole, everything else cut into rows.

    Raises UserError for no such mixture (the nearest is named), or a rate that cannot be computed or is not above 0.
    """
    import_modules(data.modules)
    names = sorted(tasks.MixtureRegistry.names())
    if data.mixture not in names:
        raise UserError(
            f"there is no seqio mixture {data.mixture!r}{did_you_mean(data.mixture, names)}; register it in a module"
            " that data.modules names"
        )
    mixture = tasks.MixtureRegistry.get(data.mixture)
    sources = {}
    for task in mixture.tasks:
        label = f"the rate of task {task.name!r} in the seqio mixture {data.mixture!r}"
        try:
            share = float(mixture.get_rate(task))  # of nested mixtures too
        except Exception as error:  # the rate may be any function
            reason = reason_of(error)
            if "train" in task.splits and task.num_input_examples("train") is None:
                reason = f"seqio does not know how many examples the task has ({reason})"
            raise UserError(f"{label} cannot be computed: {reason}; write a number") from error
        if not 0 < share < math.inf:
            raise UserError(f"{label} is {share}: it must be above 0 and finite")
        packing = "concat" if tasks.content_of(task, "train") == "text" else "fit"
        sources[task.name] = SourceConfig(share=share, packing=packing)
    return dataclasses.replace(data, sources=sources)
