"""A Python shell with state between cells, in the sandbox."""

import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Mapping

from lemur_jax.agents.sandbox import Limits, run
from lemur_jax.common.errors import UserError

CELL_SECONDS = 30
_SCRIPT = pathlib.Path(__file__).with_name("shell_process.py")
ENDED = "The Python process has ended. A new one has been started."


class Shell:
    """IPython with this environment's packages; the process starts at the first cell.

    Args:
      functions: by signature, e.g. "put(object, receptacle)": of strings, that the cells can call; they run here,
        outside the sandbox.
      seconds: of a cell.
    """

    def __init__(self, functions: Mapping[str, Callable[..., str]], seconds: int = CELL_SECONDS):
        self._signatures = ";".join(functions)
        self._functions = {name.partition("(")[0]: function for name, function in functions.items()}
        self._seconds = seconds
        self._box: threading.Thread | None = None

    def run_cell(self, code: str) -> str:
        """What a cell prints; raises UserError without IPython."""
        if self._box is None:
            self._start()
        try:
            self._send(code)
            while line := self._replies.readline():
                message = json.loads(line)
                if "output" in message:
                    return str(message["output"])
                self._send(self._call(message))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the pipe is broken, or the cell wrote into it
        self.close()
        return ENDED

    def _call(self, message: dict) -> str:
        return self._functions[message["call"]](*message["arguments"])

    def _send(self, text: str) -> None:
        self._requests.write(json.dumps(text).encode() + b"\n")
        self._requests.flush()

    def _start(self) -> None:
        if importlib.util.find_spec("IPython") is None:
            raise UserError("the agents' shell needs IPython: pip install 'lemur_jax[agents]'")
        packages = tuple(path for path in sys.path if path.endswith("site-packages"))
        limits = Limits(
            wall_seconds=20.0 * self._seconds,
            cpu_seconds=10.0 * self._seconds,
            memory_bytes=8 << 30,
            visible=packages,
            processes=64,
        )
        reading, requests = os.pipe()
        replies, writing = os.pipe()
        pipes, seconds = [str(reading), str(writing)], str(self._seconds)
        command = ["python", "-I", "-S", "main.py", *pipes, seconds, self._signatures]
        self._requests, self._replies = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        self._box = threading.Thread(
            target=run,
            args=([*command, *packages],),
            kwargs={
                "files": {"main.py": _SCRIPT.read_text()},
                "limits": limits,
                "channels": [reading, writing],
            },
            daemon=True,
        )
        self._box.start()

    def close(self) -> None:
        """Ends the process."""
        if self._box is not None:
            for pipe in (self._requests, self._replies):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._box.join()
            self._box = None
