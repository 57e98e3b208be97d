"""Runs code that nobody has read: in a process of its own, boxed in, killed with all it started.

What holds where:

| | with namespaces | with Landlock | with neither |
|---|---|---|---|
| wall clock, CPU time, memory (each process), file size, process count | yes | yes | yes |
| clean environment, temporary directory, output cut | yes | yes | yes |
| all it started is dead when `run` returns | yes | yes | unless it killed its launcher (same user) |
| no network | yes | yes: no sockets | yes: no sockets |
| writes nowhere but in its box, reads the system's programs alone | yes | yes | file permissions only |
| cannot signal other processes | yes | yes | only those of other users |
| cannot see other processes or that files exist; size of the box limited | yes | no | no |

Namespaces need Linux with unprivileged user namespaces; many containers forbid them. Then Landlock (Linux 6.12 for all
of it) and a seccomp filter, which need no rights, take their place. `Result.isolated` says whether all but the last
line holds, and `require_isolation` refuses a weaker box. Root becomes `nobody` first. It is a box for a model's honest
mistakes and clumsy malice, and not for an attacker with a kernel exploit: for that, run the whole evaluation in a
virtual machine.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from lemur_jax.common.errors import UserError

_LAUNCHER = pathlib.Path(__file__).with_name("sandbox_launcher.py")
# The launcher keeps the clock; this is for the case that somebody killed or stopped it.
_GRACE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What code may use up.

    Attributes:
      wall_seconds: from start to end.
      cpu_seconds: of each process.
      memory_bytes: address space of each process.
      file_bytes: of each file written, stdout and stderr among them.
      disk_bytes: of the box in all, where it is temporary and namespaces are available.
      processes: at once, threads counted.
      output_bytes: of stdout, and of stderr, that are returned; the middle of more is cut out.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 32
    output_bytes: int = 64 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
      code: exit code, 128 + n for signal n; None where it ran out of wall-clock time.
      output, errors: stdout and stderr, cut.
      seconds: wall-clock time.
      isolated: whether network, other files and other processes were out of its reach.
    """

    code: int | None
    output: str
    errors: str
    seconds: float
    isolated: bool

    @property
    def timed_out(self) -> bool:
        return self.code is None


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    directory: str | os.PathLike | None = None,
    limits: Limits | None = None,
    namespaces: bool = True,
    require_isolation: bool = False,
) -> Result:
    """Runs a command in a box and waits for it; stdin is empty.

    Args:
      command: program and arguments; "python" is the interpreter that runs this, without its packages.
      files: relative path to text; put into the box before the start.
      directory: the box, kept afterwards; None: a temporary one.
      limits: default `Limits()`.
      namespaces: False: do without, even where they are available.
      require_isolation: refuse to run without.

    Raises:
      UserError: no such program, or no isolation where it is required.
    """
    if sys.platform != "linux":
        raise UserError(f"the sandbox needs Linux, this is {sys.platform}: run it in a container")
    limits = limits or Limits()
    command = [_interpreter() if command[0] == "python" else command[0], *command[1:]]
    for name in files or {}:
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            raise UserError(f"sandbox file {name}: the path must be relative and stay inside the box")
    with (
        tempfile.TemporaryDirectory(prefix="lemur-box-", ignore_cleanup_errors=True) as root,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as verdict,
    ):
        for path in filter(None, (root, directory)):
            _give_to_nobody(path)
        request = {
            "command": command,
            "files": dict(files or {}),
            "directory": str(pathlib.Path(directory).resolve()) if directory else "",
            "root": root,
            "visible": [os.path.realpath(sys.base_prefix)],
            "limits": dataclasses.asdict(limits),
            "namespaces": namespaces,
            "verdict": verdict.fileno(),
        }
        _launch(request, output, errors)
        found = _verdict(verdict)
        isolated = bool(found.get("isolated"))
        if "failed" in found:
            raise UserError(f"sandbox: cannot run {command[0]}: {found['failed']}")
        if require_isolation and not isolated:
            raise UserError(
                f"sandbox: no namespaces here ({found.get('reason', 'unknown')}) and no Landlock of Linux 6.12, so code"
                " could reach files and processes: allow unprivileged user namespaces, or run without"
                " require_isolation"
            )
        return Result(
            code=found.get("code"),
            output=_read(output, limits.output_bytes),
            errors=_read(errors, limits.output_bytes),
            seconds=found.get("seconds", limits.wall_seconds),
            isolated=isolated,
        )


def run_python(program: str, *, limits: Limits | None = None, **options) -> Result:
    """Runs a program text with `python -I -S`: the standard library and nothing of the user's."""
    return run(["python", "-I", "-S", "main.py"], files={"main.py": program}, limits=limits, **options)


def _interpreter() -> str:
    """The interpreter itself and not a virtual environment's link to it, which the box does not see."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _give_to_nobody(path: str | os.PathLike) -> None:
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)


def _launch(request, output, errors) -> None:
    process = subprocess.Popen(
        [_interpreter(), "-I", "-S", str(_LAUNCHER)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        pass_fds=[request["verdict"]],
        start_new_session=True,
        env={"PATH": os.defpath},
        text=True,
    )
    try:
        process.communicate(json.dumps(request), timeout=request["limits"]["wall_seconds"] + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _verdict(file) -> dict:
    file.seek(0)
    found: dict = {}
    for line in file.read().splitlines():
        found |= json.loads(line)
    return found


def _read(file, most: int) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= most:
        return file.read().decode(errors="replace")
    head = file.read(most // 2).decode(errors="replace")
    file.seek(size - most // 2)
    tail = file.read().decode(errors="replace")
    return f"{head}\n[... {size - most} bytes left out ...]\n{tail}"
