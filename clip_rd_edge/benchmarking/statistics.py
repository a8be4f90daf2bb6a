"""Noise of latency comparisons, and mean and spread of accuracy over seeds.

A model's latency is expressed relative to the reference workload (`benchmarking.latency`): the logarithm of its p50
over the reference's p50 in the same timing block. A run's relative latency is the median over its blocks. The scatter
of the blocks predicts the scatter of runs: the noise of a comparison is STANDARD_ERRORS times the standard error of the
difference of two such medians, with RELOAD_DEVIATION included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.formatting import NO_VALUE, inert_markdown, markdown_table
from clip_rd_edge.benchmarking.metrics import primary_metric
from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.errors import InputError

# None of the about twenty comparisons in a report should be flagged by chance: 0.05 / 20, one-sided, with a margin for
# correlation between blocks.
STANDARD_ERRORS = 3.5
# Standard deviation that blocks of one run cannot show: another process has the model in another place in memory.
RELOAD_DEVIATION = 0.01
MIN_BLOCKS = 2  # a single one has no scatter, so that every difference would exceed the noise
_MEDIAN_TO_MEAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean

LogRatios = npt.NDArray[np.float64]


def log_ratios(blocks: Sequence[float], reference: Sequence[float]) -> LogRatios:
    """Return the logarithm of a model's latency over the reference's, per block, (B,)."""
    ratios: LogRatios = np.log(np.asarray(blocks)) - np.log(np.asarray(reference))
    return ratios


def relative_change(old: LogRatios, new: LogRatios) -> float:
    """Return the increase in latency from the old run to the new, as a fraction, corrected for the machine's speed."""
    return float(np.expm1(np.median(new) - np.median(old)))


def change_noise(old: LogRatios, new: LogRatios, *, pooled: float = 0.0) -> float:
    """Return how large `relative_change` can be by chance, as a fraction.

    Args:
        old, new: log ratios of at least MIN_BLOCKS blocks each.
        pooled: standard deviation over all models (`pooled_deviation`), used as a lower bound: the blocks of a single
            model may be close together by chance.
    """
    variances = [max(pooled**2, float(np.var(ratios, ddof=1))) / len(ratios) for ratios in (old, new)]
    deviation = math.sqrt(2 * RELOAD_DEVIATION**2 + _MEDIAN_TO_MEAN_ERROR**2 * sum(variances))
    return math.expm1(STANDARD_ERRORS * deviation)


def pooled_deviation(models: Sequence[LogRatios]) -> float:
    """Return the standard deviation within models, pooled over all of them."""
    squares = sum(float(((ratios - ratios.mean()) ** 2).sum()) for ratios in models)
    degrees_of_freedom = sum(len(ratios) - 1 for ratios in models)
    return math.sqrt(squares / degrees_of_freedom) if degrees_of_freedom else 0.0


def run_noise(models: Sequence[LogRatios]) -> float:
    """Return how much any row can differ between two runs like this one by chance, as a fraction.

    Args:
        models: the log ratios of all rows for one measurement, of at least MIN_BLOCKS blocks each.
    """
    pooled = pooled_deviation(models)
    return max(change_noise(ratios, ratios, pooled=pooled) for ratios in models)


def seeds_table(runs: Sequence[Results]) -> str:
    """Build a Markdown table of accuracy over several runs: one row per model, one column per task.

    Cells are `mean ± standard deviation (min to max)` in percent, and `–` for a task that a run lacks for this model.
    Only models that every run measured are shown. The last rows are ratios, paired by run; `–` where one is to 0.
    A task of which two runs have other images, labels or captions is left out; a sentence below the table says so.

    Raises:
        InputError: fewer than two runs, two that are the same, or runs with no model or task in common.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} result was given; at least 2 are required.")
    for number, run in enumerate(runs):
        if run in runs[:number]:
            first, second = runs.index(run) + 1, number + 1
            raise InputError(
                f"The results {first} and {second} of {len(runs)} are the same; expected those of different seeds.",
                hint="name each result once",
            )
    scores = [
        {row.label: {score.task: primary_metric(score) for score in row.scores} for row in run.rows} for run in runs
    ]
    labels = [label for label in scores[0] if all(label in run for run in scores)]
    tasks = [*dict.fromkeys(task for label in labels for task in scores[0][label] if _has_all(scores, label, task))]
    if not tasks:
        raise InputError("The results have no model and task in common.")
    differing = _differing_tasks(runs)
    left_out = [task for task in tasks if task in differing]
    tasks = [task for task in tasks if task not in differing]
    if not tasks:
        raise InputError(
            f"The results have other images, labels or captions of each task in common: {'; '.join(left_out)}.",
            hint="measure all of them on the same data",
        )
    lines = [["model", *tasks]]
    for label in labels:
        lines.append([label, *(_mean_cell(scores, label, task) for task in tasks)])
    for student, reference in _student_references(runs[0], labels):
        lines.append([f"{student} / {reference}", *(_ratio_cell(scores, student, reference, task) for task in tasks)])
    remarks = [
        f"Accuracy on {inert_markdown(task)} is left out: the results have other images, labels or captions of it."
        for task in left_out
    ]
    return "\n\n".join([markdown_table(lines), *remarks])


def _differing_tasks(runs: Sequence[Results]) -> set[str]:
    """Return the tasks that are known to have other examples in one of the runs than in another."""
    answers = [entry for run in runs for row in run.rows for entry in row.correctness]
    examples = {(entry.task, "questions", entry.questions) for entry in answers}
    examples |= {(entry.task, "images", entry.images) for entry in answers if entry.images}
    counts = Counter((task, kind) for task, kind, _ in examples)
    return {task for (task, _), count in counts.items() if count > 1}


_Scores = Sequence[dict[str, dict[str, float]]]  # of each run, by the row's label and the task


def _has_all(scores: _Scores, label: str, task: str) -> bool:
    return all(task in run[label] for run in scores)


def _mean_cell(scores: _Scores, label: str, task: str) -> str:
    return _spread([100 * run[label][task] for run in scores], "") if _has_all(scores, label, task) else NO_VALUE


def _ratio_cell(scores: _Scores, label: str, reference: str, task: str) -> str:
    if not (_has_all(scores, label, task) and _has_all(scores, reference, task)):
        return NO_VALUE
    if any(run[reference][task] == 0 for run in scores):  # of which nothing is a multiple
        return NO_VALUE
    return _spread([run[label][task] / run[reference][task] for run in scores], "×")


def _student_references(run: Results, labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return the student's label with the teacher's and with the baseline's."""
    by_role = {row.role: row.label for row in run.rows if row.label in labels}
    student = by_role.get("student")
    if student is None:
        return []
    return [(student, by_role[role]) for role in ("teacher", "baseline") if role in by_role]


def _spread(values: Sequence[float], unit: str) -> str:
    digits = 2 if unit else 1
    low, high = min(values), max(values)
    deviation = float(np.std(values, ddof=1))
    return f"{np.mean(values):.{digits}f}{unit} ± {deviation:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
