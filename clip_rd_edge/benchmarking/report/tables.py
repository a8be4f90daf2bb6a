"""The table of a report as data: models from left to right, what was measured from top to bottom.

Models stand in columns, so that the way from teacher to quantised student reads from left to right, and the table fits
a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.latency import Percentiles
from clip_rd_edge.benchmarking.metrics import Interval, Recall, RetrievalScore, Score, ZeroShotScore
from clip_rd_edge.benchmarking.results import Comparison, Results

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
    cost = [
        _cheaper("Size, MB", results, [row.description.size_bytes for row in results.rows], formats.megabytes),
        _cheaper("Image tower, ms", results, [found.image.p50 for found in latencies], formats.milliseconds),
        _cheaper("Text tower, ms", results, [found.text.p50 for found in latencies], formats.milliseconds),
        _cheaper("End to end, ms", results, [found.end_to_end.p50 for found in latencies], formats.milliseconds),
        *_memory(results),
    ]
    return [Section("Cost", "one picture or text at a time, median", tuple(cost)), *_tasks(results, _accuracy)]


def details(results: Results) -> list[Section]:
    """What `sections` leaves out: tails and steps of latencies, load, intervals, means per class and deeper recalls."""
    weights = _plain("Weights, millions", [formats.millions(row.description.parameters) for row in results.rows])
    cost = [
        weights,
        *_tails("Image tower", [row.latency.image for row in results.rows]),
        *_tails("Text tower", [row.latency.text for row in results.rows]),
        *_tails("End to end", [row.latency.end_to_end for row in results.rows]),
        *_steps(results),
        *_load(results),
    ]
    return [Section("Cost", "", tuple(cost)), *_tasks(results, _accuracy_in_detail)]


def _memory(results: Results) -> Iterator[Line]:
    peaks = [row.cold_start.peak_memory_bytes if row.cold_start else None for row in results.rows]
    if all(peaks):
        known = [peak for peak in peaks if peak]
        yield _cheaper("Peak memory, MB", results, known, formats.megabytes)


def _tails(name: str, found: Sequence[Percentiles]) -> Iterator[Line]:
    """p50 to p99 with their intervals, as far as they were measured."""
    if all(each.p50_interval for each in found):
        yield _plain(f"{name}, ms, p50, 95 % interval", [_bounds(each.p50_interval) for each in found])
    yield _plain(f"{name}, ms, p95", [formats.milliseconds(each.p95) for each in found])
    if all(each.p95_interval for each in found):
        yield _plain("… its 95 % interval", [_bounds(each.p95_interval) for each in found])
    if all(each.p99 is not None for each in found):
        yield _plain(f"{name}, ms, p99", [formats.milliseconds(each.p99 or 0) for each in found])
        yield _plain("… its 95 % interval", [_bounds(each.p99_interval) for each in found])


def _bounds(interval: Interval | None) -> str:
    return (
        f"{formats.milliseconds(interval.low)} to {formats.milliseconds(interval.high)}"
        if interval
        else formats.NOTHING
    )


def _steps(results: Results) -> Iterator[Line]:
    steps = [row.latency.steps for row in results.rows if row.latency.steps]
    if len(steps) == len(results.rows):
        yield _plain("Decoding, ms", [formats.milliseconds(each.decode) for each in steps])
        yield _plain("Preprocessing, ms", [formats.milliseconds(each.preprocess) for each in steps])
        name = f"Classifying among {steps[0].labels:,} labels, ms"
        yield _plain(name, [formats.milliseconds(each.classify) for each in steps])


def _load(results: Results) -> Iterator[Line]:
    rows = results.rows
    if all(row.throughput for row in rows):
        yield _plain("Pictures a second, batch 1", [formats.rate(1000 / row.latency.image.p50) for row in rows])
        for i, batch in enumerate(each.batch for each in rows[0].throughput):
            rates = [formats.rate(row.throughput[i].images_per_second) for row in rows]
            yield _plain(f"Pictures a second, batch {batch}", rates)
    if any(row.cold_start for row in rows):
        firsts = [formats.seconds(row.cold_start.first_answer_s if row.cold_start else None) for row in rows]
        yield _plain("Cold start to first answer, s", firsts)
    if all(row.energy_joules is not None for row in rows):
        yield _plain("Energy a picture, mJ", [formats.milliseconds(1000 * (row.energy_joules or 0)) for row in rows])


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
        note = f"{first.images:,} images, {first.classes:,} labels; a guess is right in {100 / first.classes:.1f} %"
        lines = (
            _better("Top-1, %", results, [score.top1 for score in zero_shot]),
            _better("Top-5, %", results, [score.top5 for score in zero_shot]),
        )
    else:
        note = f"{first.images:,} images, {first.captions:,} captions"
        lines = (
            _better("Image → text, R@1, %", results, [score.image_to_text.at1 for score in retrieval]),
            _better("Text → image, R@1, %", results, [score.text_to_image.at1 for score in retrieval]),
        )
    return Section(heading(first.task), note, lines)


def _accuracy_in_detail(results: Results, scores: Sequence[Score]) -> Section:
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    lines: tuple[Line, ...]
    if zero_shot:
        lines = (
            _plain("Top-1, 95 % interval", [formats.interval(score.top1_interval) for score in zero_shot]),
            _plain("Mean per class, %", [formats.percent(score.mean_per_class) for score in zero_shot]),
            _plain("Calibration error, points", [formats.percent(score.calibration_error) for score in zero_shot]),
        )
    else:
        lines = (
            _plain("Image → text, R@5 / R@10, %", [_deeper(score.image_to_text) for score in retrieval]),
            _plain("Text → image, R@5 / R@10, %", [_deeper(score.text_to_image) for score in retrieval]),
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
