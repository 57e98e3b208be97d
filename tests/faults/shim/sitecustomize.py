"""Loaded by Python itself in the runs of the drill: a clock that jumps, a disk that is slow or full, on demand.

`$LEMUR_FAULTS/clock` holds the seconds by which `time.time` is wrong, `$LEMUR_FAULTS/slow` those that every
fsync, rename and removal takes longer; while there is a `$LEMUR_FAULTS/directories`, no directory can be made. Only
what Python itself does is slowed down or refused.
"""

import errno
import os
import time

_DIRECTORY = os.environ.get("LEMUR_FAULTS", "")


def _fault(name: str) -> float:
    try:
        with open(os.path.join(_DIRECTORY, name)) as file:
            return float(file.read() or 0)
    except OSError:
        return 0.0


def _slow(call):
    def slowed(*arguments, **options):
        time.sleep(_fault("slow"))
        return call(*arguments, **options)

    return slowed


def _refused(mkdir):
    def refusing(path, *arguments, **options):
        if os.path.exists(os.path.join(_DIRECTORY, "directories")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return mkdir(path, *arguments, **options)

    return refusing


if _DIRECTORY:
    os.mkdir = _refused(os.mkdir)
    _time, _time_ns = time.time, time.time_ns
    time.time = lambda: _time() + _fault("clock")
    time.time_ns = lambda: _time_ns() + int(_fault("clock") * 1e9)
    for _name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, _name, _slow(getattr(os, _name)))
