"""Names beside the dots of a plot, where they cover neither each other nor a dot."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.report.findings import headline_score
from clip_rd_edge.benchmarking.report.tables import heading
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.errors import UsageError

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


_LARGEST = 1100.0  # points², the area of the biggest model's dot
_SMALLEST = 30.0  # below this a dot would not be seen


@dataclass(frozen=True)
class Palette:
    """Colours of roles, text, lines and ground; the page of the report has the same."""

    roles: dict[str, str]
    ink: str
    muted: str
    line: str
    ground: str


LIGHT = Palette(
    roles={
        "teacher": "#2563eb",
        "baseline": "#78716c",
        "student": "#c2410c",
        "exported": "#0f766e",
        "quantised": "#9333ea",
    },
    ink="#1c1917",
    muted="#57534e",
    line="#e7e5e4",
    ground="#ffffff",
)
DARK = Palette(
    roles={
        "teacher": "#7aa7ff",
        "baseline": "#a8a29e",
        "student": "#fb923c",
        "exported": "#2dd4bf",
        "quantised": "#c084fc",
    },
    ink="#f5f5f4",
    muted="#b5afaa",
    line="#3a3633",
    ground="#1c1917",
)


def require_matplotlib() -> None:
    """Refuse before a long run what would fail at its end.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        # Not the extra that brings it: that one brings torch, too, and a device wants none.
        raise UsageError(
            "The report's plot needs the package 'matplotlib', which is not installed.", hint="pip install matplotlib"
        )


def draw(results: Results, *, file_format: Literal["png", "svg"], palette: Palette = LIGHT) -> bytes | None:
    """The plot: top-1 of the headline's task over the image tower's latency, a dot's area its size on disk.

    Returns:
        The file's bytes, or None where the suite has no zero-shot task.
    """
    rows = [(row, score) for row in results.rows if (score := headline_score(results, row))]
    if not rows:
        return None
    # The object interface, not pyplot: no global state, no window system.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "svg.hashsalt": "clip-rd-edge"}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor=palette.ground)
        FigureCanvasAgg(figure)
        _fill(figure.add_subplot(), rows, palette)
        buffer = io.BytesIO()
        # Without a date, the same results give the same file.
        metadata: dict[str, Any] = {"Date": None} if file_format == "svg" else {}
        figure.savefig(buffer, format=file_format, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _fill(axes: Axes, rows: list[tuple[RowResult, ZeroShotScore]], palette: Palette) -> None:
    x = np.asarray([row.latency.image.p50 for row, _ in rows])
    y = np.asarray([100 * score.top1 for _, score in rows])
    low = np.asarray([100 * score.top1_interval.low for _, score in rows])
    high = np.asarray([100 * score.top1_interval.high for _, score in rows])
    sizes = np.asarray([row.description.size_bytes for row, _ in rows], dtype=float)
    areas = np.maximum(_LARGEST * sizes / max(sizes.max(), 1), _SMALLEST)
    colours = [palette.roles[row.role] for row, _ in rows]
    _set_axes(axes, x, low, high, palette)
    front = _pareto_front(x, y)
    axes.plot(x[front], y[front], color=palette.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.vlines(x, low, high, colors=colours, linewidth=1.2, zorder=2)
    axes.scatter(x, y, s=areas, c=colours, linewidths=1.2, edgecolors=palette.ground, zorder=3)
    names = [f"{row.label}\n{formats.megabytes(row.description.size_bytes)} MB" for row, _ in rows]
    place_labels(axes, Dots(x, y, low, high, np.sqrt(areas / np.pi)), names, colours, joined=front)
    title = f"{heading(rows[0][1].task)}: top-1, %"
    axes.set_title(title, loc="left", color=palette.ink, fontsize=11, fontweight="bold", pad=10)
    legend = "Area: size on disk. Bar: 95 % interval. Dotted: what no other beats in both."
    axes.set_xlabel(
        f"Image tower, ms a picture (log scale)\n{legend}", color=palette.muted, fontsize=9, linespacing=1.5
    )


def _set_axes(axes: Axes, x: Numbers, low: Numbers, high: Numbers, palette: Palette) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.8, x.max() * 1.8)
    room = max(0.12 * (high.max() - low.min()), 2.0)
    top = min(high.max() + room, 104)
    axes.set_ylim(max(low.min() - room, -0.06 * top), top)  # no tick below 0, where nothing can be
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_facecolor(palette.ground)
    axes.grid(color=palette.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=palette.muted)
    axes.spines[:].set_visible(False)


def _pareto_front(x: Numbers, y: Numbers) -> list[int]:
    """Indices of the models that no other beats in both, from fast to slow."""
    front: list[int] = []
    for index in np.lexsort((-y, x)):
        if not front or y[index] > y[front[-1]]:
            front.append(int(index))
    return front
