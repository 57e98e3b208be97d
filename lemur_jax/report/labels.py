"""Placement of the labels of a scatter plot: near their marks, and over nothing that is drawn.

Coordinates are pixels as in SVG: x to the right, y downwards.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Segment = tuple[Point, Point]

# At 13 px. DejaVu Sans is the widest of the usual system fonts; labels of digits and letters are narrower in it.
LETTER, BOLD, ASCENT, DESCENT = 7.8, 1.12, 11.0, 3.5
SPACE = 2.0  # around a label
NEAR = 14.0  # a label further away than this gets a leader line
# Distances that are tried to the left and right.
_BESIDE = (7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 60.0, 90.0, 130.0, 180.0)
_ALONG = (0.5, 0.1, 0.9, 0.3, 0.7)  # where the mark stands along a label above or below it
_UP, _ROWS = 5.0, 50  # distances that are tried up and down: multiples of 5
_CROSSING, _LEADER = 30.0, 6.0  # costs, in pixels of distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """The place of a label."""

    box: Box  # filled by the text
    anchor: str  # SVG's text-anchor: the end of the text that is near its mark
    leader: Segment | None  # a line to the mark, where the label is far from it or nearer to another mark


def text_size(text: str, bold: bool = False) -> Point:
    """Upper bounds of the width and the height of a text at 13 px."""
    return LETTER * len(text) * (BOLD if bold else 1.0), ASCENT + DESCENT


def place_labels(
    sizes: Sequence[Point],
    marks: Sequence[Point],
    taken: Sequence[Box],
    lines: Sequence[Segment],
    inside: Box,
) -> list[Label]:
    """Places each label at the cheapest free position inside the plot, or at the cheapest if none is free.

    Args:
      sizes: widths and heights of the labels.
      marks: what they name.
      taken: what no label may cover.
      lines: what a label should not cross.
      inside: the plot.
    """
    placed: list[Label] = []
    for size, mark in zip(sizes, marks, strict=True):
        boxes = list(_boxes_around(mark, size))
        labels = [_label(box, mark, marks) for box in boxes if contains(inside, box)]
        labels = sorted(labels, key=lambda label: _cost(label, mark, lines)) or [
            _label(boxes[0], mark, marks)
        ]
        placed.append(next((label for label in labels if is_free(label, taken, placed)), labels[0]))
    return placed


def _boxes_around(mark: Point, size: Point) -> Iterator[Box]:
    """Positions around a mark; of those equally near, the preferred one first: right, left, above, below."""
    (x, y), (width, height) = mark, size
    beside = [left for step in _BESIDE for left in (x + step, x - step - width)]
    along = [x - share * width for share in _ALONG]
    for row in range(_ROWS):
        for middle in {y - row * _UP: 0, y + row * _UP: 0}:
            top, apart = middle - height / 2, abs(middle - y) - height / 2
            for left in [*beside, *(along if apart > SPACE else ())]:
                yield left, top, left + width, top + height


def _label(box: Box, mark: Point, marks: Sequence[Point]) -> Label:
    away = distance(box, mark)
    near = away <= NEAR and all(distance(box, other) > away for other in marks if other != mark)
    share = (mark[0] - box[0]) / (box[2] - box[0])
    anchor = "start" if share < 1 / 3 else "end" if share > 2 / 3 else "middle"
    return Label(box=box, anchor=anchor, leader=None if near else (_nearest(_wide(box), mark), mark))


def is_free(label: Label, taken: Sequence[Box], placed: Sequence[Label]) -> bool:
    """Whether a label and its leader cover nothing that is taken, and no label that is placed, nor its leader."""
    wide = _wide(label.box)
    return not (
        any(overlap(wide, box) for box in taken)
        or any(overlap(wide, other.box) for other in placed)
        or any(other.leader and crosses(other.leader, wide) for other in placed)
        or any(label.leader and crosses(label.leader, other.box) for other in placed)
    )


def _cost(label: Label, mark: Point, lines: Sequence[Segment]) -> float:
    crossed = any(crosses(line, label.box) for line in lines)
    return distance(label.box, mark) + _CROSSING * crossed + _LEADER * bool(label.leader)


def _wide(box: Box) -> Box:
    return box[0] - SPACE, box[1] - SPACE, box[2] + SPACE, box[3] + SPACE


def _nearest(box: Box, point: Point) -> Point:
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def distance(box: Box, point: Point) -> float:
    """From a point to the nearest point of a box."""
    return math.dist(_nearest(box, point), point)


def contains(outer: Box, box: Box) -> bool:
    """Whether `box` lies inside `outer`."""
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
