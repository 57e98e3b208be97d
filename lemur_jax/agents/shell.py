"""A Python shell with state between cells, in the sandbox."""

import contextlib
import functools
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lemur_jax.agents.sandbox import Limits, run
from lemur_jax.common.errors import UserError

CELL_SECONDS = 30
# The clock of the sandbox also counts the model's turns, so each cell has its own time limit.
BOX_SECONDS = 24 * 3600
# For Python's start and a cell that catches its TimeoutError; a cell that blocks its alarm takes longer.
GRACE_SECONDS = 60
MOST_BYTES = 1 << 20  # of a message
_SCRIPT = pathlib.Path(__file__).with_name("shell_process.py")
ENDED = "The Python process has ended. A new one has been started."
_ASK = """
import IPython, json, os, sys
paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
print(json.dumps([os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix), *paths]))
"""


@functools.cache
def interpreter(python: str) -> tuple[str, ...]:
    """The program behind an interpreter, its installation and the directories of its packages.

    Raises:
      UserError: it does not run, or lacks IPython.
    """
    try:
        result = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"the agents' shell needs IPython, which {python} cannot import: pip install 'lemur_jax[agents]', or"
            " ipython for another --cell-python"
        ) from error
    return tuple(json.loads(result.stdout))


class Shell:
    """IPython with an interpreter's packages; the process starts at the first cell.

    Args:
      functions: functions of strings that the cells can call, by signature, e.g. "put(object, receptacle)"; they run in
        this process, outside the sandbox.
      python: the interpreter.
    """

    def __init__(self, functions: Mapping[str, Callable[..., str]], python: str = sys.executable):
        self._signatures = ";".join(functions)
        self._functions = {name.partition("(")[0]: function for name, function in functions.items()}
        self._python = python
        self._box: threading.Thread | None = None
        self._ended: Exception | None = None  # why it has ended

    def run_cell(self, code: str) -> str:
        """What a cell prints; raises UserError without IPython, or if it does not start in the sandbox."""
        if self._box is None:
            self._start()
        try:
            self._send(code)
            while message := self._receive():
                if "output" in message:
                    return str(message["output"])
                self._send(self._functions[message["call"]](*message["arguments"]))
        except (OSError, ValueError, LookupError, TypeError):
            pass  # the pipe is broken, or the cell wrote into it
        self.close()
        return ENDED

    def _receive(self) -> Any:
        """The next message; None if the process ends or sends no line in time or in `MOST_BYTES` (a cell can write)."""
        line, end = b"", time.monotonic() + CELL_SECONDS + GRACE_SECONDS
        replies = select.poll()  # `select.select` takes no descriptor above 1,023
        replies.register(self._replies, select.POLLIN)
        while len(line) < MOST_BYTES and replies.poll(1000 * max(0.0, end - time.monotonic())):
            line += (part := self._replies.read1())
            if not part:
                break
            if part.endswith(b"\n"):
                return json.loads(line)
        return None

    def _send(self, text: str) -> None:
        self._requests.write(json.dumps(text).encode() + b"\n")
        self._requests.flush()

    def _start(self) -> None:
        program, prefix, *packages = interpreter(self._python)
        limits = Limits(
            wall_seconds=BOX_SECONDS,
            cpu_seconds=10.0 * CELL_SECONDS,
            memory_bytes=8 << 30,
            visible=(prefix, *packages),
            processes=64,
        )
        reading, requests = os.pipe()
        replies, writing = os.pipe()
        arguments = [str(reading), str(writing), str(CELL_SECONDS), self._signatures, *packages]
        self._requests, self._replies = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        command = [program, "-I", "-S", "main.py", *arguments]
        self._box = threading.Thread(
            target=self._run_box, args=(command, limits, [reading, writing]), daemon=True
        )
        self._box.start()
        if not self._receive():
            self.close()
            raise self._ended or UserError(f"IPython of {self._python} does not start in the sandbox in time")

    def _run_box(self, command: list[str], limits: Limits, channels: list[int]) -> None:
        try:
            result = run(command, files={"main.py": _SCRIPT.read_text()}, limits=limits, channels=channels)
            reason = result.errors.strip().rpartition("\n")[2] or f"exit code {result.code}"
            self._ended = UserError(f"IPython of {self._python} does not start in the sandbox: {reason}")
        except (UserError, OSError) as error:
            self._ended = error

    def close(self) -> None:
        """Ends the process. If it ignores this, it ends with the sandbox or with this process."""
        if self._box is not None:
            for pipe in (self._requests, self._replies):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._box.join(GRACE_SECONDS / 4)
            self._box = None
