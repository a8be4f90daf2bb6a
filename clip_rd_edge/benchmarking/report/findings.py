"""Which model to take for a stated budget, in a sentence."""

from __future__ import annotations

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.accuracy import TOP1
from clip_rd_edge.benchmarking.metrics import Hits, Interval, ZeroShotScore, difference_interval
from clip_rd_edge.benchmarking.results import Comparison, Results, RowResult


def recommendation(results: Results) -> str | None:
    """A sentence, or None where the suite states no budget or has no zero-shot task; `**` marks the model.

    Of the models within the budget it is the most accurate one; of those that are not clearly less accurate (paired,
    95 %), the fastest.
    """
    suite = results.suite
    scored = {row.label: (row, score) for row in results.rows if (score := _score(row)) is not None}
    if not scored or (suite.budget_ms is None and suite.min_accuracy is None):
        return None
    budget, least = suite.budget_ms or float("inf"), suite.min_accuracy or 0.0
    fit = [label for label, (row, score) in scored.items() if _needed(row) <= budget and score.top1 >= least]
    wanted = _wanted(suite.budget_ms, suite.min_accuracy)
    if not fit:
        return f"No model here takes {wanted}: {_nearest(scored, budget, least)}."
    best = max(fit, key=lambda label: scored[label][1].top1)
    rivals = [label for label in fit if not _clearly_less(scored[label][0], scored[best][0])]
    chosen = min(rivals, key=lambda label: _needed(scored[label][0]))
    row, score = scored[chosen]
    if len(fit) == 1:
        why = "the only one that fits"
    elif chosen == best:
        why = f"the most accurate of {len(fit)} that fit"
    else:
        why = f"the fastest of those not clearly less accurate than {best}"
    measured = f"{formats.milliseconds(_needed(row))} ms and {formats.percent(score.top1)} % on {score.task}"
    return f"For {wanted}, take **{chosen}**: {measured}, {why}."


def _wanted(budget_ms: float | None, min_accuracy: float | None) -> str:
    parts = []
    if budget_ms is not None:
        parts.append(f"at most {budget_ms:g} ms from file to answer in 95 of 100 pictures")
    if min_accuracy is not None:
        parts.append(f"at least {formats.percent(min_accuracy)} % top-1")
    return " and ".join(parts)


def _nearest(scored: dict[str, tuple[RowResult, ZeroShotScore]], budget: float, least: float) -> str:
    """The fastest model and the most accurate one: which of the two wishes is out of reach."""
    fastest = min(scored, key=lambda label: _needed(scored[label][0]))
    best = max(scored, key=lambda label: scored[label][1].top1)
    return (
        f"the fastest, {fastest}, takes {formats.milliseconds(_needed(scored[fastest][0]))} ms at "
        f"{formats.percent(scored[fastest][1].top1)} %, and the most accurate, {best}, "
        f"{formats.milliseconds(_needed(scored[best][0]))} ms at {formats.percent(scored[best][1].top1)} %"
    )


def _needed(row: RowResult) -> float:
    return row.latency.end_to_end.p95


def _score(row: RowResult) -> ZeroShotScore | None:
    return next((score for score in row.scores if isinstance(score, ZeroShotScore)), None)


def _clearly_less(row: RowResult, best: RowResult) -> bool:
    ours, theirs = _hits(row), _hits(best)
    if ours is None or theirs is None:
        return row.label != best.label  # nothing to pair by: the most accurate it is
    return difference_interval(ours, theirs).high < 0


def _hits(row: RowResult) -> Hits | None:
    return next((each.hits() for each in row.marks if each.measure == TOP1), None)


def headline(results: Results) -> list[str]:
    """One sentence each: student and teacher, INT8 and FP32, the whole way, what distilling brought."""
    teacher, student = results.first("teacher"), results.first("student")
    exported, quantised, baseline = (results.first(role) for role in ("exported", "quantised", "baseline"))
    sentences = []
    if teacher and student:
        sentences.append(
            f"The student {_keeps(results, student, teacher)}, "
            f"and its image tower is {_speed(student.latency.image.p50, teacher.latency.image.p50)}."
        )
    if exported and quantised:
        sentences.append(
            f"{quantised.label} {_costs(results, quantised, exported)} "
            f"{_size(quantised, exported)} of the size of {exported.label}, "
            f"and its image tower is {_speed(quantised.latency.image.p50, exported.latency.image.p50)}."
        )
    if teacher and quantised:
        ours, theirs = quantised.latency.end_to_end.p50, teacher.latency.end_to_end.p50
        sentences.append(
            f"From a picture's file to its {_answer(quantised)}, {quantised.label} takes {formats.milliseconds(ours)} "
            f"ms, the teacher {formats.milliseconds(theirs)} ms: {_speed(ours, theirs)}."
        )
    if student and baseline and (found := _comparison(results, student, baseline)):
        sentences.append(
            f"Distilling brought **{formats.signed_points(found.difference)} points** of top-1 over the same student "
            f"trained without a teacher (95 % interval {formats.signed_interval(found.interval)})."
        )
    sentences = sentences or [_plain(row, results) for row in results.rows]
    advice = recommendation(results)
    return [*sentences[:1], *([advice] if advice else []), *sentences[1:]]


def headline_task(results: Results) -> str | None:
    """Name of the task that headline, plot and samples are about: the first zero-shot one."""
    scores = results.rows[0].scores
    return next((score.task for score in scores if isinstance(score, ZeroShotScore)), None)


def headline_score(results: Results, row: RowResult) -> ZeroShotScore | None:
    """A row's score on the headline's task."""
    task = headline_task(results)
    return next((score for score in row.scores if isinstance(score, ZeroShotScore) and score.task == task), None)


def better_than_a_guess(score: ZeroShotScore) -> bool:
    """Whether the interval of top-1 lies above what a guess among the labels reaches."""
    return score.top1_interval.low > 1 / score.classes


def _answer(row: RowResult) -> str:
    return "label" if row.latency.steps else "embedding"


def _comparison(results: Results, row: RowResult, reference: RowResult) -> Comparison | None:
    wanted = (headline_task(results), row.label, reference.label)
    return next((c for c in results.comparisons if (c.task, c.label, c.reference) == wanted), None)


def _keeps(results: Results, row: RowResult, teacher: RowResult) -> str:
    ours, theirs = headline_score(results, row), headline_score(results, teacher)
    if ours is None or theirs is None or not better_than_a_guess(theirs):
        return f"has {_size(row, teacher)} of the teacher's size"
    return (
        f"keeps **{formats.share(ours.top1, theirs.top1)}** of the teacher's top-1 on {ours.task} "
        f"({formats.percent(ours.top1)} of {formats.percent(theirs.top1)} %) at {_size(row, teacher)} of its size"
    )


def _costs(results: Results, row: RowResult, reference: RowResult) -> str:
    found = _comparison(results, row, reference)
    if found is None:
        return "has"
    if formats.signed_points(found.difference) == "0.0":
        return "costs **no** top-1, has"
    lost = found.difference < 0
    # A cost is told without its sign, and so is its interval.
    bounds = Interval(-found.interval.high, -found.interval.low) if lost else found.interval
    return (
        f"{'costs' if lost else 'gains'} **{100 * abs(found.difference):.1f} points** of top-1 "
        f"(95 % interval {formats.interval(bounds)}), has"
    )


def _size(row: RowResult, reference: RowResult) -> str:
    ratio = reference.description.size_bytes / max(row.description.size_bytes, 1)
    if formats.times(ratio) == "1.0×":
        return "**100 %**"
    return f"**1/{formats.times(ratio).removesuffix('×')}**" if ratio > 1 else f"**{formats.times(1 / ratio)}**"


def _speed(ours: float, theirs: float) -> str:
    faster = formats.times(max(theirs / ours, ours / theirs))
    if faster == "1.0×":
        return "**as fast**"
    return f"**{faster} {'faster' if ours < theirs else 'slower'}**"


def _plain(row: RowResult, results: Results) -> str:
    score = headline_score(results, row)
    accuracy = f"reaches **{formats.percent(score.top1)} %** top-1 on {score.task} and " if score else ""
    return (
        f"{row.label} {accuracy}takes **{formats.milliseconds(row.latency.image.p50)} ms** a picture "
        f"in its image tower at **{formats.megabytes(row.description.size_bytes)} MB**."
    )
