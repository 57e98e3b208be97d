"""Placement of the labels of a scatter plot: near their marks, and over nothing that is drawn.

Coordinates are pixels as in SVG: x to the right, y downwards.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# At 13 px. DejaVu Sans is the widest of the usual system fonts; labels of digits and letters are narrower in it.
LETTER, BOLD, ASCENT, DESCENT = 7.8, 1.12, 11.0, 3.5
SPACE = 2.0  # around a label
NEAR = 14.0  # a label further away than this gets a leader line
_DISTANCES = (7, 10, 14, *range(20, 400, 8))  # from a mark, that are tried
_DIRECTIONS = 32  # that are tried at each distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """The place of a label."""

    box: Box  # filled by the text
    anchor: str  # SVG's text-anchor: the end of the text that is near its mark
    leader: tuple[Point, Point] | None  # a line from the label to its mark, if they are far apart


def text_size(text: str, bold: bool = False) -> Point:
    """Upper bounds of the width and the height of a text at 13 px."""
    return LETTER * len(text) * (BOLD if bold else 1.0), ASCENT + DESCENT


def place_labels(
    sizes: Sequence[Point], marks: Sequence[Point], taken: Sequence[Box], inside: Box
) -> list[Label]:
    """Places each label at the nearest free position inside the plot, or at the nearest if none is free.

    `sizes` are widths and heights of the labels of `marks`; no label may cover a box in `taken`.
    """
    placed: list[Label] = []
    for size, mark in zip(sizes, marks, strict=True):
        candidates = list(_candidates(mark, size))
        # A label that is wider than the plot extends beyond it.
        labels = [label for label in candidates if contains(inside, label.box)] or candidates[:1]
        obstacles = np.reshape([*taken, *(other.box for other in placed)], (-1, 4))
        is_free = ~overlap(np.array([[label.box] for label in labels]), obstacles, SPACE).any(axis=1)
        placed.append(labels[np.argmax(is_free)])  # the first one
    return placed


def _candidates(mark: Point, size: Point) -> Iterator[Label]:
    """Positions around a mark, the nearest first; of those equally near the one to the right first."""
    (x, y), (width, height) = mark, size
    for distance in _DISTANCES:
        for index in range(_DIRECTIONS):
            angle = 2 * math.pi * index / _DIRECTIONS
            near_x, near_y = x + distance * math.cos(angle), y + distance * math.sin(angle)
            anchor, share = ("start", 0.0) if math.cos(angle) > 0.3 else ("middle", 0.5)
            if math.cos(angle) < -0.3:
                anchor, share = "end", 1.0
            left, top = near_x - share * width, near_y - (1 - math.sin(angle)) / 2 * height
            leader = ((near_x, near_y), mark) if distance > NEAR else None
            yield Label(box=(left, top, left + width, top + height), anchor=anchor, leader=leader)


def contains(outer: Box, box: Box) -> bool:
    """Whether `box` lies inside `outer`."""
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def overlap(one: ArrayLike, other: ArrayLike, space: float = 0.0) -> np.ndarray:
    """Whether boxes [..., 4] have more than an edge in common, or lie less than `space` apart."""
    one, other = np.asarray(one), np.asarray(other)
    return np.all((one[..., :2] - space < other[..., 2:]) & (other[..., :2] < one[..., 2:] + space), axis=-1)
