"""Accuracy over latency as a picture: what a millisecond buys. Up and to the left is better."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clip_rd_edge.benchmarking import formats
from clip_rd_edge.benchmarking.findings import headline_score
from clip_rd_edge.benchmarking.labels import Dots, Numbers, place_labels
from clip_rd_edge.benchmarking.overview import heading
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.benchmarking.scores import ZeroShotScore
from clip_rd_edge.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
