"""Where the wall time of a run has gone since its first start, over all its processes."""

import collections
import time
from collections.abc import Mapping

from etils import epath

from lemur_jax.telemetry.metrics import METRICS_FILE, Record, read_metrics

# Of wall time, each second in one; "other" is what is in none.
PARTS = ("startup", "compile", "steps", "data_wait", "eval", "checkpoint", "lost", "down")


def carried_over(workdir: epath.PathLike, step: int, began: float) -> dict[str, float]:
    """What earlier processes of a run spent, by part, and `wall`; empty for the first one.

    From the last `time` record that counts until the last sign of life, everything is `lost`: steps that are
    trained again, and whatever else was not saved. From there until this process began, the run was `down`.

    Args:
      workdir: of the run; its metrics file is as the last process left it.
      step: that the run goes on from.
      began: when this process began, seconds since 1970.
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
    # A clock may have been set back meanwhile.
    lost = max(0.0, alive - last["unix_seconds"])
    down = max(0.0, began - max(alive, last["unix_seconds"]))
    spent.update(lost=lost, down=down)
    return {**spent, "wall": last["wall_seconds"] + lost + down}


def time_record(spent: Mapping[str, float], wall: float) -> Record:
    """The parts as they stand in a record of kind `time`.

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
