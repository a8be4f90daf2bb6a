"""Scores as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from clip_rd_edge.benchmarking.scores import Recall, RetrievalScore, Score, ZeroShotScore


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal, or a dash where there is none."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def score_tables(scores: Sequence[Score]) -> list[Table]:
    """One table for the zero-shot scores and one for retrieval, each only where there are some; in per cent."""
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    tables = []
    if zero_shot:
        table = _table("Zero-shot, %", "Pictures", "Labels", "Top-1", "95 % interval", "Top-5", "Mean per class")
        for score in zero_shot:
            interval = f"{percent(score.top1_interval.low)} – {percent(score.top1_interval.high)}"
            counts = (f"{score.pictures:,}", f"{score.classes:,}")
            table.add_row(
                score.task, *counts, percent(score.top1), interval, percent(score.top5), percent(score.mean_per_class)
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


def _recall(recall: Recall) -> str:
    return " / ".join(percent(value) for value in (recall.at1, recall.at5, recall.at10))
