"""The table of a report as data: one column per model, one line per measurement.

Models are columns, so that the path from teacher to quantised student reads from left to right and the table fits on a
phone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from clip_rd_edge.benchmarking import formatting
from clip_rd_edge.benchmarking.latency import Percentiles
from clip_rd_edge.benchmarking.metrics import Interval, Recall, RetrievalScore, Score, ZeroShotScore
from clip_rd_edge.benchmarking.results import Comparison, Results

T = TypeVar("T")
RELATIVE_NOTE = (
    "Second figures are relative to the teacher: how many times smaller or faster, or the share of its accuracy."
)


@dataclass(frozen=True)
class Cell:
    """A figure, and the same figure relative to the teacher's; the latter is empty if there is none."""

    text: str
    relative: str = ""


@dataclass(frozen=True)
class Line:
    """One measurement of every model."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Section:
    """Related measurements, such as those of one task."""

    title: str
    note: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Difference:
    """Top-1 of one model minus another's; `verdict` is empty if the difference is significant."""

    task: str
    models: str
    points: str
    interval: str
    verdict: str


def sections(results: Results) -> list[Section]:
    """Return the main table: cost first, then each task in the suite's order."""
    latencies = [row.latency for row in results.rows]
    sizes = [row.description.size_bytes for row in results.rows]
    megabytes, milliseconds = formatting.megabytes, formatting.three_digits
    cost = [
        _lower_is_better("Size, MB", results, sizes, megabytes),
        _lower_is_better("Image tower, ms", results, [latency.image.p50 for latency in latencies], milliseconds),
        _lower_is_better("Text tower, ms", results, _p50s([latency.text for latency in latencies]), milliseconds),
        _lower_is_better("End to end, ms", results, [latency.end_to_end.p50 for latency in latencies], milliseconds),
        *_memory(results),
    ]
    return [Section("Cost", "batch 1, median", tuple(cost)), *_tasks(results, _accuracy)]


def details(results: Results) -> list[Section]:
    """Return what `sections` leaves out.

    These are latency percentiles and steps, throughput, cold start, energy, confidence intervals, means per class and
    R@5 and R@10.
    """
    parameters = _plain(
        "Parameters, millions", [formatting.millions(row.description.parameters) for row in results.rows]
    )
    cost = [
        parameters,
        *_latency_percentiles("Image tower", [row.latency.image for row in results.rows]),
        *_latency_percentiles("Text tower", [row.latency.text for row in results.rows]),
        *_latency_percentiles("End to end", [row.latency.end_to_end for row in results.rows]),
        *_steps(results),
        *_throughput(results),
    ]
    return [Section("Cost", "", tuple(cost)), *_tasks(results, _accuracy_details)]


def _p50s(rows: Sequence[Percentiles | None]) -> list[float | None]:
    return [row.p50 if row else None for row in rows]


def _memory(results: Results) -> Iterator[Line]:
    peaks = [row.cold_start.peak_memory_bytes if row.cold_start else None for row in results.rows]
    if all(peaks):
        known = [peak for peak in peaks if peak]
        yield _lower_is_better("Peak memory, MB", results, known, formatting.megabytes)


def _latency_percentiles(name: str, rows: Sequence[Percentiles | None]) -> Iterator[Line]:
    """Yield p50 to p99 with their intervals, as far as they were measured; None is a model without this tower."""

    def values(field: str) -> list[Any]:
        return [None if row is None else getattr(row, field) for row in rows]

    def complete(field: str) -> bool:
        return all(getattr(row, field) is not None for row in rows if row)

    if complete("p50_interval"):
        yield _plain(f"{name}, ms, p50, 95 % interval", list(map(_bounds, values("p50_interval"))))
    yield _plain(f"{name}, ms, p95", list(map(formatting.three_digits, values("p95"))))
    if complete("p95_interval"):
        yield _plain(f"{name}, ms, p95, 95 % interval", list(map(_bounds, values("p95_interval"))))
    if complete("p99"):
        yield _plain(f"{name}, ms, p99", list(map(formatting.three_digits, values("p99"))))
        yield _plain(f"{name}, ms, p99, 95 % interval", list(map(_bounds, values("p99_interval"))))


def _bounds(interval: Interval | None) -> str:
    if interval is None:
        return formatting.NO_VALUE
    return f"{formatting.three_digits(interval.low)} to {formatting.three_digits(interval.high)}"


def _steps(results: Results) -> Iterator[Line]:
    steps = [row.latency.steps for row in results.rows if row.latency.steps]
    if len(steps) == len(results.rows):
        yield _plain("Decoding, ms", [formatting.three_digits(row.decode) for row in steps])
        yield _plain("Preprocessing, ms", [formatting.three_digits(row.preprocess) for row in steps])
        name = f"Classifying among {steps[0].labels:,} labels, ms"
        yield _plain(name, [formatting.three_digits(row.classify) for row in steps])


def _throughput(results: Results) -> Iterator[Line]:
    rows = results.rows
    if all(row.throughput for row in rows):
        rates = [formatting.three_digits(1000 / row.latency.image.p50) for row in rows]
        yield _plain("Images per second, batch 1", rates)
        for i, throughput in enumerate(rows[0].throughput):
            rates = [formatting.three_digits(row.throughput[i].images_per_second) for row in rows]
            yield _plain(f"Images per second, batch {throughput.batch}", rates)
    if any(row.cold_start for row in rows):
        seconds = [formatting.seconds(row.cold_start.first_answer_s if row.cold_start else None) for row in rows]
        yield _plain("Cold start to first answer, s", seconds)
    if any(row.energy_joules is not None for row in rows):
        joules = [row.energy_joules for row in rows]
        millijoules = [formatting.three_digits(None if value is None else 1000 * value) for value in joules]
        yield _plain("Energy per image, mJ", millijoules)


def differences(results: Results) -> list[Difference]:
    """Return all comparisons of the results."""
    return [
        Difference(
            task=heading(comparison.task),
            models=f"{comparison.label} vs {comparison.reference}",
            points=formatting.signed_points(comparison.difference),
            interval=formatting.signed_interval(comparison.interval),
            verdict=_verdict(comparison),
        )
        for comparison in results.comparisons
    ]


def _verdict(comparison: Comparison) -> str:
    interval = comparison.interval
    if interval.low == interval.high == 0:
        return "correct on the same images"
    if not comparison.may_be_chance:
        return ""
    test = sign_test(comparison)
    return f"not significant ({test})" if test else "not significant"


def sign_test(comparison: Comparison) -> str:
    """Return the test that calls a difference chance although its interval leaves out zero; empty if it includes it."""
    p_value, interval = comparison.p_value, comparison.interval
    return "" if p_value is None or interval.low <= 0 <= interval.high else f"exact sign test: p = {p_value:.2f}"


def heading(task: str) -> str:
    """Return a task's name as a heading."""
    return task[:1].upper() + task[1:]


def _tasks(results: Results, make: Callable[[Results, Sequence[Score]], Section]) -> list[Section]:
    return [make(results, scores) for scores in zip(*(row.scores for row in results.rows), strict=True)]


def _accuracy(results: Results, scores: Sequence[Score]) -> Section:
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    first = scores[0]
    if isinstance(first, ZeroShotScore):
        note = f"{first.images:,} images, {first.classes:,} labels; chance level {100 / first.classes:.1f} %"
        lines = (
            _higher_is_better("Top-1, %", results, [score.top1 for score in zero_shot]),
            _higher_is_better("Top-5, %", results, [score.top5 for score in zero_shot]),
        )
    else:
        note = f"{first.images:,} images, {first.captions:,} captions"
        lines = (
            _higher_is_better("Image → text, R@1, %", results, [score.image_to_text.at1 for score in retrieval]),
            _higher_is_better("Text → image, R@1, %", results, [score.text_to_image.at1 for score in retrieval]),
        )
    return Section(heading(first.task), note, lines)


def _accuracy_details(results: Results, scores: Sequence[Score]) -> Section:
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    retrieval = [score for score in scores if isinstance(score, RetrievalScore)]
    lines: tuple[Line, ...]
    if zero_shot:
        lines = (
            _plain("Top-1, 95 % interval", [formatting.interval(score.top1_interval) for score in zero_shot]),
            _plain("Mean per class, %", [formatting.percent(score.mean_per_class) for score in zero_shot]),
            _plain("Calibration error, points", [formatting.percent(score.calibration_error) for score in zero_shot]),
        )
    else:
        lines = (
            _plain("Image → text, R@5 / R@10, %", [_recall_at_5_and_10(score.image_to_text) for score in retrieval]),
            _plain("Text → image, R@5 / R@10, %", [_recall_at_5_and_10(score.text_to_image) for score in retrieval]),
        )
    return Section(heading(scores[0].task), "", lines)


def _recall_at_5_and_10(recall: Recall) -> str:
    return f"{formatting.percent(recall.at5)} / {formatting.percent(recall.at10)}"


def _lower_is_better(
    name: str, results: Results, values: Sequence[float | None], show: Callable[[float | None], str]
) -> Line:
    """Return a line with the teacher's value over each value; None is a model that has none."""
    teacher = _teacher_value(results, values)
    ratios = [formatting.ratio(teacher / value) if teacher and value else "" for value in values]
    return _line(name, results, [show(value) for value in values], ratios)


def _higher_is_better(name: str, results: Results, values: Sequence[float | None]) -> Line:
    """Return a line with each value as a percentage of the teacher's."""
    teacher = _teacher_value(results, values)
    shares = [formatting.share(value, teacher) if teacher and value is not None else "" for value in values]
    return _line(name, results, [formatting.percent(value) for value in values], shares)


def _plain(name: str, texts: Sequence[str]) -> Line:
    return Line(name, tuple(map(Cell, texts)))


def _line(name: str, results: Results, texts: Sequence[str], relative: Sequence[str]) -> Line:
    cells = (
        Cell(text, "" if row.role == "teacher" else ratio)
        for row, text, ratio in zip(results.rows, texts, relative, strict=True)
    )
    return Line(name, tuple(cells))


def _teacher_value(results: Results, values: Sequence[T]) -> T | None:
    return next((value for row, value in zip(results.rows, values, strict=True) if row.role == "teacher"), None)
