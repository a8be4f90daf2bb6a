"""The plot of a report: accuracy against latency, of numbered models with a key."""

from __future__ import annotations

import importlib.util
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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

Numbers = npt.NDArray[np.float64]
_GAP = 3.0  # points between a dot and its number
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
    _number(axes, rows, x, y, np.sqrt(areas / np.pi), colours)
    unit = "% of the teacher's" if whole < 1 else "%"
    title = f"{heading(rows[0][1].task)}: top-1, {unit}"
    axes.set_title(title, loc="left", color=palette.ink, fontsize=11, fontweight="bold", pad=10)
    legend = "Area: size on disk. Bar: 95 % confidence interval. Dotted: Pareto front."
    axes.set_xlabel(
        f"Image tower, ms per image (log scale)\n{legend}", color=palette.muted, fontsize=9, linespacing=1.5
    )


def _number(
    axes: Axes,
    rows: Sequence[tuple[RowResult, ZeroShotScore]],
    x: Numbers,
    y: Numbers,
    radii: Numbers,
    colours: Sequence[str],
) -> None:
    """Number the dots; a key below has the names, which would cover each other, and the sizes."""
    from matplotlib.lines import Line2D

    for number, radius in enumerate(radii):
        axes.annotate(
            str(number + 1), (x[number], y[number]), xytext=(0.7 * radius + _GAP, 0.7 * radius + _GAP),
            textcoords="offset points", color=colours[number], fontsize=9.5, zorder=4,
        )  # fmt: skip
    lines = [
        f"{number}  {row.label}, {megabytes(row.description.size_bytes)} MB" for number, (row, _) in enumerate(rows, 1)
    ]
    key = [textwrap.fill(line, _KEY_LINE_LENGTH) for line in lines]
    figure = cast("Figure", axes.figure)  # get_figure(root=True) is new in matplotlib 3.10
    figure.set_figheight(_HEIGHT + _KEY_LINE_HEIGHT * len("\n".join(key).splitlines()))
    handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours]
    figure.legend(handles, key, loc="outside lower center", frameon=False, fontsize=8.5, labelcolor=list(colours))


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
