"""The report as Markdown, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.formatting import interval, markdown_table, percent
from clip_rd_edge.benchmarking.metrics import Recall, RetrievalScore, Score, ZeroShotScore
from clip_rd_edge.benchmarking.report.findings import headline
from clip_rd_edge.benchmarking.report.html import page
from clip_rd_edge.benchmarking.report.method import facts, remarks, samples_note, worst_note
from clip_rd_edge.benchmarking.report.plot import draw
from clip_rd_edge.benchmarking.report.tables import COMPARED, Cell, Section, details, differences, sections
from clip_rd_edge.benchmarking.results import RESULTS, Answer, Results, write_results
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import write_bytes, write_text


def write_between_marks(document: Path, name: str, table: str) -> None:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a Markdown file.

    Raises:
        InputError: the file has no such marks.
    """
    begin_mark, end_mark = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not (begin and end):
        raise InputError(f"{document} has no lines {begin_mark} and {end_mark}, between which the table goes.")
    write_text(document, f"{before}{begin_mark}\n{table}\n{end_mark}{after}")


MARKDOWN, HTML, PLOT = "report.md", "report.html", "accuracy-latency.png"


def write_report(results: Results, folder: Path) -> None:
    """Write results.json and, made from it alone, report.md, report.html and the plot; the folder is made if missing.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; results.json is written all the same.
    """
    write_results(folder / RESULTS, results)
    plot = draw(results, file_format="png")
    if plot is not None:
        write_bytes(folder / PLOT, plot)
    write_text(folder / MARKDOWN, markdown(results, plot=plot is not None))
    write_text(folder / HTML, page(results))


def markdown(results: Results, *, plot: bool) -> str:
    """The report as Markdown; `plot` says whether accuracy-latency.png stands beside it."""
    parts = [f"# {results.suite.name}: accuracy, latency, size", "\n\n".join(headline(results))]
    if plot:
        parts.append(f"![Top-1 over the latency of the image tower]({PLOT})")
    parts += ["## Step by step", *([COMPARED] if results.first("teacher") else []), _models(results, sections(results))]
    if results.skipped:
        parts.append("\n".join(f"- **{row.label}** was not measured: {row.reason}" for row in results.skipped))
    if results.missing:
        parts.append("\n".join(f"- **{task.name}** is missing: {task.reason}" for task in results.missing))
    if results.samples:
        parts += ["## What it says to pictures", samples_note(results), _samples(results)]
    if results.worst:
        parts += ["## What it gets wrong most", worst_note(results), _worst(results)]
    if results.comparisons:
        parts += ["## Differences in top-1", _differences(results)]
    parts += [
        "## How it was measured",
        _markdown_table(["", ""], [[f"**{name}**", value] for name, value in facts(results)]),
    ]
    parts += ["\n".join(f"- {remark}" for remark in remarks(results))]
    parts += ["## Every other number", _models(results, details(results))]
    return "\n\n".join(parts) + "\n"


def _models(results: Results, shown: Sequence[Section]) -> str:
    lines = []
    for section in shown:
        lines.append([f"**{section.title}**", *("" for _ in results.rows)])
        for line in section.lines:
            cells = (f"{cell.text} ({cell.compared})" if cell.compared else cell.text for cell in line.cells)
            lines.append([line.name, *cells])
    return _markdown_table(["", *(row.label for row in results.rows)], lines, numbers=len(results.rows))


def _samples(results: Results) -> str:
    heads = ["Picture of", *(answer.row for answer in results.samples[0].answers)]
    return _markdown_table(heads, [[sample.label, *map(_answer, sample.answers)] for sample in results.samples])


def _worst(results: Results) -> str:
    rows = [[each.label, f"{each.right} of {each.images}", each.taken_for] for each in results.worst]
    return _markdown_table(["Class", "Right", "Taken for"], rows)


def _answer(answer: Answer) -> str:
    return f"{'✓' if answer.right else '✗'} {answer.label}, {formats.share(answer.probability, 1)}"


def _differences(results: Results) -> str:
    heads = ["Models", "Task", "", "Points", "95 % interval"]
    lines = [[found.models, found.task, found.verdict, found.points, found.interval] for found in differences(results)]
    return _markdown_table(heads, lines, numbers=2)


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """A Markdown table whose last `numbers` columns are aligned to the right."""
    return markdown_table([heads, *lines], left=range(len(heads) - numbers))


def terminal_table(results: Results) -> Table:
    """The report's table: models from left to right, each number with how it compares with the teacher's."""
    table = _rich_table("", *(row.label for row in results.rows))
    for section in sections(results):
        table.add_section()
        table.add_row(Text(section.title, style="bold"))
        for line in section.lines:
            table.add_row(line.name, *map(_cell, line.cells))
    if results.first("teacher"):
        table.caption = COMPARED
        table.caption_justify = "left"
    return table


def score_tables(scores: Sequence[Score]) -> list[Table]:
    """One table for the zero-shot scores and one for retrieval, each only where there are some; in per cent."""
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    tables = []
    if zero_shot:
        table = _rich_table(
            "Zero-shot, %", "Pictures", "Labels", "Top-1", "95 % interval", "Top-5", "Mean per class", "Templates"
        )
        for score in zero_shot:
            counts = (f"{score.images:,}", f"{score.classes:,}")
            top1 = (percent(score.top1), interval(score.top1_interval))
            table.add_row(
                score.task, *counts, *top1, percent(score.top5), percent(score.mean_per_class), score.templates
            )
        tables.append(table)
    if retrieval:
        table = _rich_table("Retrieval, R@1 / 5 / 10, %", "Pictures", "Captions", "Image → text", "Text → image")
        for found in retrieval:
            counts = (f"{found.images:,}", f"{found.captions:,}")
            table.add_row(found.task, *counts, _recall(found.image_to_text), _recall(found.text_to_image))
        tables.append(table)
    return tables


def _rich_table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cell(cell: Cell) -> Text:
    # Numbers stand below each other whether they are compared or not.
    return Text.assemble(f"{cell.text:>6}", (f" {cell.compared:>5}", "dim"))


def _recall(recall: Recall) -> str:
    return " / ".join(percent(value) for value in (recall.at1, recall.at5, recall.at10))
