"""The findings of a benchmark in sentences: the headline, and which model to choose for a given budget."""

from __future__ import annotations

from clip_rd_edge.benchmarking.accuracy import TOP1
from clip_rd_edge.benchmarking.metrics import (
    Hits,
    Interval,
    ZeroShotScore,
    difference_interval,
    difference_p_value,
    may_be_chance,
)
from clip_rd_edge.benchmarking.regression import TOO_BUSY
from clip_rd_edge.benchmarking.results import Comparison, Results, RowResult
from clip_rd_edge.benchmarking.tables import (
    interval,
    megabytes,
    percent,
    ratio,
    share,
    sign_test,
    signed_interval,
    signed_points,
    three_digits,
)


def recommendation(results: Results) -> str | None:
    """Return a sentence that recommends a model for the suite's budget, with the model between `**`.

    Among the models within the budget, the most accurate one is the reference. The fastest of those that are not
    significantly less accurate (paired, 95 %) is recommended.

    Returns:
        None if the suite has no budget or no zero-shot task.
    """
    suite = results.suite
    if suite.budget_ms is None and suite.min_accuracy is None:
        return None
    scores = {row.label: score for row in results.rows if (score := headline_score(results, row)) is not None}
    rows = {row.label: row for row in results.rows if row.label in scores}
    if not rows:
        return None
    p95 = {label: row.latency.end_to_end.p95 for label, row in rows.items()}
    top1 = {label: score.top1 for label, score in scores.items()}

    def figures(label: str) -> tuple[str, str]:
        return f"{three_digits(p95[label])} ms", f"{percent(top1[label])} %"

    wanted = []
    if suite.budget_ms is not None:
        wanted.append(f"at most {suite.budget_ms:g} ms from image file to answer (95th percentile)")
    if suite.min_accuracy is not None:
        wanted.append(f"at least {percent(suite.min_accuracy)} % top-1")
    requirements = " and ".join(wanted)
    max_ms, min_top1 = suite.budget_ms or float("inf"), suite.min_accuracy or 0.0
    suitable = [label for label in rows if p95[label] <= max_ms and top1[label] >= min_top1]
    if not suitable:  # the extremes show which requirement is out of reach
        fastest, best = min(rows, key=lambda label: p95[label]), max(rows, key=lambda label: top1[label])
        (fast_ms, fast_top1), (best_ms, best_top1) = figures(fastest), figures(best)
        return (
            f"No model meets {requirements}: the fastest, {fastest}, takes {fast_ms} at {fast_top1}, and the most "
            f"accurate, {best}, takes {best_ms} at {best_top1}."
        )
    best = max(suitable, key=lambda label: top1[label])
    choice = min(
        (label for label in suitable if not _significantly_worse(rows[label], rows[best])), key=lambda label: p95[label]
    )
    if len(suitable) == 1:
        reason = "the only model that meets this"
    elif choice == best:
        reason = f"the most accurate of {len(suitable)} models that meet this"
    else:
        reason = f"the fastest model that is not significantly less accurate than {best}"
    shown = " and ".join(figures(choice))
    return f"For {requirements}, choose **{choice}**: {shown} on {scores[choice].task}, {reason}."


def _significantly_worse(row: RowResult, best: RowResult) -> bool:
    def top1_hits(row: RowResult) -> Hits:
        return next(correctness.hits() for correctness in row.correctness if correctness.measure == TOP1)

    hits, best_hits = top1_hits(row), top1_hits(best)
    bounds = difference_interval(hits, best_hits)
    return bounds.high < 0 and not may_be_chance(bounds, difference_p_value(hits, best_hits))


def headline(results: Results) -> list[str]:
    """Return the headline, one finding per sentence.

    If the machine was too busy for latencies to be trusted, or a model is no better than chance, that comes first. The
    next sentence compares what is shipped with the teacher. A recommendation follows if the suite has a budget,
    then the student before export, INT8 against FP32, and the gain from distillation.
    """
    teacher, student, baseline = (results.first(role) for role in ("teacher", "student", "baseline"))
    exported, quantised, shipped = results.first("exported"), results.first("quantised"), shipped_row(results)
    sentences = []
    if teacher and shipped:
        sentences.append(_shipped_against_teacher(results, shipped, teacher))
    if teacher and student:
        subject = "the student before export" if shipped else "the student"
        sentences.append(_student_against_teacher(results, student, teacher, subject=subject))
    if exported and quantised:
        speed = _speed(results, quantised.latency.image.p50, exported.latency.image.p50)
        sentences.append(
            f"Compared with {exported.label}, {quantised.label} {_accuracy_change(results, quantised, exported)}is "
            f"{_size(quantised, exported)}, and its image tower is {speed}."
        )
    if student and baseline and (comparison := _comparison(results, student, baseline)):
        points = f"{signed_points(comparison.difference)} points"
        sentences.append(
            f"Distillation changes top-1 by {_certain(points, comparison)} compared with the same student trained "
            f"without a teacher (95 % confidence interval {signed_interval(comparison.interval)}"
            f"{_chance(comparison)})."
        )
    sentences = sentences or [_summary(row, results) for row in results.rows]
    advice = recommendation(results)
    warnings = [*busy_remark(results), *_no_better_than_chance(results)]
    return [*results.verdict, *warnings, *sentences[:1], *([advice] if advice else []), *sentences[1:]]


def busy_remark(results: Results, *, above: float = TOO_BUSY) -> list[str]:
    """Return a remark on other processes, if their share of the machine was above this fraction, else nothing."""
    if results.other_load is None or results.other_load <= above:
        return []
    return [
        f"The machine was busy: other processes used {share(results.other_load, 1)} of it while the models "
        f"were timed. Latencies are too high, and not all by the same factor."
    ]


def _no_better_than_chance(results: Results) -> list[str]:
    """Return a sentence about the models that the headline is about and whose accuracy is no better than chance."""
    rows = [results.first("teacher"), results.first("student"), shipped_row(results)]
    rows = rows if any(rows) else list(results.rows)
    scores = {row.label: score for row in rows if row and (score := headline_score(results, row)) is not None}
    labels = [label for label, score in scores.items() if not above_chance(score)]
    if not labels:
        return []
    score = scores[labels[0]]
    return [
        f"On {score.task}, the top-1 of {', '.join(labels)} is **no better than chance level** "
        f"({100 / score.classes:.1f} %)."
    ]


def shipped_row(results: Results) -> RowResult | None:
    """Return the row of what is shipped: the last quantised one, or else the last exported one."""
    return results.last("quantised") or results.last("exported")


def headline_score(results: Results, row: RowResult) -> ZeroShotScore | None:
    """Return a row's score on the first zero-shot task, which headline, plot and samples are about."""
    tasks = (score.task for score in results.rows[0].scores if isinstance(score, ZeroShotScore))
    task = next(tasks, None)
    return next((score for score in row.scores if isinstance(score, ZeroShotScore) and score.task == task), None)


def above_chance(score: ZeroShotScore) -> bool:
    """Return whether the confidence interval of top-1 is above the chance level."""
    return score.top1_interval.low > 1 / score.classes


def _shipped_against_teacher(results: Results, shipped: RowResult, teacher: RowResult) -> str:
    shipped_ms, teacher_ms = shipped.latency.end_to_end.p50, teacher.latency.end_to_end.p50
    times = f"{three_digits(shipped_ms)} ms vs {three_digits(teacher_ms)} ms"
    sizes = " vs ".join(f"{megabytes(row.description.size_bytes)} MB" for row in (shipped, teacher))
    accuracy = _accuracy_kept(results, shipped, teacher)
    subject = f"{shipped.label} {accuracy}, is" if accuracy else f"Compared with the teacher, {shipped.label} is"
    return (
        f"{subject} {_speed(results, shipped_ms, teacher_ms)} end to end ({times} from image file to label) "
        f"and {_size(shipped, teacher)} ({sizes})."
    )


def _student_against_teacher(results: Results, student: RowResult, teacher: RowResult, *, subject: str) -> str:
    accuracy, size = _accuracy_kept(results, student, teacher), _size(student, teacher)
    speed = _speed(results, student.latency.image.p50, teacher.latency.image.p50)
    if not accuracy:
        return f"Compared with the teacher, {subject} is {size}, and its image tower is {speed}."
    return f"{subject[0].upper()}{subject[1:]} {accuracy}, is {size}, and its image tower is {speed}."


def _comparison(results: Results, row: RowResult, reference: RowResult) -> Comparison | None:
    score = headline_score(results, row)
    key = (score and score.task, row.label, reference.label)
    return next((c for c in results.comparisons if (c.task, c.label, c.reference) == key), None)


def _chance(comparison: Comparison) -> str:
    """Return what follows an interval: whether this may be chance, and why if the interval excludes zero."""
    if not comparison.may_be_chance:
        return ""
    test = sign_test(comparison)
    return f"{f'; {test}' if test else ''}, so this may be chance"


def _certain(figure: str, comparison: Comparison) -> str:
    return figure if comparison.may_be_chance else f"**{figure}**"


def _accuracy_kept(results: Results, row: RowResult, teacher: RowResult) -> str:
    """Describe how much of the teacher's top-1 remains; empty if the teacher has none above chance level."""
    score, teacher_score = headline_score(results, row), headline_score(results, teacher)
    if score is None or teacher_score is None or not above_chance(teacher_score):
        return ""
    verb = "keeps" if score.top1 <= teacher_score.top1 else "reaches"
    return (
        f"{verb} **{share(score.top1, teacher_score.top1)}** of the teacher's top-1 on {score.task} "
        f"({percent(score.top1)} % vs {percent(teacher_score.top1)} %)"
    )


def _accuracy_change(results: Results, row: RowResult, reference: RowResult) -> str:
    comparison = _comparison(results, row, reference)
    if comparison is None:
        return ""
    if signed_points(comparison.difference) == "0.0":
        return "loses **no** top-1, "
    lost = comparison.difference < 0
    # A loss is stated without its sign, and so is its interval.
    bounds = Interval(-comparison.interval.high, -comparison.interval.low) if lost else comparison.interval
    points = _certain(f"{100 * abs(comparison.difference):.1f} points", comparison)
    return (
        f"{'loses' if lost else 'gains'} {points} of top-1 (95 % confidence interval {interval(bounds)}"
        f"{_chance(comparison)}), "
    )


def _size(row: RowResult, reference: RowResult) -> str:
    times = reference.description.size_bytes / max(row.description.size_bytes, 1)
    if ratio(times) == "1.0×":
        return "**the same size**"
    return f"**{ratio(times)} smaller**" if times > 1 else f"**{ratio(1 / times)} larger**"


def _speed(results: Results, latency_ms: float, reference_ms: float) -> str:
    """Return how fast a model is against another, in bold unless the machine was too busy to tell."""
    times = ratio(max(reference_ms / latency_ms, latency_ms / reference_ms))
    speed = "as fast" if times == "1.0×" else f"{times} {'faster' if latency_ms < reference_ms else 'slower'}"
    return speed if busy_remark(results) else f"**{speed}**"


def _summary(row: RowResult, results: Results) -> str:
    score = headline_score(results, row)
    accuracy = f"reaches **{percent(score.top1)} %** top-1 on {score.task}, " if score else ""
    return (
        f"{row.label} {accuracy}takes **{three_digits(row.latency.image.p50)} ms** per image in its image "
        f"tower and needs **{megabytes(row.description.size_bytes)} MB** on disk."
    )
