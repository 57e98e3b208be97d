"""How a run spent its wall time since its first start, over all its processes."""

import collections
import time
from collections.abc import Mapping

from etils import epath

from lemur_jax.telemetry.metrics import METRICS_FILE, Record, read_metrics

# Each second of wall time belongs to one of these, or to "other".
PARTS = ("startup", "compile", "steps", "data_wait", "eval", "checkpoint", "lost", "down")


def earlier_time(workdir: epath.PathLike, step: int, began: float) -> dict[str, float]:
    """Seconds that earlier processes of a run spent, by part, and their sum `wall`; empty for the first process.

    The time from the last `time` record before `step` to the last write of the metrics file is `lost`: those steps are
    trained again. From then until this process began, the run was `down`.

    Args:
      workdir: of the run; its metrics file is as the last process left it.
      step: where the run resumes.
      began: when this process began, in seconds since 1970.
    """
    file = epath.Path(workdir) / METRICS_FILE
    if not file.exists():
        return {}
    alive = file.stat().mtime
    times = [
        record for record in read_metrics(workdir) if record.get("kind") == "time" and record["step"] <= step
    ]
    if not times:
        return {}
    last = times[-1]
    spent = collections.Counter({part: last.get(f"{part}_seconds", 0.0) for part in PARTS})
    # The clock may have been set back in between.
    lost = max(0.0, alive - last["unix_seconds"])
    down = max(0.0, began - max(alive, last["unix_seconds"]))
    spent.update(lost=lost, down=down)
    return {**spent, "wall": last["wall_seconds"] + lost + down}


def time_record(spent: Mapping[str, float], wall: float) -> Record:
    """The parts as a record of kind `time`.

    Args:
      spent: seconds by part.
      wall: seconds since the first start.
    """
    known = {part: spent.get(part, 0.0) for part in PARTS}
    other = max(0.0, wall - sum(known.values()))
    parts = {f"{part}_seconds": seconds for part, seconds in {**known, "other": other}.items()}
    return {
        "kind": "time",
        "unix_seconds": time.time(),
        "wall_seconds": wall,
        "goodput": known["steps"] / max(wall, 1e-9),
        **parts,
    }
