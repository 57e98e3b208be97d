"""Runs untrusted programs in a box of their own, with limits, and kills all that they started.

docs/sandbox.md says what holds where. It does not stop an attacker with a kernel exploit.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from lemur_jax.agents.scratch import make_directory, remove_tree
from lemur_jax.common.errors import UserError

_LAUNCHER = pathlib.Path(__file__).with_name("sandbox_launcher.py")
# The launcher measures the time; this is for a launcher that was killed or stopped.
_GRACE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
      wall_seconds: from start to end.
      cpu_seconds: of each process, rounded down to whole seconds, at least 1.
      memory_bytes: address space of each process.
      file_bytes: of each file written, stdout and stderr among them.
      disk_bytes: of the box in all, where it is temporary and namespaces are available.
      processes: at once, threads counted.
      output_bytes: of stdout, and of stderr, that are returned; the middle of more is cut out.
      visible: directories that it may read, in addition to the system and the interpreter.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 32
    output_bytes: int = 64 << 10
    visible: tuple[str, ...] = ()

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "visible" and not value > 0:  # for the kernel's clock 0 means no limit
                raise UserError(f"sandbox: the limit {name} is {value}: it must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
      code: exit code, 128 + n for signal n; None if it ran out of wall-clock time.
      output, errors: stdout and stderr, cut.
      seconds: wall-clock time.
      isolation: "namespaces", "landlock" or "limited"; see docs/sandbox.md.
    """

    code: int | None
    output: str
    errors: str
    seconds: float
    isolation: str

    @property
    def timed_out(self) -> bool:
        return self.code is None


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    directory: str | os.PathLike | None = None,
    limits: Limits = Limits(),
    namespaces: bool = True,
    require_isolation: bool = False,
    channels: Sequence[int] = (),
) -> Result:
    """Runs a command in a box and waits for it; stdin is empty.

    Args:
      command: program and arguments; "python" is the interpreter that runs this, without its packages.
      files: relative path to text; put into the box before the start.
      directory: the box, kept afterwards (remove it with `remove_tree`); None: a temporary one.
      namespaces: False: do without, even where they are available.
      require_isolation: refuse to run in a "limited" box.
      channels: file descriptors that the command has under the same numbers; they are closed here, also where it fails.

    Raises:
      UserError: no such program, or no isolation where it is required.
    """
    command = [_interpreter() if command[0] == "python" else command[0], *command[1:]]
    ours = contextlib.ExitStack()
    for channel in channels:
        ours.callback(os.close, channel)
    with (
        ours,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as report,
    ):
        if sys.platform != "linux":
            raise UserError(f"the sandbox needs Linux, this is {sys.platform}: run it in a container")
        root = str(make_directory("box-"))
        try:
            if os.getuid() == 0:
                for path in filter(None, (root, directory)):
                    os.chown(path, 65534, 65534)
            request = {
                "command": command,
                "files": dict(files or {}),
                "directory": str(pathlib.Path(directory).resolve()) if directory else "",
                "root": root,
                "visible": [os.path.realpath(sys.base_prefix), *limits.visible],
                "limits": dataclasses.asdict(limits),
                "namespaces": namespaces,
                "require_isolation": require_isolation,
                "report": report.fileno(),
                "channels": list(channels),
            }
            _launch(request, output, errors, ours)
            return _result(command[0], limits, report, output, errors)
        finally:
            remove_tree(root)


def _result(program: str, limits: Limits, report, output, errors) -> Result:
    """What the launcher reported, with the output; UserError if the command was not started."""
    report.seek(0)
    found: dict = {"isolation": "limited"}
    for line in report.read().splitlines():
        found |= json.loads(line)
    if found.get("refused"):
        raise UserError(
            f"sandbox: no namespaces here ({found['reason']}) and no Landlock of Linux 6.12: allow unprivileged user"
            " namespaces, or run without require_isolation"
        )
    if "failed" in found:
        raise UserError(f"sandbox: cannot run {program}: {found['failed']}")
    return Result(
        code=found.get("code"),
        output=_read(output, limits.output_bytes),
        errors=_read(errors, limits.output_bytes),
        seconds=found.get("seconds", limits.wall_seconds),
        isolation=found["isolation"],
    )


def run_python(program: str, *, limits: Limits = Limits(), **options) -> Result:
    """Runs a program text with `python -I -S`: the standard library and nothing of the user's."""
    return run(["python", "-I", "-S", "main.py"], files={"main.py": program}, limits=limits, **options)


def _interpreter() -> str:
    """The interpreter itself and not a virtual environment's link to it, which the box does not see."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _launch(request, output, errors, ours: contextlib.ExitStack) -> None:
    process = subprocess.Popen(
        [_interpreter(), "-I", "-S", str(_LAUNCHER)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        pass_fds=[request["report"], *request["channels"]],
        start_new_session=True,
        env={"PATH": os.defpath},
        text=True,
    )
    ours.close()  # the channels: who reads the other end waits for the command alone
    try:
        process.communicate(json.dumps(request), timeout=request["limits"]["wall_seconds"] + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _read(file, most: int) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= most:
        return file.read().decode(errors="replace")
    head = file.read(most // 2).decode(errors="replace")
    file.seek(size - most // 2)
    tail = file.read().decode(errors="replace")
    return f"{head}\n[... {size - most} bytes left out ...]\n{tail}"
