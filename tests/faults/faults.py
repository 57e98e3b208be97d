"""The faults: each hurts the run that it is given, and leaves the world as it was but for what is meant to last.

A fault returns once the run may be waited for again; whether the run goes on or has ended with one of the
`ENDS` of that fault is looked at by the drill.
"""

import contextlib
import resource
import signal
import time
from collections.abc import Iterator

# Seconds for a save and the end of the process, on a machine that may be busy; less than the 300 for which Orbax waits.
ENDING = 200.0


def sigkill(run, rng):
    run.signal(signal.SIGKILL)
    run.wait()


def sigterm(run, rng):
    run.signal(signal.SIGTERM)
    run.wait(ENDING)


def sigstop(run, rng):
    run.signal(signal.SIGSTOP)
    time.sleep(rng.uniform(0.5, 3))
    run.signal(signal.SIGCONT)


def full_disk(run, rng):
    """The kernel refuses every byte of a file beyond a few: data of checkpoints, metrics, or both."""
    room = rng.choice([0, 4096, 65536])
    with contextlib.suppress(ProcessLookupError):
        _, hard = resource.prlimit(run.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (room, hard))
        _some_steps(run, rng)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (hard, hard))


def unreadable_shard(run, rng):
    """A file of a store is gone for a while; half the time the run starts in that while."""
    shards = sorted(file for file in (run.root / "stores/code/train").rglob("c/*") if file.is_file())
    shard = rng.choice(shards)
    hidden = shard.with_name("hidden")
    restart = rng.random() < 0.5
    if restart:
        run.signal(signal.SIGKILL)
        run.wait()
    shard.rename(hidden)
    try:
        if restart:
            run.start()
        _some_steps(run, rng)
    finally:
        hidden.rename(shard)


def corrupt_checkpoint(run, rng):
    """Killed once it has two checkpoints, and a bit of a file of the newer one is flipped."""
    while len(run.saved()) < 2 and run.reach(run.step() + 1):
        pass
    run.signal(signal.SIGKILL)
    run.wait()
    steps = run.saved()
    if len(steps) < 2:  # it has ended by an earlier fault
        return
    files = sorted(file for file in (run.checkpoints / str(steps[-1])).rglob("*") if file.is_file())
    # Rather a large file, which holds parameters, than one of the many small ones.
    (file,) = rng.choices(files, [file.stat().st_size ** 0.5 for file in files])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def clock_jump(run, rng):
    with _switched(run, "clock", rng.choice([-86_400.0, -60.0, 3600.0, 400 * 86_400.0])):
        _some_steps(run, rng)


def slow_disk(run, rng):
    with _switched(run, "slow", rng.uniform(0.05, 0.3)):
        _some_steps(run, rng)


def no_directories(run, rng):
    """No directory can be made: a disk without inodes, or one to which rights have ended."""
    with _switched(run, "directories", 0):
        _some_steps(run, rng)


def _some_steps(run, rng) -> None:
    run.reach(run.step() + rng.randint(2, 8))


@contextlib.contextmanager
def _switched(run, name: str, value: float) -> Iterator[None]:
    """The shim does so meanwhile."""
    (run.faults / name).write_text(str(value))
    yield
    (run.faults / name).unlink()


# Exit statuses with which a run may end by the fault; None: it goes on.
ENDS = {
    sigkill: {-signal.SIGKILL},
    sigterm: {0, -signal.SIGTERM},  # the latter before the loop has begun
    sigstop: {None},
    full_disk: {None, 2},
    unreadable_shard: {None, 2},
    corrupt_checkpoint: {-signal.SIGKILL},
    clock_jump: {None},
    slow_disk: {None},
    no_directories: {None, 2},
}
