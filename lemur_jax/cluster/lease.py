"""Who writes to a directory of an object store, where there are no locks: a file there says so again and again.

Nobody's clock is compared with another's: a file that does not change for a while is that of a process that was killed.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from lemur_jax.common.errors import UserError

FILE = "running.json"
_BEAT_SECONDS = 10.0
# Longer than a store that is out of reach keeps a beat waiting.
_SILENCE_SECONDS = 60.0
# Within it, whoever found the place free at the same moment has written, too; the last one has it.
_SETTLE_SECONDS = 1.0
# For the last beat; a store may not answer.
_END_SECONDS = 30.0


def _end_process(words: str) -> None:
    print(f"lemur train: {words}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def lease(
    directory: epath.Path,
    say: Callable[[str], None],
    seconds: float,
    *,
    beat_seconds: float = _BEAT_SECONDS,
    silence_seconds: float = _SILENCE_SECONDS,
    lost: Callable[[str], None] = _end_process,
) -> Iterator[None]:
    """A context in which no other one of these is open for the directory, on any machine.

    Args:
      directory: made if missing.
      say: told when another run is waited for.
      seconds: to wait for one that gives signs of life.
      beat_seconds: between two of them.
      silence_seconds: after which a run without them is over.
      lost: told, in another thread, that the place has been taken over, as can be after a longer sleep of this process.

    Raises:
      UserError: the other run goes on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, mine = directory / FILE, uuid.uuid4().hex
    _take(file, mine, say, seconds, silence_seconds)
    over = threading.Event()
    words = (file, mine, over, beat_seconds, lost)
    thread = threading.Thread(target=_beat, args=words, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_END_SECONDS)
        with contextlib.suppress(Exception):  # then the next run waits for a while
            if mine in (_read(file) or ""):
                file.unlink()


def _take(
    file: epath.Path, mine: str, say: Callable[[str], None], seconds: float, silence_seconds: float
) -> None:
    began, told = time.monotonic(), False
    seen, since = None, began
    while True:
        found, now = _read(file), time.monotonic()
        if found != seen:
            seen, since = found, now
        if found is None or now - since > silence_seconds:
            _write(file, mine, 0)
            time.sleep(_SETTLE_SECONDS)
            if mine in (_read(file) or ""):
                return
            continue
        if now - began > seconds:
            raise UserError(
                f"another `lemur train` ({_name(found)}) writes to {file.parent} since more than {seconds:g} s:"
                " wait until it has ended, or use another --workdir"
            )
        if not told:
            say(
                f"another `lemur train` ({_name(found)}) writes to {file.parent}: waiting for its end, or for"
                f" {silence_seconds:g} s without a sign of life"
            )
            told = True
        time.sleep(min(1.0, silence_seconds / 10))


def _beat(
    file: epath.Path, mine: str, over: threading.Event, seconds: float, lost: Callable[[str], None]
) -> None:
    for number in itertools.count(1):
        if over.wait(seconds):
            return
        with contextlib.suppress(Exception):  # a store out of reach: saves tell of it
            found = _read(file)
            if found is not None and mine not in found:
                lost(
                    f"{file.parent} has been taken over by another run ({_name(found)}), as this one gave no sign of"
                    " life for a while; this one ends, and saves nothing more"
                )
                return
            _write(file, mine, number)


def _read(file: epath.Path) -> str | None:
    try:
        return file.read_text() if file.exists() else None
    except FileNotFoundError:  # gone meanwhile
        return None


def _write(file: epath.Path, mine: str, number: int) -> None:
    # Always of one length: what lists directories may keep the old one for a while.
    said = {"host": socket.gethostname(), "process": os.getpid(), "run": mine, "beat": f"{number:010d}"}
    file.write_text(json.dumps(said))


def _name(text: str) -> str:
    try:
        said = json.loads(text)
        return f"{said['host']}, process {said['process']}"
    except (ValueError, KeyError, TypeError):
        return "of unknown name"
