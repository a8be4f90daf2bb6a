"""The report as Markdown, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clip_rd_edge.benchmarking import formatting
from clip_rd_edge.benchmarking.formatting import inert_markdown, interval, markdown_table, percent
from clip_rd_edge.benchmarking.metrics import Recall, RetrievalScore, Score, ZeroShotScore
from clip_rd_edge.benchmarking.report.findings import headline
from clip_rd_edge.benchmarking.report.html import page
from clip_rd_edge.benchmarking.report.method import facts, remarks, samples_note, worst_note
from clip_rd_edge.benchmarking.report.plot import draw
from clip_rd_edge.benchmarking.report.tables import RELATIVE_NOTE, Cell, Section, details, differences, sections
from clip_rd_edge.benchmarking.results import RESULTS, Answer, Results, published, write_results
from clip_rd_edge.bundle.outputs import require_output_file
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.files import read_text_limited, write_bytes, write_text
from clip_rd_edge.utils.paths import exists

_NAME_WIDTH = 16  # columns in which a longer name of a task is broken, rather than its figures


def write_between_markers(document: Path, name: str, table: str) -> None:
    """Replace the text between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a Markdown file."""
    begin_marker, end_marker = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = read_text_limited(document)  # which keeps the line ends of Windows
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not (begin and end):
        raise InputError(f"{document} has no lines {begin_marker} and {end_marker}, which must enclose the table.")
    enclosed = f"{begin_marker}\n{table}\n{end_marker}"
    if "\r\n" in text:
        enclosed = enclosed.replace("\n", "\r\n")
    write_text(document, f"{before}{enclosed}{after}")


MARKDOWN, HTML, PLOT = "report.md", "report.html", "accuracy-latency.png"


def require_report_folder(folder: Path) -> None:
    """Refuse a folder where a file of the user's has the name of one of a report's."""
    require_output_file(
        folder / RESULTS, lambda beginning: b'"suite":' in beginning, what="a benchmark's", option="{output}"
    )
    if not exists(folder / RESULTS):
        for name in (MARKDOWN, HTML, PLOT):
            require_output_file(folder / name, lambda beginning: False, what="an earlier report's", option="{output}")


def write_report(results: Results, folder: Path) -> None:
    """Write results.json, and from it alone report.md, report.html and the plot. The folder is created if necessary.

    They are published, so they have no path of this package and no secret; see `results.published`.
    """
    results = published(results)
    write_results(folder / RESULTS, results)
    plot = draw(results, file_format="png")
    if plot is not None:
        write_bytes(folder / PLOT, plot)
    write_text(folder / MARKDOWN, markdown(results, plot=plot is not None))
    write_text(folder / HTML, page(results))


def markdown(results: Results, *, plot: bool) -> str:
    """Return the report as Markdown.

    Args:
        plot: whether accuracy-latency.png exists beside it.
    """
    parts = [
        f"# {inert_markdown(results.suite.name)}: accuracy, latency, size",
        "\n\n".join(map(inert_markdown, headline(results))),
    ]
    notes = [RELATIVE_NOTE] if results.first("teacher") else []
    parts += ["## Comparison", *notes, figures_table(results)]
    if results.skipped:
        skipped = (f"**{row.label}** was not measured: {row}" for row in results.skipped)
        parts.append(_list(skipped))
    if results.missing:
        parts.append(_list(f"**{task.name}** is missing: {task.reason}" for task in results.missing))
    if results.samples:
        parts += ["## Sample predictions", inert_markdown(samples_note(results)), _samples_table(results)]
    if results.worst:
        parts += ["## Worst classes", inert_markdown(worst_note(results)), _worst_table(results)]
    if results.comparisons:
        parts += ["## Differences in top-1", _differences_table(results)]
    parts += ["## Method", _table(["", ""], [[f"**{name}**", value] for name, value in facts(results)])]
    parts += [_list(remarks(results))]
    parts += ["## All other figures", _models_table(results, details(results))]
    if plot:
        parts.insert(2, f"![Top-1 against the latency of the image tower]({PLOT})")
    return "\n\n".join(parts) + "\n"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {inert_markdown(item)}" for item in items)


def figures_table(results: Results) -> str:
    """Return the report's main table, one column per model, as Markdown."""
    return _models_table(results, sections(results))


def _models_table(results: Results, shown: Sequence[Section]) -> str:
    rows = []
    for section in shown:
        rows.append([f"**{section.title}**", *("" for _ in results.rows)])
        for line in section.lines:
            cells = (f"{cell.text} ({cell.relative})" if cell.relative else cell.text for cell in line.cells)
            rows.append([line.name, *cells])
    return _table(["", *(row.label for row in results.rows)], rows, numeric=len(results.rows))


def _samples_table(results: Results) -> str:
    headings = ["True label", *(answer.row for answer in results.samples[0].answers)]
    return _table(headings, [[sample.label, *map(_answer, sample.answers)] for sample in results.samples])


def _worst_table(results: Results) -> str:
    rows = [[worst.label, f"{worst.right} of {worst.images}", worst.taken_for] for worst in results.worst]
    return _table(["Class", "Correct", "Most often mistaken for"], rows)


def _answer(answer: Answer) -> str:
    return f"{'✓' if answer.right else '✗'} {answer.label}, {formatting.share(answer.probability, 1)}"


def _differences_table(results: Results) -> str:
    headings = ["Models", "Task", "", "Points", "95 % interval"]
    rows = [[row.models, row.task, row.verdict, row.points, row.interval] for row in differences(results)]
    return _table(headings, rows, numeric=2)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: int = 0) -> str:
    """Build a Markdown table; the last `numeric` columns are right-aligned."""
    return markdown_table([headings, *rows], left=range(len(headings) - numeric))


def terminal_tables(results: Results, width: int) -> list[Table]:
    """Return the report's table, one column per model, each figure also relative to the teacher's.

    Args:
        width: of the terminal, in columns. Models for which there is no room are in further tables.
    """
    shown = sections(results)
    tables: list[Table] = []
    for count in range(len(results.rows), 0, -1):
        starts = range(0, len(results.rows), count)
        tables = [_terminal_table(results, shown, slice(start, start + count)) for start in starts]
        if all(_width(table) <= width for table in tables):
            break
    if tables and results.first("teacher"):
        tables[-1].caption = RELATIVE_NOTE
        tables[-1].caption_justify = "left"
    return tables


def _terminal_table(results: Results, shown: Sequence[Section], models: slice) -> Table:
    table = plain_table("", *(row.label for row in results.rows[models]))
    for section in shown:
        table.add_section()
        table.add_row(Text(section.title, style="bold"))
        for line in section.lines:
            table.add_row(line.name, *map(_cell, line.cells[models]))
    return table


def _width(table: Table) -> int:
    """Return the number of columns that a table needs without wrapping anything."""
    console = Console(width=10_000, markup=False, emoji=False)  # as the commands print it
    return Measurement.get(console, console.options, table).maximum


def score_tables(scores: Sequence[Score], width: int) -> list[Table]:
    """Return one table of zero-shot scores and one of retrieval scores, in percent; empty ones are left out.

    Args:
        width: of the terminal, in columns. Where the figures of a task have no room beside each other and its name,
            they are below each other.
    """
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    tables = []
    if zero_shot:
        headings = ["Zero-shot, %", "Images", "Labels", "Top-1", "95 %\ninterval", "Top-5", "Mean per\nclass"]
        rows = []
        for score in zero_shot:
            counts = (f"{score.images:,}", f"{score.classes:,}")
            top1 = (percent(score.top1), interval(score.top1_interval))
            rows.append([score.task, *counts, *top1, percent(score.top5), percent(score.mean_per_class)])
        table = _task_table(headings, rows, width)
        table.caption = _templates_note(zero_shot)
        table.caption_justify = "left"
        tables.append(table)
    if retrieval:
        headings = ["Retrieval, R@1 / 5 / 10, %", "Images", "Captions", "Image → text", "Text → image"]
        rows = []
        for recalls in retrieval:
            counts = (f"{recalls.images:,}", f"{recalls.captions:,}")
            rows.append([recalls.task, *counts, _recall(recalls.image_to_text), _recall(recalls.text_to_image)])
        tables.append(_task_table(headings, rows, width))
    return tables


def _task_table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    table = plain_table(*headings)
    for row in rows:
        table.add_row(*row)
    longest = max(cell_len(name) for name in (headings[0], *(row[0] for row in rows)))
    if _width(table) - max(longest - _NAME_WIDTH, 0) <= width:
        return table
    table = plain_table(headings[0], "")
    for name, *figures in rows:
        table.add_section()
        table.add_row(Text(name, style="bold"))
        for heading, figure in zip(headings[1:], figures, strict=True):
            table.add_row(heading.replace("\n", " "), figure)
    return table


def _templates_note(scores: Sequence[ZeroShotScore]) -> str:
    """Return which prompt templates were used, which accuracy depends on."""
    if len({score.templates for score in scores}) == 1:
        return f"Prompt templates: {scores[0].templates}"
    return "\n".join(f"Prompt templates of {score.task}: {score.templates}" for score in scores)


def class_table(score: ZeroShotScore) -> Table:
    """Return a table of the classes of one task, lowest recall first; classes without images come last."""
    has_folders = any(row.folder for row in score.per_class)
    folder = ["Folder"] if has_folders else []
    table = plain_table(score.task, *folder, "Images", "Recall, %", "Precision, %", left=folder)
    table.add_column("Most often mistaken for", overflow="fold")
    for row in sorted(score.per_class, key=lambda row: 2.0 if row.recall is None else row.recall):
        mistakes = ((label, count) for label, count in row.predicted.items() if label != row.label)
        label, count = next(mistakes, ("", 0))
        mistake = f"{label} ({count:,})" if count else ""
        names = [row.label, row.folder] if has_folders else [row.label]
        table.add_row(*names, f"{row.images:,}", percent(row.recall), percent(row.precision), mistake)
    return table


def plain_table(first: str, *others: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table: the first column and those named in `left` are left-aligned, the others right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _cell(cell: Cell) -> Text:
    # Padded, so that figures line up with and without a relative figure.
    return Text.assemble(f"{cell.text:>6}", (f" {cell.relative:>5}", "dim"))


def _recall(recall: Recall) -> str:
    return " / ".join(percent(value) for value in (recall.at1, recall.at5, recall.at10))
