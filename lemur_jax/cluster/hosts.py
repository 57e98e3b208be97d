"""Platform and hosts of a run: chosen and joined before JAX touches a device."""

import contextlib
import contextvars
import glob
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lemur_jax.cluster import coordination
from lemur_jax.cluster.exit import TRY_AGAIN, end_process
from lemur_jax.common.errors import UserError

logger = logging.getLogger(__name__)

AGREE_SECONDS = 600.0  # limit for the slowest host to open what is compared
_alone = contextvars.ContextVar("alone", default=False)

# For many virtual devices, or several processes, on few cores. XLA:CPU starts independent operations at once, and each
# collective holds a thread until all devices have joined it: with the concurrency-optimized schedule every thread can
# wait for a device that gets none (a deadlock within a minute of steps over eight devices with jaxlib 0.10.2). And
# devices on busy cores keep each other waiting for longer than the 40 s after which XLA aborts.
_CPU_FLAGS = {
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
}


def choose_platform(virtual_devices: int = 0) -> None:
    """Sets `JAX_PLATFORMS`, and XLA's flags on the CPU, before JAX initializes.

    Without an accelerator and a choice by the user the platform is the CPU: with libtpu installed and no TPU present,
    JAX would spend seconds and a page of warnings to find out. With `virtual_devices` it has that many, regardless of
    the hardware and XLA_FLAGS.
    """
    if virtual_devices < 0:
        raise UserError(
            f"--virtual-devices is {virtual_devices}: it must be 1 or above, or 0 for the hardware"
        )
    if virtual_devices or ("JAX_PLATFORMS" not in os.environ and not _has_accelerator()):
        os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        flags = dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())
        if virtual_devices:
            flags["--xla_force_host_platform_device_count"] = str(virtual_devices)
        flags = _CPU_FLAGS | flags
        os.environ["XLA_FLAGS"] = " ".join(
            f"{name}={value}" if value else name for name, value in flags.items()
        )
    import absl.logging  # noqa: F401  # makes the logger "absl" of absl's own class

    # Orbax and JAX log every checkpoint and every compile at INFO.
    for name in ("absl", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _has_accelerator() -> bool:
    """Whether the device files of a TPU (accel*, vfio) or of an NVIDIA GPU are here."""
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*"))


def join(connect_seconds: int = 300, lost_seconds: int = 100) -> None:
    """Joins the processes of a run of several hosts, if this is one and they are not joined yet.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say so explicitly; under Slurm, and on a TPU pod
    slice, where `TPU_WORKER_HOSTNAMES` lists several hosts, JAX finds them itself. A plain TPU VM has none of these
    variables: the scripts in launch/ set `LEMUR_JOIN=1` there, and JAX asks the metadata server.

    Waits `connect_seconds` for the others; where not all come, the process ends with `TRY_AGAIN`. A host is lost after
    `lost_seconds` of silence (`cluster/watchdog.py`): JAX's own heartbeat, which aborts without naming the host, comes
    later. Raises UserError: a variable is missing or wrong.
    """
    import jax

    if coordination.client() is not None or _alone.get():
        return
    arguments: dict[str, Any] = {}
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        if ":" not in address:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}: it must be HOST:PORT")
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        arguments["coordinator_address"] = address
        arguments["num_processes"] = _number("JAX_NUM_PROCESSES")
        arguments["process_id"] = _number("JAX_PROCESS_ID")
    elif not _is_multi_process():
        return
    hint = "is the same command running on every host, with the same coordinator address?"
    timeout_message = f"the hosts of this run did not all come together within {connect_seconds} s: {hint}"
    # JAX itself would abort with a page of stack trace, after its own time limit.
    timer = threading.Timer(connect_seconds, end_process, (TRY_AGAIN, timeout_message))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=connect_seconds + 30,
            heartbeat_timeout_seconds=2 * lost_seconds + 20,
            shutdown_timeout_seconds=lost_seconds,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the hosts of this run cannot be joined: {reason}; {hint}") from error
    finally:
        timer.cancel()


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    if not value.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is set, so {variable} must be a number; it is {value!r}")
    return int(value)


def _is_multi_process() -> bool:
    """Whether this is one of several tasks of a Slurm step, or one worker of several of a TPU slice."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    if os.environ.get("LEMUR_JOIN") == "1":
        return True
    # A batch script has SLURM_NTASKS as well; only `srun` sets the task's own address list.
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return True
    if int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def keep_programs() -> None:
    """Keeps compiled programs on this machine for the next process: a short evaluation is mostly compilation.

    They are stored in `lemur_jax/programs` of `XDG_CACHE_HOME` (default `~/.cache`), at most 1 GiB, and the oldest are
    removed first. JAX's own variables take precedence: `JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`.
    With several hosts nothing is kept: they would need a shared directory. Call it before the first compilation.
    """
    import jax

    config: Any = jax.config  # whose options mypy does not see
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = os.path.join(home, "lemur_jax", "programs")
    if jax.process_count() > 1:
        return
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError:
        return  # the home directory is not writable
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_compilation_cache_max_size": 1 << 30,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            config.update(name, value)


def is_primary() -> bool:
    """Whether this process writes and logs for all hosts."""
    import jax

    return jax.process_index() == 0


def inform(text: str) -> None:
    """Logs on the primary host."""
    if is_primary():
        logger.info("%s", text)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A context in which this process works alone: `any_host` returns its own flag, `agree` and `join` do nothing."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def agree(name: str, value: Callable[[], str]) -> None:
    """UserError, which names the host, if one has another value; all must call it, except inside `alone`."""
    if _alone.get() or (service := coordination.client()) is None:
        return
    values = coordination.exchange(name, value(), AGREE_SECONDS)
    other = [
        coordination.host_name(host, service) for host in range(len(values)) if values[host] != values[0]
    ]
    if other:
        first = coordination.host_name(0, service)
        raise UserError(f"{name} differs between hosts: {', '.join(other)} has another than {first}")


def any_host(flag: bool) -> bool:
    """Whether `flag` holds on any process; all must call it and get the same answer, except inside `alone`."""
    import jax

    if jax.process_count() == 1 or _alone.get():
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))
