"""Memory allocation of processes that convert."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes glibc reuse large freed blocks instead of returning them to the system.

    Fresh pages for every tensor of some hundred megabytes cost more than all copying (on virtual machines 0.2 GB/s
    instead of 14). For processes that only convert. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in musl
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            libc.mallopt(option, value)
