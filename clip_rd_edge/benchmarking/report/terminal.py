"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from clip_rd_edge.benchmarking.formatting import interval, percent
from clip_rd_edge.benchmarking.metrics import Recall, RetrievalScore, Score, ZeroShotScore
from clip_rd_edge.benchmarking.report.tables import COMPARED, Cell, sections
from clip_rd_edge.benchmarking.results import Results


def terminal_table(results: Results) -> Table:
    """The report's table: models from left to right, each number with how it compares with the teacher's."""
    table = _table("", *(row.label for row in results.rows))
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
        table = _table(
            "Zero-shot, %", "Pictures", "Labels", "Top-1", "95 % interval", "Top-5", "Mean per class", "Templates"
        )
        for score in zero_shot:
            counts = (f"{score.pictures:,}", f"{score.classes:,}")
            top1 = (percent(score.top1), interval(score.top1_interval))
            table.add_row(
                score.task, *counts, *top1, percent(score.top5), percent(score.mean_per_class), score.templates
            )
        tables.append(table)
    if retrieval:
        table = _table("Retrieval, R@1 / 5 / 10, %", "Pictures", "Captions", "Picture → text", "Text → picture")
        for found in retrieval:
            counts = (f"{found.pictures:,}", f"{found.captions:,}")
            table.add_row(found.task, *counts, _recall(found.image_to_text), _recall(found.text_to_image))
        tables.append(table)
    return tables


def _table(first: str, *others: str) -> Table:
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
