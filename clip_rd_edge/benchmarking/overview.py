"""The table of a report as data: models from left to right, what was measured from top to bottom.

Models stand in columns, so that the way from teacher to quantised student reads from left to right, and the table fits
a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clip_rd_edge.benchmarking import formats
from clip_rd_edge.benchmarking.results import Comparison, Results
from clip_rd_edge.benchmarking.scores import Recall, RetrievalScore, Score, ZeroShotScore

T = TypeVar("T")
COMPARED = "Each second figure: how many times less than the teacher's, or what part of its accuracy."


@dataclass(frozen=True)
class Cell:
    """A number, and how it compares with the teacher's; the latter is empty where there is none."""

    text: str
    compared: str = ""


@dataclass(frozen=True)
class Line:
    """One measurement of every model."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Section:
    """Measurements that belong together, such as those of one task."""

    title: str
    note: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Difference:
    """Top-1 of one model against another's; `verdict` is a remark, or empty where the difference is clear."""

    task: str
    models: str
    points: str
    interval: str
    verdict: str


def sections(results: Results) -> list[Section]:
    """Cost first, then each task in the suite's order."""
    latencies = [row.latency for row in results.rows]
    cost = (
        _cheaper("Size, MB", results, [row.description.size_bytes for row in results.rows], formats.megabytes),
        _cheaper("Image tower, ms", results, [found.image.p50 for found in latencies], formats.milliseconds),
        _cheaper("Text tower, ms", results, [found.text.p50 for found in latencies], formats.milliseconds),
        _cheaper("End to end, ms", results, [found.end_to_end.p50 for found in latencies], formats.milliseconds),
    )
    return [Section("Cost", "one picture or text at a time, median", cost), *_tasks(results, _accuracy)]


def details(results: Results) -> list[Section]:
    """What `sections` leaves out: tails of latencies, intervals, means per class and deeper recalls."""
    latencies = [row.latency for row in results.rows]
    cost = (
        _plain("Weights, millions", [formats.millions(row.description.parameters) for row in results.rows]),
        _plain("Image tower, ms, p95", [formats.milliseconds(found.image.p95) for found in latencies]),
        _plain("Text tower, ms, p95", [formats.milliseconds(found.text.p95) for found in latencies]),
        _plain("End to end, ms, p95", [formats.milliseconds(found.end_to_end.p95) for found in latencies]),
    )
    return [Section("Cost", "", cost), *_tasks(results, _accuracy_in_detail)]


def differences(results: Results) -> list[Difference]:
    """Every comparison of the results."""
    return [
        Difference(
            task=heading(found.task),
            models=f"{found.label} against {found.reference}",
            points=formats.signed_points(found.difference),
            interval=formats.signed_interval(found.interval),
            verdict=_verdict(found),
        )
        for found in results.comparisons
    ]


def _verdict(found: Comparison) -> str:
    if found.interval.low == found.interval.high == 0:
        return "right on the same pictures"
    return "may be chance" if found.interval.low <= 0 <= found.interval.high else ""


def heading(task: str) -> str:
    """A task's name as a heading."""
    return task[:1].upper() + task[1:]


def _tasks(results: Results, make: Callable[[Results, Sequence[Score]], Section]) -> list[Section]:
    return [make(results, scores) for scores in zip(*(row.scores for row in results.rows), strict=True)]


def _accuracy(results: Results, scores: Sequence[Score]) -> Section:
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    first = scores[0]
    if isinstance(first, ZeroShotScore):
        note = f"{first.pictures:,} pictures, {first.classes:,} labels; a guess is right in {100 / first.classes:.1f} %"
        lines = (
            _better("Top-1, %", results, [score.top1 for score in zero_shot]),
            _better("Top-5, %", results, [score.top5 for score in zero_shot]),
        )
    else:
        note = f"{first.pictures:,} pictures, {first.captions:,} captions"
        lines = (
            _better("Picture → text, R@1, %", results, [score.image_to_text.at1 for score in retrieval]),
            _better("Text → picture, R@1, %", results, [score.text_to_image.at1 for score in retrieval]),
        )
    return Section(heading(first.task), note, lines)


def _accuracy_in_detail(results: Results, scores: Sequence[Score]) -> Section:
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    if zero_shot:
        lines = (
            _plain("Top-1, 95 % interval", [formats.interval(score.top1_interval) for score in zero_shot]),
            _plain("Mean per class, %", [formats.percent(score.mean_per_class) for score in zero_shot]),
        )
    else:
        lines = (
            _plain("Picture → text, R@5 / R@10, %", [_deeper(score.image_to_text) for score in retrieval]),
            _plain("Text → picture, R@5 / R@10, %", [_deeper(score.text_to_image) for score in retrieval]),
        )
    return Section(heading(scores[0].task), "", lines)


def _deeper(recall: Recall) -> str:
    return f"{formats.percent(recall.at5)} / {formats.percent(recall.at10)}"


def _cheaper(name: str, results: Results, values: Sequence[float], write: Callable[[float], str]) -> Line:
    """Less is better: how many times less than the teacher's."""
    teacher = _of_teacher(results, values)
    ratios = [formats.times(teacher / value) if teacher and value else "" for value in values]
    return _line(name, results, [write(value) for value in values], ratios)


def _better(name: str, results: Results, values: Sequence[float | None]) -> Line:
    """More is better: how much of the teacher's."""
    teacher = _of_teacher(results, values)
    parts = [formats.share(value, teacher) if teacher and value is not None else "" for value in values]
    return _line(name, results, [formats.percent(value) for value in values], parts)


def _plain(name: str, texts: Sequence[str]) -> Line:
    return Line(name, tuple(map(Cell, texts)))


def _line(name: str, results: Results, texts: Sequence[str], compared: Sequence[str]) -> Line:
    cells = (
        Cell(text, "" if row.role == "teacher" else ratio)
        for row, text, ratio in zip(results.rows, texts, compared, strict=True)
    )
    return Line(name, tuple(cells))


def _of_teacher(results: Results, values: Sequence[T]) -> T | None:
    return next((value for row, value in zip(results.rows, values, strict=True) if row.role == "teacher"), None)
