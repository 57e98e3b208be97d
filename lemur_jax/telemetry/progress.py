"""Progress of a long job: a bar in a terminal, plain lines in a pipe or a log file."""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_BAR_SECONDS = 0.1
_LINE_SECONDS = 10.0
# Speed is measured over the last 30 marks, which lie at least this far apart: five minutes of quick
# steps, or 30 slow ones.
_MARK_SECONDS = 10.0
_MARKS = 31


class Progress:
    """Shows how far a job is, how fast it goes and how long it will still take.

        with Progress(1000, "train", "steps") as progress:
            for step in range(1000):
                ...
                progress.set(loss=2.31)
                progress.update()

    A terminal gets a bar that follows the job. Anything else gets whole lines: one at the start, at most
    one every 10 s, one at the end. A terminal or pipe that goes away never disturbs the job.

    Speed and remaining time leave out what passed before the first `update`, so that compilation does
    not count as a slow step.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str,
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing before `with`.

        Args:
          total: units of the whole job; None if nobody knows.
          label: what is done, e.g. "train".
          unit: what is counted, in the plural, e.g. "steps".
          initial: units that an earlier process has done.
          enabled: False shows nothing (all hosts but the first).
          stream: where to; None: stderr.
          clock: seconds; for tests.
        """
        self._total, self._label, self._unit = total, label, unit
        self._done = self._initial = initial
        self._stream: Any = sys.stderr if stream is None else stream
        self._shown = enabled and self._stream is not None
        self._clock = clock
        self._fields: dict[str, Any] = {}
        self._bar: Any = None
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=_MARKS)
        self._begin = self._due = clock()

    def __enter__(self) -> "Progress":
        self._begin = self._clock()
        if self._shown:
            with self._harmless():
                if _can_redraw(self._stream):
                    self._bar = self._make_bar()
            self._show(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        took = f"{'done' if kind is None else 'stopped'} after {duration(self._clock() - self._begin)}"
        self._put([*self._details(), took])
        if self._bar is not None:
            with self._harmless():
                self._bar.close()

    def update(self, n: int = 1) -> None:
        """Counts `n` more units as done. Cheap: may be called 100,000 times a second."""
        self._done += n
        now = self._clock()
        if not self._marks or now - self._marks[-1][0] >= _MARK_SECONDS:
            self._marks.append((now, self._done))
        if now >= self._due:
            self._show(now)

    def set(self, **fields: Any) -> None:
        """Shows these values beside the progress from now on; floats with four digits."""
        self._fields.update(fields)

    def write(self, text: str) -> None:
        """Prints a line of its own without tearing the bar."""
        if self._shown:
            with self._harmless():
                if self._bar is not None:
                    self._bar.write(text, file=self._stream)
                else:
                    self._stream.write(text + "\n")
                self._stream.flush()

    def _show(self, now: float) -> None:
        self._due = now + (_LINE_SECONDS if self._bar is None else _BAR_SECONDS)
        self._put([*self._details(), *self._speed(now)])

    def _put(self, details: list[str]) -> None:
        """Redraws the bar, or prints one line."""
        if not self._shown:
            return
        if self._bar is None:
            self.write(", ".join([f"{self._label}: {self._count()}", *details]))
            return
        with self._harmless():
            self._bar.n = self._done
            self._bar.set_postfix_str(", ".join(details), refresh=False)
            self._bar.refresh()

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        known = self._total is not None
        return tqdm(
            total=self._total,
            initial=self._initial,
            desc=self._label,
            bar_format=("{l_bar}{bar}| {n_fmt}/{total_fmt} " if known else "{desc}: {n_fmt} ")
            + self._unit
            + "{postfix}",
            file=self._stream,
            dynamic_ncols=True,
            miniters=1,  # keeps tqdm's thread, which wakes bars that have gone quiet, off this one
        )

    def _count(self) -> str:
        if self._total is None:
            return f"{self._done:,} {self._unit}"
        share = f" ({100 * self._done // self._total}%)" if self._total else ""
        return f"{self._done:,}/{self._total:,} {self._unit}{share}"

    def _details(self) -> list[str]:
        return [
            f"{key} {value}" if isinstance(value, str | int) else f"{key} {float(value):.4g}"
            for key, value in self._fields.items()
        ]

    def _speed(self, now: float) -> list[str]:
        """Rate and remaining time; empty before anybody can know."""
        if not self._marks or now <= self._marks[0][0] or self._done <= self._marks[0][1]:
            return []
        rate = (self._done - self._marks[0][1]) / (now - self._marks[0][0])
        if rate < 1:
            speed = f"{1 / rate:.3g} s each"
        else:
            speed = f"{rate:,.0f} {self._unit}/s" if rate >= 100 else f"{rate:.3g} {self._unit}/s"
        if self._total is None:
            return [speed]
        return [speed, f"{duration(max(self._total - self._done, 0) / rate)} left"]

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """A stream that has gone ends the showing and not the job."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: closed file, or a character it cannot encode
            self._shown = False
            if self._bar is not None:
                self._bar.disable = True  # else tqdm draws once more when it is collected


def say(text: str) -> None:
    """Prints a line. Neither a reader of standard output that has gone, as `tee` may, nor a full disk ends the job."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # for good
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:  # what is not written yet comes with a later line
        pass


def duration(seconds: float) -> str:
    """Seconds in two units: `8 s`, `4 min 05 s`, `3 h 07 min`, `12 d 03 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"


def _can_redraw(stream: Any) -> bool:
    """Whether it is a terminal of some width; pseudo-terminals of CI runners often have none."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return os.get_terminal_size(stream.fileno()).columns > 0
