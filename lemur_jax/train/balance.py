"""How each held-out task and group has changed since the start of training, and the balance between them.

docs/evaluation.md explains the score.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

Groups = Mapping[str, Sequence[str]]


def group_ratios(first: Mapping[str, float], now: Mapping[str, float], groups: Groups) -> dict[str, float]:
    """Bits per byte relative to those at the start, a geometric mean over the tasks of each group.

    Tasks that were not scored at the start are left out, as are groups in which no task was.
    """
    ratios = {}
    for name, tasks in groups.items():
        scored = [task for task in tasks if first.get(task) and now.get(task)]
        if scored:
            ratios[name] = statistics.geometric_mean(now[task] / first[task] for task in scored)
    return ratios


def balance(ratios: Mapping[str, float]) -> float:
    """1 - exp((mean + worst) / 2) of the log ratios of groups: 0.05 is as good as every group 5% lower."""
    logs = [math.log(ratio) for ratio in ratios.values()]
    return 1 - math.exp((statistics.fmean(logs) + max(logs)) / 2)
