"""Progress against a clock that the test turns, real pipes and a real pseudo-terminal."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from lemur_jax.telemetry.progress import Progress, duration

JOB = """
import sys
from lemur_jax.telemetry.progress import Progress
with Progress(3, "count", "steps", stream={stream}) as progress:
    for step in range(3):
        sys.stdin.readline()
        progress.set(loss=0.5)
        progress.update()
        progress.write(f"note {{step}}")
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def start(stream: str, shell: str = 'exec "$@"', **pipes) -> subprocess.Popen:
    """A process that counts to 3, a step for each line that it is sent."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", JOB.format(stream=stream)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, **pipes)


def test_lines_come_first_last_and_every_ten_seconds():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, "train", "steps", stream=stream, clock=clock) as progress:
        clock.now += 60  # compilation: the first step is slow
        for _ in range(100):
            progress.set(loss=2.0, source="code")
            progress.update()
            clock.now += 0.5
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 0/1,000 steps (0%)"
    assert lines[1] == "train: 1/1,000 steps (0%), loss 2, source code"
    # 2 steps a second: compilation is not in the estimate.
    assert lines[2] == "train: 21/1,000 steps (2%), loss 2, source code, 2 steps/s, 8 min 10 s left"
    assert len(lines) == 1 + 5 + 1
    assert lines[-1] == "train: 100/1,000 steps (10%), loss 2, source code, done after 1 min 50 s"


def test_remaining_time_follows_the_speed_of_the_last_minutes():
    clock, stream = Clock(), io.StringIO()
    with Progress(2000, "train", "steps", stream=stream, clock=clock) as progress:
        for seconds in [1.0] * 1000 + [4.0] * 100:
            clock.now += seconds
            progress.update()
    assert "4 s each, 1 h 00 min left" in stream.getvalue().splitlines()[-2]


def test_resumed_work_does_not_count_as_speed():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, "train", "steps", initial=900, stream=stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 20
            progress.update()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 900/1,000 steps (90%)"
    assert lines[2] == "train: 902/1,000 steps (90%), 20 s each, 32 min 40 s left"


def test_unknown_total_and_empty_job():
    clock, stream = Clock(), io.StringIO()
    with Progress(None, "read", "documents", stream=stream, clock=clock) as progress:
        for _ in range(2):
            clock.now += 10
            progress.update(5000)
    assert "read: 10,000 documents, 500 documents/s\n" in stream.getvalue()
    with Progress(0, "read", "documents", stream=stream, clock=clock):
        pass
    assert stream.getvalue().endswith("read: 0/0 documents, done after 0 s\n")


def test_an_exception_passes_and_the_last_line_says_stopped():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(9, "train", "steps", stream=stream):
        raise RuntimeError
    assert "0/9 steps (0%), stopped after 0 s" in stream.getvalue()


def test_disabled_shows_nothing():
    stream = io.StringIO()
    with Progress(1, "train", "steps", stream=stream, enabled=False) as progress:
        progress.update()
        progress.write("note")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_goes_away_leaves_the_job_alone(name):
    other = "stderr" if name == "stdout" else "stdout"
    job = start(f"sys.{name}", **{name: subprocess.PIPE, other: subprocess.PIPE})
    reader = getattr(job, name)
    assert reader.readline() == b"count: 0/3 steps (0%)\n"
    reader.close()
    job.stdin.write(b"\n\n\n")
    job.stdin.close()
    assert job.wait(timeout=30) == 0
    assert getattr(job, other).read() == b""
    getattr(job, other).close()


def test_closed_streams_leave_the_job_alone():
    stream = io.StringIO()
    stream.close()
    with Progress(2, "train", "steps", stream=stream) as progress:
        progress.update()
        progress.write("note")
    job = start("None", shell='exec "$@" 2>&-')  # sys.stderr is None there
    job.communicate(b"\n\n\n")
    assert job.returncode == 0


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_gets_a_bar_and_one_without_width_gets_lines(columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    job = start("sys.stderr", stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    job.stdin.write(b"\n\n\n")
    job.stdin.close()
    shown = _read_all(ours)
    assert job.wait(timeout=30) == 0
    assert ("█" in shown) == (columns > 0)
    assert "note 1\r\n" in shown
    last = shown.rstrip().splitlines()[-1]
    assert "3/3 steps" in last
    assert "loss 0.5, done after" in last


def test_a_terminal_that_goes_away_leaves_the_job_alone():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    job = start("sys.stderr", stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    job.stdin.write(b"\n\n\n")
    job.stdin.close()
    assert job.wait(timeout=30) == 0


def _read_all(descriptor: int) -> str:
    chunks = []
    try:
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    except OSError:  # Linux: the other end has been closed
        pass
    os.close(descriptor)
    return b"".join(chunks).decode()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (11_220, "3 h 07 min"),
        (1_047_600, "12 d 03 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
