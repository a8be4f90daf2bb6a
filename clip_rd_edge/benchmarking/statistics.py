"""How much two honest runs differ by chance: what a change has to be greater than.

A model's pace is its p50 divided by that of the reference (`benchmarking.reference`) in the same sitting, as a
logarithm; a run's pace is the median over its sittings. How far sittings scatter tells how far runs may: the noise of a
comparison is WIDTH times the standard error of the difference of two such medians, OPENING counted in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.benchmarking.metrics import primary_metric
from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.errors import InputError

# Of some twenty comparisons in a report none shall be flagged by chance: 0.05 / 20, one-sided, with room for sittings
# that have something in common.
WIDTH = 3.5
# What no sitting of one run shows: another process has the model laid out otherwise in memory. A standard deviation.
OPENING = 0.01
_OF_MEDIAN = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean

Paces = npt.NDArray[np.float64]


def paces(sittings: Sequence[float], reference: Sequence[float]) -> Paces:
    """Logarithm of what a model takes over what the reference takes, a sitting each, (S,)."""
    logarithms: Paces = np.log(np.asarray(sittings)) - np.log(np.asarray(reference))
    return logarithms


def change(old: Paces, new: Paces) -> float:
    """How much longer the new run takes than the old, as a fraction, at the same pace of the machine."""
    return float(np.expm1(np.median(new) - np.median(old)))


def noise(old: Paces, new: Paces, *, pooled: float = 0.0) -> float:
    """What `change` may be by chance, as a fraction.

    Args:
        pooled: standard deviation of all models' paces (`pooled_deviation`): the sittings of one alone may lie together
            by luck.
    """
    variances = [
        max(pooled**2, float(np.var(each, ddof=1)) if len(each) > 1 else 0.0) / len(each) for each in (old, new)
    ]
    return math.expm1(WIDTH * math.sqrt(2 * OPENING**2 + _OF_MEDIAN**2 * sum(variances)))


def pooled_deviation(every: Sequence[Paces]) -> float:
    """Standard deviation within models, over all of them."""
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in every)
    freedom = sum(len(each) - 1 for each in every)
    return math.sqrt(squares / freedom) if freedom else 0.0


def of_one_run(every: Sequence[Paces]) -> float:
    """What two such runs may differ by in any row, as a fraction; `every` are the paces of all rows, of one kind."""
    pooled = pooled_deviation(every)
    return max(noise(each, each, pooled=pooled) for each in every)


def seeds_table(runs: Sequence[Results]) -> str:
    """A Markdown table: a row a model, a column a task, `mean ± standard deviation (least to greatest)` in percent.

    Only models that every run measured are shown. The last lines are ratios that are paired by run.

    Raises:
        InputError: fewer than two runs, or runs that have no model or no task in common.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} result was given; a spread needs at least 2.")
    scores = [
        {row.label: {score.task: primary_metric(score) for score in row.scores} for row in run.rows} for run in runs
    ]
    labels = [label for label in scores[0] if all(label in run for run in scores)]
    tasks = [task for task in scores[0][labels[0]] if all(task in run[labels[0]] for run in scores)] if labels else []
    if not tasks:
        raise InputError("The results have no model and task in common.")
    lines = [["model", *tasks]]
    for label in labels:
        lines.append([label, *(_spread([100 * run[label][task] for run in scores], "") for task in tasks)])
    for one, other in _compared(runs[0], labels):
        ratios = ([run[one][task] / run[other][task] for run in scores] for task in tasks)
        lines.append([f"{one} / {other}", *(_spread(values, "×") for values in ratios)])
    return markdown_table(lines)


def _compared(run: Results, labels: Sequence[str]) -> list[tuple[str, str]]:
    """The student with the teacher and with the baseline, by their roles."""
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
