"""Top-1 of one model against another's on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clip_rd_edge.benchmarking.answers import ZeroShotAnswers
from clip_rd_edge.benchmarking.results import Comparison, RowResult
from clip_rd_edge.benchmarking.scores import difference_interval
from clip_rd_edge.benchmarking.suite import Role
from clip_rd_edge.contract.task import ZeroShotTask

TaskAnswers = tuple[ZeroShotTask, Mapping[str, ZeroShotAnswers]]  # a task, and what each model said, by its label

# What each role is compared with, where the suite has it.
_REFERENCES: dict[Role, tuple[Role, ...]] = {
    "teacher": (),
    "baseline": (),
    "student": ("teacher", "baseline"),
    "exported": ("student",),
    "quantised": ("exported", "teacher"),
}


def compare(rows: Sequence[RowResult], answers: Sequence[TaskAnswers]) -> tuple[Comparison, ...]:
    """Every row with the first row of each role that its own is compared with, on every zero-shot task."""
    first = {row.role: row for row in reversed(rows)}
    pairs = [(row, first[role]) for row in rows for role in _REFERENCES[row.role] if role in first]
    return tuple(_compare(row, reference, *task) for row, reference in pairs for task in answers)


def _compare(
    row: RowResult, reference: RowResult, task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers]
) -> Comparison:
    hits, reference_hits = answers[row.label].hits(task), answers[reference.label].hits(task)
    return Comparison(
        task=task.name,
        label=row.label,
        reference=reference.label,
        difference=float(hits.mean() - reference_hits.mean()),
        interval=difference_interval(hits, reference_hits),
    )
