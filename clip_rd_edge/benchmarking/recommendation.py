"""Which model to take for a stated budget, in a sentence."""

from __future__ import annotations

from clip_rd_edge.benchmarking import formats
from clip_rd_edge.benchmarking.answers import TOP1
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.benchmarking.scores import Hits, ZeroShotScore, difference_interval


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
