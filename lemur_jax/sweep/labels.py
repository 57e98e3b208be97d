"""Where the names in a plot go: near their marks, and across nothing that is drawn.

Axes as in SVG: x to the right, y downwards, in its units.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Segment = tuple[Point, Point]

# At 13px. DejaVu Sans is the widest of the usual system fonts; names of digits and letters stay below this in it.
LETTER, BOLD, ASCENT, DESCENT = 7.8, 1.12, 11.0, 3.5
SPACE = 2.0  # between a name and what is beside it
NEAR = 14.0  # from there on a line shows which mark a name belongs to
_ACROSS = (7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 60.0, 90.0, 130.0, 180.0)  # between a mark and a name beside it
_SLIDES = (0.5, 0.1, 0.9, 0.3, 0.7)  # where along a name above or below it the mark is
_UP, _ROWS = 5.0, 50  # up and down, in steps of
_CROSSING, _LEADER = 30.0, 6.0  # so much further away is as bad as crossing a line, or as needing one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A name and its place.

    Attributes:
      box: that the text fills.
      anchor: which of its ends the text begins at, for SVG: the one that is near its mark.
      leader: the line from it to its mark, where it is not plain which mark that is.
    """

    box: Box
    anchor: str
    leader: Segment | None


def text_size(text: str, bold: bool = False) -> Point:
    """Width and height that a text of 13px takes at most."""
    return LETTER * len(text) * (BOLD if bold else 1.0), ASCENT + DESCENT


def place(
    sizes: Sequence[Point],
    marks: Sequence[Point],
    taken: Sequence[Box],
    lines: Sequence[Segment],
    inside: Box,
) -> list[Label]:
    """A place for each name, the nearest that is free; the same for the same input.

    Where nothing is free any more, a name stands in the nearest place inside the plot.

    Args:
      sizes: of the names' texts.
      marks: what they name.
      taken: what no name may cover: marks, error bars, points.
      lines: what none should cross.
      inside: the plot.
    """
    found: list[Label] = []
    for size, mark in zip(sizes, marks, strict=True):
        boxes = list(_around(mark, size))
        choices = [_label(box, mark, marks) for box in boxes if _within(box, inside)]
        choices = choices or [_label(boxes[0], mark, marks)]
        choices.sort(key=lambda label: _cost(label, mark, lines))
        found.append(next((label for label in choices if _is_free(label, taken, found)), choices[0]))
    return found


def _around(mark: Point, size: Point) -> Iterator[Box]:
    """Boxes around a mark; of those equally near, the preferred one first: right, left, above, below."""
    (x, y), (width, height) = mark, size
    beside = [left for step in _ACROSS for left in (x + step, x - step - width)]
    astride = [x - share * width for share in _SLIDES]
    for row in range(_ROWS):
        for middle in {y - row * _UP: 0, y + row * _UP: 0}:
            top, apart = middle - height / 2, abs(middle - y) - height / 2
            for left in [*beside, *(astride if apart > SPACE else ())]:
                yield left, top, left + width, top + height


def _label(box: Box, mark: Point, marks: Sequence[Point]) -> Label:
    """A leader is needed where a name is far from its mark, or nearer to another."""
    away = _distance(box, mark)
    near = away <= NEAR and all(_distance(box, other) > away for other in marks if other != mark)
    share = (mark[0] - box[0]) / (box[2] - box[0])
    anchor = "start" if share < 1 / 3 else "end" if share > 2 / 3 else "middle"
    return Label(box=box, anchor=anchor, leader=None if near else (_nearest(_wide(box), mark), mark))


def _is_free(label: Label, taken: Sequence[Box], found: Sequence[Label]) -> bool:
    wide = _wide(label.box)
    if any(overlap(wide, box) for box in (*taken, *(other.box for other in found))):
        return False
    if any(other.leader and crosses(other.leader, wide) for other in found):
        return False
    return not label.leader or not any(crosses(label.leader, other.box) for other in found)


def _cost(label: Label, mark: Point, lines: Sequence[Segment]) -> float:
    crossed = any(crosses(line, label.box) for line in lines)
    return _distance(label.box, mark) + _CROSSING * crossed + _LEADER * bool(label.leader)


def _wide(box: Box) -> Box:
    return box[0] - SPACE, box[1] - SPACE, box[2] + SPACE, box[3] + SPACE


def _nearest(box: Box, point: Point) -> Point:
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _distance(box: Box, point: Point) -> float:
    return math.dist(_nearest(box, point), point)


def _within(box: Box, outer: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have more than an edge in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def crosses(segment: Segment, box: Box) -> bool:
    """Whether a part of a segment lies inside a box (clipping of Liang and Barsky, 1984)."""
    (x, y), (end_x, end_y) = segment
    start, end = 0.0, 1.0
    for at, step, low, high in ((x, end_x - x, box[0], box[2]), (y, end_y - y, box[1], box[3])):
        if step == 0:
            if not low < at < high:
                return False
            continue
        first, last = sorted(((low - at) / step, (high - at) / step))
        start, end = max(start, first), min(end, last)
    return start < end
