"""What training has done to each held-out task and group since its start, and to the balance between them.

docs/evaluation.md says why the score is what it is.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

Groups = Mapping[str, Sequence[str]]


def group_ratios(first: Mapping[str, float], now: Mapping[str, float], groups: Groups) -> dict[str, float]:
    """Bits per byte against those at the start, a geometric mean over the tasks of each group.

    Tasks that were not scored at the start are left out, and groups without one.
    """
    found = {}
    for name, tasks in groups.items():
        known = [task for task in tasks if first.get(task) and now.get(task)]
        if known:
            found[name] = statistics.geometric_mean(now[task] / first[task] for task in known)
    return found


def balance(ratios: Mapping[str, float]) -> float:
    """1 - exp((mean + worst) / 2) of the log ratios of groups: 0.05 is as good as every group 5% lower."""
    logs = [math.log(ratio) for ratio in ratios.values()]
    return 1 - math.exp((statistics.fmean(logs) + max(logs)) / 2)
