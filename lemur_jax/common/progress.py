"""Progress of a long job, by tqdm: a bar in a terminal, a line every ten seconds in a pipe or a log file."""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0
# tqdm truncates the line at the right in a narrow terminal: the most important fields come first.
_BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}, {n:,}/{total:,} {unit}"
_LINE = "{desc}: {n:,}/{total:,} {unit} ({percentage:.0f}%), {elapsed} so far, {remaining} left{postfix}"
_UNKNOWN_TOTAL = "{desc}: {n:,}{unit}, {rate_noinv_fmt}{postfix}"
_LABEL = 16  # characters of the label that a bar shows


class Progress(tqdm):
    """A tqdm bar for jobs of minutes to weeks.

    If standard error is not a terminal, whole lines go to the log instead: at the start, at most every ten seconds,
    and at the end. Remaining time does not count what passes before the first `update`, such as compilation.
    """

    def __init__(self, total: int | None, label: str, unit: str, *, initial: int = 0, enabled: bool = True):
        """Shows the bar; nothing unless `enabled`, as on all hosts but the first.

        `total` are units of the whole job, None if unknown, and `initial` those of an earlier process; `label` says
        what is done, e.g. "train", `unit` what is counted, in the plural.
        """
        terminal = enabled and _is_terminal(sys.stderr)
        layout = (_BAR if terminal else _LINE) if total else _UNKNOWN_TOTAL
        self._started = False
        super().__init__(
            total=total,
            initial=initial,
            desc=f"…{label[1 - _LABEL :]}" if terminal and len(label) > _LABEL else label,
            unit=unit if total else f" {unit}",  # without a total the rate is shown, "9 documents/s"
            bar_format=layout,
            file=sys.stderr if terminal else _LogLines(),
            mininterval=0.1 if terminal else _LINE_SECONDS,
            miniters=1,
            dynamic_ncols=terminal,
            disable=not enabled,
        )

    def update(self, n: float | None = 1) -> bool | None:
        """Counts `n` more units as done. Cheap: may be called 100,000 times a second."""
        if not self._started and not self.disable:
            self._started = True
            self.unpause()
        return super().update(n)


class _LogLines:
    """A file for tqdm that logs each state of the bar as a line."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            logger.info("%s", line)

    def flush(self) -> None:
        pass


def duration(seconds: float) -> str:
    """Seconds in two units: `8 s`, `4 min 05 s`, `3 h 07 min`, `12 d 03 h`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    if rounded < 86_400:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{rounded // 86_400} d {rounded % 86_400 // 3600:02d} h"


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether lines can be redrawn; pseudo-terminals of CI runners often have no width."""
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return os.get_terminal_size(stream.fileno()).columns > 0
