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

    From the last `time` record before `step`, where the run resumes, to the last write of the metrics file the time is
    `lost`: those steps are trained again. From then until this process `began` (seconds since 1970) the run was `down`.
    """
    file = epath.Path(workdir) / METRICS_FILE
    if not file.exists():
        return {}
    last_write = file.stat().mtime
    times = [
        record for record in read_metrics(workdir) if record.get("kind") == "time" and record["step"] <= step
    ]
    if not times:
        return {}
    last = times[-1]
    spent = collections.Counter({part: last.get(f"{part}_seconds", 0.0) for part in PARTS})
    # The clock may have been set back in between.
    lost = max(0.0, last_write - last["unix_seconds"])
    down = max(0.0, began - max(last_write, last["unix_seconds"]))
    spent.update(lost=lost, down=down)
    return {**spent, "wall": last["wall_seconds"] + lost + down}


def time_record(spent: Mapping[str, float], wall: float) -> Record:
    """The seconds of each part, and those since the first start (`wall`), as a record of kind `time`."""
    by_part = {part: spent.get(part, 0.0) for part in PARTS}
    other = max(0.0, wall - sum(by_part.values()))
    parts = {f"{part}_seconds": seconds for part, seconds in {**by_part, "other": other}.items()}
    return {
        "kind": "time",
        "unix_seconds": time.time(),
        "wall_seconds": wall,
        "goodput": by_part["steps"] / max(wall, 1e-9),
        **parts,
    }
