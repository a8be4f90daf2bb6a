"""Several runs of one suite that differ in their seed: means and spreads, so that a claim has both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.benchmarking.scores import Score, ZeroShotScore
from clip_rd_edge.errors import InputError


def seeds_table(runs: Sequence[Results]) -> str:
    """A Markdown table: a row a model, a column a task, `mean ± standard deviation (least to greatest)` in percent.

    Only models that every run measured are shown. The last lines are ratios that are paired by run.

    Raises:
        InputError: fewer than two runs, or runs that have no model or no task in common.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} result was given; a spread needs at least 2.")
    scores = [{row.label: {score.task: _headline(score) for score in row.scores} for row in run.rows} for run in runs]
    labels = [label for label in scores[0] if all(label in run for run in scores)]
    tasks = [task for task in scores[0][labels[0]] if all(task in run[labels[0]] for run in scores)] if labels else []
    if not tasks:
        raise InputError("The results have no model and task in common.")
    lines = [["model", *tasks], ["---", *("---:" for _ in tasks)]]
    for label in labels:
        lines.append([label, *(_spread([100 * run[label][task] for run in scores], "") for task in tasks)])
    for one, other in _compared(runs[0], labels):
        ratios = ([run[one][task] / run[other][task] for run in scores] for task in tasks)
        lines.append([f"{one} / {other}", *(_spread(values, "×") for values in ratios)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _headline(score: Score) -> float:
    return score.top1 if isinstance(score, ZeroShotScore) else score.image_to_text.at1


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
