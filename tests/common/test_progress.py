"""Progress in a real pseudo-terminal, in the log, and where the terminal goes away."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from lemur_jax.common.progress import Progress, duration

# Counts to 3, a step for each line that it is sent.
JOB = """
import logging, sys
from lemur_jax.common.logging import setup
from lemur_jax.common.progress import Progress
setup()
with Progress(3, "train a_long_workdir_name", "steps") as progress:
    for step in range(3):
        sys.stdin.readline()
        progress.set_postfix_str("41,000 tok/s, loss 2.3145, lr 0.0003", refresh=False)
        progress.update()
        progress.refresh()
        logging.getLogger("lemur_jax.job").info("note %d", step)
"""


def start(**pipes) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", JOB], stdin=subprocess.PIPE, **pipes)


def terminal(columns: int) -> tuple[int, int]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


def test_in_a_log_lines_come_first_and_last(caplog, monkeypatch):
    with Progress(1000, "train", "steps", initial=900) as progress:
        for _ in range(50):
            progress.set_postfix_str("loss 2", refresh=False)
            progress.update(2)
    with Progress(None, "read", "documents") as progress:
        progress.update(5000)
    monkeypatch.setattr(sys, "stderr", None)  # closed by the shell: 2>&-
    with Progress(0, "read", "documents"):
        pass
    with Progress(1, "train", "steps", enabled=False) as progress:
        progress.update()
    first, last, *read = caplog.messages
    assert first.startswith("train: 900/1,000 steps (90%), 00:00 so far")
    assert last.startswith("train: 1,000/1,000 steps (100%), 00:00 so far, 00:00 left, loss 2")
    assert [line.partition(",")[0] for line in read[:2]] == ["read: 0 documents", "read: 5"]
    assert all(line.startswith("read: ") for line in read)


@pytest.mark.parametrize("columns", [60, 120, 0])
def test_a_terminal_gets_a_bar_that_log_lines_do_not_tear(columns):
    ours, theirs = terminal(columns)
    job = start(stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    job.communicate(b"\n\n\n")
    shown = _read_all(ours)
    assert job.returncode == 0
    assert ("█" in shown) == (columns > 0)
    lines = [line.strip("\r ") for line in shown.split("\n")]
    notes = [line.rpartition("\r")[2].strip() for line in lines if "note" in line]
    assert notes == ["note 0", "note 1", "note 2"]
    last = [state.strip() for state in shown.replace("\n", "\r").split("\r") if "tok/s" in state][-1]
    assert "41,000 tok/s" in last
    assert "00:00 left" in last
    if columns:
        assert len(last) <= columns
        assert ("3/3 steps" in last) == (columns == 120)
    else:
        assert last.startswith("train a_long_workdir_name: 3/3 steps (100%)")


def _read_all(descriptor: int) -> str:
    chunks = []
    try:
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    except OSError:  # Linux: the other end has been closed
        pass
    os.close(descriptor)
    return b"".join(chunks).decode()


DURATIONS = {0.4: "0 s", 59.6: "1 min 00 s", 245: "4 min 05 s", 11_220: "3 h 07 min", 1_047_600: "12 d 03 h"}


@pytest.mark.parametrize("seconds", DURATIONS)
def test_duration(seconds):
    assert duration(seconds) == DURATIONS[seconds]
