"""The report of a benchmark: results.json, and made from it alone a page and a plot.

The page is a single HTML file without scripts or external resources; images are embedded as data URIs.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.accuracy import Prediction, Sample
from clip_rd_edge.benchmarking.findings import above_chance, busy_remark, headline, headline_score, shipped_row
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.regression import BUSY, latency_noise
from clip_rd_edge.benchmarking.results import RESULTS, Results, RowResult, published, write_results
from clip_rd_edge.benchmarking.tables import (
    RELATIVE_NOTE,
    Cell,
    Section,
    chance_verdict,
    details,
    heading,
    markdown_table,
    megabytes,
    sections,
    share,
    signed_interval,
    signed_points,
)
from clip_rd_edge.bundle.outputs import require_output_file
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import read_text_limited, write_bytes, write_text
from clip_rd_edge.utils.paths import exists
from clip_rd_edge.utils.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HTML, PLOT = "report.html", "accuracy-latency.png"
_TEMPLATE = Path(__file__).with_name("page.html")


def require_report_folder(folder: Path) -> None:
    """Refuse a folder where a file of the user's has the name of one of a report's."""
    require_own_files(folder / RESULTS, lambda beginning: b'"suite":' in beginning, (folder / HTML, folder / PLOT))


def require_own_files(results: Path, is_ours: Callable[[bytes], bool], made: Sequence[Path]) -> None:
    """Refuse a file of results that is not ours by its beginning; without one, also files as they are made from it."""
    require_output_file(results, is_ours, what="an earlier run's", option="{output}")
    if not exists(results):
        for path in made:
            require_output_file(path, lambda beginning: False, what="an earlier report's", option="{output}")


def write_report(results: Results, folder: Path) -> None:
    """Write results.json, and from it alone report.html and the plot. The folder is created if necessary.

    They are published, so they have no path of this package and no secret; see `results.published`.
    """
    results = published(results)
    write_results(folder / RESULTS, results)
    plot = draw(results, file_format="png")
    if plot is not None:
        write_bytes(folder / PLOT, plot)
    write_text(folder / HTML, page(results))


def write_between_markers(document: Path, name: str, table: str) -> None:
    """Replace the text between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a Markdown file."""
    begin_marker, end_marker = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = read_text_limited(document)
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not (begin and end):
        raise InputError(f"{document} has no lines {begin_marker} and {end_marker}, which must enclose the table.")
    write_text(document, f"{before}{begin_marker}\n{table}\n{end_marker}{after}")


def figures_table(results: Results) -> str:
    """Return the report's main table, one column per model, as Markdown."""
    rows = [["", *(row.label for row in results.rows)]]
    for section in sections(results):
        rows.append([f"**{section.title}**", *("" for _ in results.rows)])
        for line in section.lines:
            cells = (f"{cell.text} ({cell.relative})" if cell.relative else cell.text for cell in line.cells)
            rows.append([line.name, *cells])
    return markdown_table(rows)


def page(results: Results) -> str:
    """Return the report as HTML."""
    lead, *findings = headline(results)
    lead_row = shipped_row(results) if results.first("teacher") else None
    paragraphs = "".join(f"<p>{_emphasise(sentence)}</p>" for sentence in findings)
    plot = _plot(results)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"{_escape(results.suite.name)}: accuracy, latency, size",
        lead=_emphasise(lead),
        lead_role=lead_row.role if lead_row else "student",
        findings=f'<div class="findings">{paragraphs}</div>' if findings else "",
        plot=f'<figure class="plot">{plot}</figure>' if plot else "",
        relative_note="".join(f'<p class="small">{_escape(note)}</p>' for note in _table_notes(results)),
        comparison=_table(results, sections(results)),
        skipped=_reasons("Not measured:", [(row.label, str(row)) for row in results.skipped])
        + _reasons("Missing data sets:", [(task.name, task.reason) for task in results.missing]),
        samples=_samples(results),
        differences=_differences(results),
        facts="\n".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in facts(results)),
        remarks="\n".join(f"<li>{_escape(remark)}</li>" for remark in remarks(results)),
        details=_table(results, details(results)),
    )


def _escape(text: str) -> str:
    """Return a text as HTML that shows it, control characters as escapes: some reorder the text around them."""
    return html.escape(printable(text))


def _emphasise(sentence: str) -> str:
    unbroken = _escape(sentence).replace("top-1", "top\u20111")
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", unbroken)


def _plot(results: Results) -> str:
    svg = draw(results, file_format="svg")
    if svg is None:
        return ""
    return (
        f'<img src="{_data_uri(svg, "image/svg+xml")}" width="640" height="420" '
        f'alt="Top-1 against the latency of the image tower; the table below has the numbers.">'
    )


def _table(results: Results, shown: Sequence[Section]) -> str:
    headings = "".join(map(_column_heading, results.rows))
    bodies = "".join(_table_body(section, len(results.rows)) for section in shown)
    head = f'<thead><tr><th scope="col">Model</th>{headings}</tr></thead>'
    return f'<div class="scroll" tabindex="0"><table class="models">{head}{bodies}</table></div>'


def _column_heading(row: RowResult) -> str:
    runtime = f"{row.description.runtime}, {row.description.precision}"
    dot = f'<span class="dot" style="--role: var(--{row.role})"></span>'
    return f'<th scope="col">{dot}{_escape(row.label)}<small>{_escape(runtime)}</small></th>'


def _table_body(section: Section, models: int) -> str:
    note = f" <span>{_escape(section.note)}</span>" if section.note else ""
    title = f'<tr><th scope="rowgroup" colspan="{models + 1}">{_escape(section.title)}{note}</th></tr>'
    lines = "".join(
        f'<tr><th scope="row">{_escape(line.name)}</th>{"".join(map(_cell, line.cells))}</tr>' for line in section.lines
    )
    return f"<tbody>{title}{lines}</tbody>"


def _cell(cell: Cell) -> str:
    relative = f" <small>{_escape(cell.relative)}</small>" if cell.relative else ""
    return f"<td>{_escape(cell.text)}{relative}</td>"


def _reasons(title: str, reasons: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><strong>{_escape(name)}</strong>: {_escape(reason)}</li>" for name, reason in reasons)
    return f'<p>{title}</p><ul class="remarks">{items}</ul>' if items else ""


def _samples(results: Results) -> str:
    if not results.samples:
        return ""
    items = "\n".join(map(_sample, results.samples))
    return (
        f'<section aria-labelledby="samples"><h2 id="samples">Sample predictions</h2>'
        f'<p class="small">{_escape(_samples_note(results))}</p><ul class="samples">{items}</ul></section>'
    )


def _table_notes(results: Results) -> list[str]:
    """Return what one has to know to read the table: what figures relate to, and whether latencies can be trusted."""
    busy = [] if busy_remark(results) else busy_remark(results, above=BUSY)  # else the headline has it
    return [*([RELATIVE_NOTE] if results.first("teacher") else []), *busy]


def _sample(sample: Sample) -> str:
    predictions = "".join(map(_prediction, sample.predictions))
    image = f'<img src="{_data_uri(sample.png, "image/png")}" alt="{_escape(sample.label)}">'
    return f"<li>{image}<div><strong>{_escape(sample.label)}</strong><dl>{predictions}</dl></div></li>"


def _prediction(prediction: Prediction) -> str:
    symbol, css_class = ("✓", "yes") if prediction.right else ("✗", "no")
    shown = f'<span class="{css_class}">{symbol}</span> {_escape(prediction.label)}, {share(prediction.probability, 1)}'
    return f"<dt>{_escape(prediction.row)}</dt><dd>{shown}</dd>"


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _differences(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_escape(f"{compared.label} vs {compared.reference}")}</th>'
        f'<td class="text">{_escape(heading(compared.task))}</td><td>{signed_points(compared.difference)}</td>'
        f'<td>{signed_interval(compared.interval)}</td><td class="text small">{chance_verdict(compared)}</td></tr>'
        for compared in results.comparisons
    )
    if not rows:
        return ""
    headings = '<th scope="col">Models</th><th scope="col" class="text">Task</th><th scope="col">Points</th>'
    headings += '<th scope="col">95 % interval</th><th scope="col" class="text">Verdict</th>'
    head = f"<thead><tr>{headings}</tr></thead>"
    return (
        f'<section aria-labelledby="differences"><h2 id="differences">Differences in top-1</h2>'
        f'<div class="scroll" tabindex="0"><table class="differences">{head}<tbody>{rows}</tbody></table></div>'
        f"</section>"
    )


def facts(results: Results) -> list[tuple[str, str]]:
    """Return the hardware and software as names and values."""
    environment = results.environment
    memory = f"{environment.memory_bytes / 2**30:.1f} GiB" if environment.memory_bytes else ""
    rows = [
        ("Machine", ", ".join(part for part in (environment.machine, memory) if part)),
        ("GPU", environment.accelerator),
        ("Instruction sets", ", ".join(environment.instruction_sets)),
        ("System", environment.system),
        ("Python", environment.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in environment.packages.items())),
        ("Threads", str(results.suite.threads)),
        ("Date", environment.date),
        ("Commit", environment.commit),
    ]
    return [(name, value) for name, value in rows if value]


def remarks(results: Results) -> list[str]:
    """Return what a careful reader should know before quoting a number."""
    suite, latency = results.suite, results.rows[0].latency
    notes = [
        *_chance_remarks(results),
        f"Latency: batch 1 on {suite.threads} thread{'s' if suite.threads > 1 else ''}; all models timed in turn in "
        f"one process, {latency.rounds} rounds, after warming up until the latency was steady. End to end is from the "
        f"image file to the label.",
        *_reliability_remarks(results),
    ]
    runtimes: dict[str, list[str]] = {}
    for row in results.rows:
        runtimes.setdefault(row.description.runtime, []).append(row.label)
    if len(runtimes) > 1:
        assignment = "; ".join(f"{', '.join(labels)} in {runtime}" for runtime, labels in runtimes.items())
        notes.append(f"Models ran in different runtimes ({assignment}), which account for part of the speed-ups.")
    notes.append("Size: the files needed to run the model, without the runtime's own libraries.")
    scores = [s for s in results.rows[0].scores if isinstance(s, ZeroShotScore) and s.templates not in ("", "{}")]
    if scores:
        notes.append(f"Prompt templates: {'; '.join(f'{score.task}: {score.templates}' for score in scores)}.")
    if results.comparisons:
        notes.append(
            "Intervals are 95 % confidence intervals over the task's images; those of differences are "
            "paired by image. They do not cover other training seeds or other images."
        )
    return notes


def _chance_remarks(results: Results) -> list[str]:
    at_chance: dict[str, list[str]] = {}
    for row in results.rows:
        for score in row.scores:
            if isinstance(score, ZeroShotScore) and not above_chance(score):
                at_chance.setdefault(score.task, []).append(row.label)
    return [f"Not significantly above chance level on {task}: {', '.join(rows)}." for task, rows in at_chance.items()]


def _reliability_remarks(results: Results) -> list[str]:
    """Return how reliable the figures are, and which could not be measured."""
    if (noise := latency_noise(results)) is None:
        notes = ["Noise: unknown, as a single round does not show it; latencies of more rounds can be compared."]
    else:
        notes = [
            f"Noise: the p50s of two runs like this one can differ by up to {share(noise, 1)} by chance, "
            f"relative to a fixed reference workload that is timed beside the models."
        ]
    if cold_starts := [row.cold_start for row in results.rows if row.cold_start]:
        notes.append(
            f"Cold start and memory: a new process that does its imports, loads the model and embeds one image and one "
            f"text, with its files in the system's cache; median of up to "
            f"{max(cold_start.runs for cold_start in cold_starts)} runs."
        )
    return notes


def _samples_note(results: Results) -> str:
    last = results.samples[0].predictions[-1].row
    correct = sum(sample.predictions[-1].right for sample in results.samples)
    wrong = len(results.samples) - correct
    return (
        f"{heading(results.samples[0].task)}, sampled at random: {correct} images that {last} classifies correctly and "
        f"{wrong} that it gets wrong, so the ratio is not its accuracy. Each prediction is shown with its probability."
    )


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
_ROLE_COLOURS = {
    "teacher": "#2563eb", "baseline": "#78716c", "student": "#c2410c", "exported": "#0f766e", "quantised": "#9333ea",
}  # fmt: skip
_INK, _MUTED, _LINES, _GROUND = "#1c1917", "#57534e", "#e7e5e4", "#ffffff"


def require_matplotlib() -> None:
    """Check for matplotlib before a long run, rather than fail at its end."""
    if importlib.util.find_spec("matplotlib") is None:
        # The hint does not name the extra that includes matplotlib, because it also installs torch.
        raise UsageError(
            "The report's plot needs the package 'matplotlib', which is not installed.", hint="pip install matplotlib"
        )


def draw(results: Results, *, file_format: Literal["png", "svg"]) -> bytes | None:
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
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", facecolor=_GROUND)
        FigureCanvasAgg(figure)
        _fill(figure.add_subplot(), rows)
        buffer = io.BytesIO()
        # Without a date, the same results give an identical file.
        metadata: dict[str, Any] = {"Date": None} if file_format == "svg" else {}
        figure.savefig(buffer, format=file_format, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _fill(axes: Axes, rows: list[tuple[RowResult, ZeroShotScore]]) -> None:
    x = np.asarray([row.latency.image.p50 for row, _ in rows])
    whole = next((score.top1 for row, score in rows if row.role == "teacher" and score.top1), 1.0)
    y = np.asarray([100 * score.top1 / whole for _, score in rows])
    low = np.asarray([100 * score.top1_interval.low / whole for _, score in rows])
    high = np.asarray([100 * score.top1_interval.high / whole for _, score in rows])
    sizes = np.asarray([row.description.size_bytes for row, _ in rows], dtype=float)
    areas = np.maximum(_MAX_AREA * sizes / max(sizes.max(), 1), _MIN_AREA)
    colours = [_ROLE_COLOURS[row.role] for row, _ in rows]
    _set_axes(axes, x, low, high, most=100 / whole)
    front = _pareto_front(x, y)
    axes.plot(x[front], y[front], color=_MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.vlines(x, low, high, colors=colours, linewidth=1.2, zorder=2)
    axes.scatter(x, y, s=areas, c=colours, linewidths=1.2, edgecolors=_GROUND, zorder=3)
    _number(axes, rows, x, y, np.sqrt(areas / np.pi), colours)
    unit = "% of the teacher's" if whole < 1 else "%"
    title = f"{heading(rows[0][1].task)}: top-1, {unit}"
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=10)
    legend = "Area: size on disk. Bar: 95 % confidence interval. Dotted: Pareto front."
    axes.set_xlabel(f"Image tower, ms per image (log scale)\n{legend}", color=_MUTED, fontsize=9, linespacing=1.5)


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


def _set_axes(axes: Axes, x: Numbers, low: Numbers, high: Numbers, *, most: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.8, x.max() * 1.8)
    margin = max(0.12 * (high.max() - low.min()), 2.0)
    top = min(high.max() + margin, 1.04 * most)
    axes.set_ylim(max(low.min() - margin, -0.06 * top), top)  # no tick below 0, which is impossible
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_facecolor(_GROUND)
    axes.grid(color=_LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_MUTED)
    axes.spines[:].set_visible(False)


def _pareto_front(x: Numbers, y: Numbers) -> list[int]:
    """Return the indices of the models that no other model beats in both latency and accuracy, fastest first."""
    front: list[int] = []
    for index in np.lexsort((-y, x)):
        if not front or y[index] > y[front[-1]]:
            front.append(int(index))
    return front
