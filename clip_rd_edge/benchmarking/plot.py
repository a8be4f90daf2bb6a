"""The plot of a report: accuracy against latency, with labels that do not overlap."""

from __future__ import annotations

import importlib.util
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.findings import headline_score
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.benchmarking.tables import heading, megabytes
from clip_rd_edge.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

Numbers = npt.NDArray[np.float64]
_GAP = 5.0  # points between a dot and its label
_LINE_SEGMENTS = 40  # per line between two dots
# Possible label positions, best first: direction from the dot, alignment.
_POSITIONS: tuple[tuple[float, float, Any, Any], ...] = (
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.7, 0.7, "left", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-0.7, 0.7, "right", "bottom"),
    (-0.7, -0.7, "right", "top"),
)
_WIDTH, _HEIGHT = 6.4, 4.2  # inches
_KEY_LINE_LENGTH, _KEY_LINE_HEIGHT = 84, 0.2  # characters, inches
_MAX_AREA = 1100.0  # points², the dot of the largest model
_MIN_AREA = 30.0  # points²; smaller dots would be hard to see
# For characters that the default font lacks, where they are installed.
_FURTHER_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Hebrew",
    "WenQuanYi Zen Hei", "Arial Unicode MS", "Microsoft YaHei", "Hiragino Sans", "STIXGeneral",
)  # fmt: skip


@dataclass(frozen=True)
class Palette:
    """Colours of roles, text, lines and background, shared with the HTML report."""

    roles: dict[str, str]
    ink: str
    muted: str
    line: str
    ground: str


_ROLES = ("teacher", "baseline", "student", "exported", "quantised")
LIGHT = Palette(
    roles=dict(zip(_ROLES, ("#2563eb", "#78716c", "#c2410c", "#0f766e", "#9333ea"), strict=True)),
    ink="#1c1917",
    muted="#57534e",
    line="#e7e5e4",
    ground="#ffffff",
)
DARK = Palette(
    roles=dict(zip(_ROLES, ("#7aa7ff", "#a8a29e", "#fb923c", "#2dd4bf", "#c084fc"), strict=True)),
    ink="#f5f5f4",
    muted="#b5afaa",
    line="#3a3633",
    ground="#1c1917",
)


def require_matplotlib() -> None:
    """Check for matplotlib before a long run, rather than fail at its end."""
    if importlib.util.find_spec("matplotlib") is None:
        # The hint does not name the extra that includes matplotlib, because it also installs torch.
        raise UsageError(
            "The report's plot needs the package 'matplotlib', which is not installed.", hint="pip install matplotlib"
        )


def draw(results: Results, *, file_format: Literal["png", "svg"], palette: Palette = LIGHT) -> bytes | None:
    """Plot top-1 on the headline's task against the latency of the image tower. The area of a dot is the size on disk.

    Where there is a teacher, top-1 is in per cent of the teacher's.

    Returns:
        The content of the image file, or None if the suite has no zero-shot task.
    """
    rows = [(row, score) for row in results.rows if (score := headline_score(results, row))]
    if not rows:
        return None
    # The object interface instead of pyplot: no global state, no window system.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    settings = {
        "font.size": 10,
        "font.family": ["sans-serif", *(name for name in _FURTHER_FONTS if name in installed)],
        "svg.hashsalt": "clip-rd-edge",
        "text.parse_math": False,  # a name with two dollar signs is no formula
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # no installed font has it
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", facecolor=palette.ground)
        FigureCanvasAgg(figure)
        _fill(figure.add_subplot(), rows, palette)
        buffer = io.BytesIO()
        # Without a date, the same results give an identical file.
        metadata: dict[str, Any] = {"Date": None} if file_format == "svg" else {}
        figure.savefig(buffer, format=file_format, dpi=200, metadata=metadata)
    return buffer.getvalue()


@dataclass(frozen=True)
class Dots:
    """N dots, each with a vertical error bar.

    Attributes:
        x, y, low, high: centres and ends of the bars, (N,), in data coordinates.
        radii: radii of the dots, (N,), in points.
    """

    x: Numbers
    y: Numbers
    low: Numbers
    high: Numbers
    radii: Numbers

    def boxes(self, axes: Axes, line: Sequence[int]) -> list[Bbox]:
        """Return the bounding boxes of dots and bars, and small ones along the line between the dots, in pixels."""
        from matplotlib.transforms import Bbox

        figure = cast("Figure", axes.figure)  # get_figure(root=True) is new in matplotlib 3.10
        centres, lows, highs = (
            axes.transData.transform(np.column_stack([self.x, y])) for y in (self.y, self.low, self.high)
        )
        boxes = []
        for (x, y), (_, low), (_, high), r in zip(centres, lows, highs, self.radii * figure.dpi / 72, strict=True):
            boxes += [Bbox.from_extents(x - r, y - r, x + r, y + r), Bbox.from_extents(x - 1, low, x + 1, high)]
        for start, end in pairwise(centres[list(line)]):
            points = start + (end - start) * np.linspace(0, 1, _LINE_SEGMENTS)[:, None]
            boxes += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in points]
        return boxes


def place_labels(
    axes: Axes, dots: Dots, names: Sequence[str], colours: Sequence[str], *, line: Sequence[int] = ()
) -> bool:
    """Label each dot at the first of _POSITIONS that is free, or at the one with the smallest overlap.

    Args:
        line: indices of the dots that a line connects, in order; labels avoid the line as well.

    Returns:
        Whether the labels can be read: none covers another or leaves the frame.
    """
    cast("Figure", axes.figure).draw_without_rendering()  # fixes the layout, so that pixel coordinates are final
    occupied, frame = dots.boxes(axes, line), axes.get_window_extent()
    labels: list[Bbox] = []
    legible = True
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        distance = dots.radii[index] + _GAP
        candidates = [
            axes.annotate(
                name, (dots.x[index], dots.y[index]), xytext=(right * distance, up * distance),
                textcoords="offset points", ha=horizontal, va=vertical, color=colour, fontsize=9.5, linespacing=1.25,
                zorder=4,
            )
            for right, up, horizontal, vertical in _POSITIONS
        ]  # fmt: skip
        boxes = [candidate.get_window_extent() for candidate in candidates]
        best = min(range(len(candidates)), key=lambda i: _overlap(boxes[i], occupied, frame))
        for i, candidate in enumerate(candidates):
            if i != best:
                candidate.remove()
        legible = legible and _overlap(boxes[best], labels, frame) < 1
        labels.append(boxes[best])
        occupied.append(boxes[best])
    return legible


def _overlap(box: Bbox, others: Sequence[Bbox], frame: Bbox) -> float:
    """Return the area of a label, in pixels², that overlaps others or lies outside the frame."""
    from matplotlib.transforms import Bbox

    shared = sum(abs(area.width * area.height) for other in others if (area := Bbox.intersection(box, other)))
    inside = Bbox.intersection(box, frame)
    return shared + box.width * box.height - (inside.width * inside.height if inside else 0)


def _fill(axes: Axes, rows: list[tuple[RowResult, ZeroShotScore]], palette: Palette) -> None:
    x = np.asarray([row.latency.image.p50 for row, _ in rows])
    whole = next((score.top1 for row, score in rows if row.role == "teacher" and score.top1), 1.0)
    y = np.asarray([100 * score.top1 / whole for _, score in rows])
    low = np.asarray([100 * score.top1_interval.low / whole for _, score in rows])
    high = np.asarray([100 * score.top1_interval.high / whole for _, score in rows])
    sizes = np.asarray([row.description.size_bytes for row, _ in rows], dtype=float)
    areas = np.maximum(_MAX_AREA * sizes / max(sizes.max(), 1), _MIN_AREA)
    colours = [palette.roles[row.role] for row, _ in rows]
    _set_axes(axes, x, low, high, palette, most=100 / whole)
    front = _pareto_front(x, y)
    axes.plot(x[front], y[front], color=palette.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.vlines(x, low, high, colors=colours, linewidth=1.2, zorder=2)
    axes.scatter(x, y, s=areas, c=colours, linewidths=1.2, edgecolors=palette.ground, zorder=3)
    names = [f"{row.label}\n{megabytes(row.description.size_bytes)} MB" for row, _ in rows]
    dots = Dots(x, y, low, high, np.sqrt(areas / np.pi))
    if not place_labels(axes, dots, names, colours, line=front):
        _number(axes, dots, names, colours, line=front)
    unit = "% of the teacher's" if whole < 1 else "%"
    title = f"{heading(rows[0][1].task)}: top-1, {unit}"
    axes.set_title(title, loc="left", color=palette.ink, fontsize=11, fontweight="bold", pad=10)
    legend = "Area: size on disk. Bar: 95 % confidence interval. Dotted: Pareto front."
    axes.set_xlabel(
        f"Image tower, ms per image (log scale)\n{legend}", color=palette.muted, fontsize=9, linespacing=1.5
    )


def _number(axes: Axes, dots: Dots, names: Sequence[str], colours: Sequence[str], *, line: Sequence[int]) -> None:
    """Label the dots with numbers in place of their names, which stand in a key below."""
    from matplotlib.lines import Line2D

    for text in list(axes.texts):
        text.remove()
    figure = cast("Figure", axes.figure)
    numbers = [str(number) for number in range(1, len(names) + 1)]
    lines = [f"{number}  {name}".replace("\n", ", ") for number, name in zip(numbers, names, strict=True)]
    key = [textwrap.fill(line, _KEY_LINE_LENGTH) for line in lines]
    figure.set_figheight(_HEIGHT + _KEY_LINE_HEIGHT * len("\n".join(key).splitlines()))
    handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours]
    figure.legend(handles, key, loc="outside lower center", frameon=False, fontsize=8.5, labelcolor=list(colours))
    place_labels(axes, dots, numbers, colours, line=line)


def _set_axes(axes: Axes, x: Numbers, low: Numbers, high: Numbers, palette: Palette, *, most: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.8, x.max() * 1.8)
    margin = max(0.12 * (high.max() - low.min()), 2.0)
    top = min(high.max() + margin, 1.04 * most)
    axes.set_ylim(max(low.min() - margin, -0.06 * top), top)  # no tick below 0, which is impossible
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_facecolor(palette.ground)
    axes.grid(color=palette.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=palette.muted)
    axes.spines[:].set_visible(False)


def _pareto_front(x: Numbers, y: Numbers) -> list[int]:
    """Return the indices of the models that no other model beats in both latency and accuracy, fastest first."""
    front: list[int] = []
    for index in np.lexsort((-y, x)):
        if not front or y[index] > y[front[-1]]:
            front.append(int(index))
    return front
