"""Runs untrusted programs in a sandbox, with limits, and kills all processes that they started.

docs/sandbox.md says what is isolated on which platform. It does not stop an attacker with a kernel exploit.
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
      disk_bytes: of the whole directory, if it is temporary and namespaces are available.
      processes: at a time, threads included.
      output_bytes: returned of stdout and of stderr; the middle of a longer output is cut out.
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
    """Runs a command in the sandbox and waits for it; stdin is empty.

    Args:
      command: program and arguments; "python" is the interpreter that runs this, without its packages.
      files: relative path -> text; written to the directory before the start.
      directory: where it runs, kept afterwards (remove it with `remove_tree`); None: a temporary one.
      namespaces: False: do not use them, even if they are available.
      require_isolation: refuse to run with isolation "limited".
      channels: file descriptors that the command inherits under the same numbers; closed here, also on failure.

    Raises:
      UserError: no such program, or no isolation although it is required.
    """
    command = [_interpreter() if command[0] == "python" else command[0], *command[1:]]
    open_channels = contextlib.ExitStack()
    for channel in channels:
        open_channels.callback(os.close, channel)
    with (
        open_channels,
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
            _launch(request, output, errors, open_channels)
            return _result(command[0], limits, report, output, errors)
        finally:
            remove_tree(root)


def _result(program: str, limits: Limits, report, output, errors) -> Result:
    """What the launcher reported, with the output; UserError if the command was not started."""
    report.seek(0)
    facts: dict = {"isolation": "limited"}
    for line in report.read().splitlines():
        facts |= json.loads(line)
    if facts.get("refused"):
        raise UserError(
            f"sandbox: no namespaces here ({facts['reason']}) and no Landlock of Linux 6.12: allow unprivileged user"
            " namespaces, or run without require_isolation"
        )
    if "failed" in facts:
        raise UserError(f"sandbox: cannot run {program}: {facts['failed']}")
    return Result(
        code=facts.get("code"),
        output=_read(output, limits.output_bytes),
        errors=_read(errors, limits.output_bytes),
        seconds=facts.get("seconds", limits.wall_seconds),
        isolation=facts["isolation"],
    )


def run_python(program: str, *, limits: Limits = Limits(), **options) -> Result:
    """Runs a program text with `python -I -S`: the standard library and nothing of the user's."""
    return run(["python", "-I", "-S", "main.py"], files={"main.py": program}, limits=limits, **options)


def _interpreter() -> str:
    """The interpreter itself and not a virtual environment's link to it, which the sandbox hides."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _launch(request, output, errors, open_channels: contextlib.ExitStack) -> None:
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
    open_channels.close()  # so that the channels' other ends are closed when the command exits
    try:
        process.communicate(json.dumps(request), timeout=request["limits"]["wall_seconds"] + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _read(file, limit: int) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= limit:
        return file.read().decode(errors="replace")
    head = file.read(limit // 2).decode(errors="replace")
    file.seek(size - limit // 2)
    tail = file.read().decode(errors="replace")
    return f"{head}\n[... {size - limit} bytes left out ...]\n{tail}"
