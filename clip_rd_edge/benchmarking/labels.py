"""Names beside the dots of a plot, where they cover neither each other nor a dot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

Numbers = npt.NDArray[np.float64]
_GAP = 5.0  # points between a dot and its label
_PIECES = 40  # that a line between two dots is cut into
# Where a label may stand, best first: direction from the dot, alignment.
_PLACES: tuple[tuple[float, float, Any, Any], ...] = (
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.7, 0.7, "left", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-0.7, 0.7, "right", "bottom"),
    (-0.7, -0.7, "right", "top"),
)


@dataclass(frozen=True)
class Dots:
    """N dots with a vertical bar each.

    Attributes:
        x, y, low, high: centres and bars' ends, (N,), in data coordinates.
        radii: (N,), in points.
    """

    x: Numbers
    y: Numbers
    low: Numbers
    high: Numbers
    radii: Numbers


def place_labels(
    axes: Axes, dots: Dots, names: Sequence[str], colours: Sequence[str], *, joined: Sequence[int] = ()
) -> None:
    """Write each dot's name beside it, at the first of _PLACES that is free, else at the one that covers least.

    Args:
        joined: the dots that a line goes through, in its order; names keep off that, too.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the layout, so that pixels can be compared
    taken = [*_boxes(axes, dots, figure.dpi / 72), *_line_boxes(axes, dots, joined)]
    frame = axes.get_window_extent()
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        choices = [_write(axes, dots, index, place, name, colour) for place in _PLACES]
        boxes = [choice.get_window_extent() for choice in choices]
        best = min(range(len(choices)), key=lambda i: _covered(boxes[i], taken, frame))
        for i, choice in enumerate(choices):
            if i != best:
                choice.remove()
        taken.append(boxes[best])


def _boxes(axes: Axes, dots: Dots, pixels_a_point: float) -> list[Bbox]:
    """What dots and bars cover, in pixels."""
    from matplotlib.transforms import Bbox

    def to_pixels(y: Numbers) -> Numbers:
        moved: Numbers = axes.transData.transform(np.column_stack([dots.x, y]))
        return moved

    boxes = []
    for (x, y), (_, low), (_, high), r in zip(
        to_pixels(dots.y), to_pixels(dots.low), to_pixels(dots.high), dots.radii * pixels_a_point, strict=True
    ):
        boxes += [Bbox.from_extents(x - r, y - r, x + r, y + r), Bbox.from_extents(x - 1, low, x + 1, high)]
    return boxes


def _line_boxes(axes: Axes, dots: Dots, joined: Sequence[int]) -> list[Bbox]:
    """Small boxes along a line, in pixels."""
    from matplotlib.transforms import Bbox

    ends = axes.transData.transform(np.column_stack([dots.x, dots.y]))[list(joined)]
    points = [start + (end - start) * part for start, end in pairwise(ends) for part in np.linspace(0, 1, _PIECES)]
    return [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in points]


def _write(axes: Axes, dots: Dots, index: int, place: tuple[float, float, Any, Any], name: str, colour: str) -> Text:
    right, up, horizontal, vertical = place
    distance = dots.radii[index] + _GAP
    return axes.annotate(
        name,
        (dots.x[index], dots.y[index]),
        xytext=(right * distance, up * distance),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        color=colour,
        fontsize=9.5,
        linespacing=1.25,
        zorder=4,
    )


def _covered(box: Bbox, others: Sequence[Bbox], frame: Bbox) -> float:
    """Area in pixels² that a label has in common with others or outside the frame."""
    from matplotlib.transforms import Bbox

    common = sum(abs(part.width * part.height) for other in others if (part := Bbox.intersection(box, other)))
    inside = Bbox.intersection(box, frame)
    return common + box.width * box.height - (inside.width * inside.height if inside else 0)
