"""Compare two runs of a suite: regressions and improvements, as opposed to noise.

A model's latency is expressed relative to the reference workload (`benchmarking.latency`): the logarithm of its p50
over the reference's p50 in the same timing block. A run's relative latency is the median over its blocks. The scatter
of the blocks predicts the scatter of runs: the noise of a comparison is STANDARD_ERRORS times the standard error of the
difference of two such medians, with RELOAD_DEVIATION included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.accuracy import Correctness
from clip_rd_edge.benchmarking.metrics import Interval, difference_interval, difference_p_value, may_be_chance
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.benchmarking.tables import share

Verdict = Literal["regression", "improvement", "noise", "same"]
LogRatios = npt.NDArray[np.float64]
DETECTABLE_CHANGE = 0.15  # a change that a comparison should be able to detect
TOO_BUSY = 0.25  # load by other processes above which calls are interrupted too often for any statistics
BUSY = 0.05  # load by other processes above which latencies are no longer those of the models alone
MEASUREMENTS = {"image": "image tower", "text": "text tower", "end_to_end": "end to end"}
# None of the about twenty comparisons in a report should be flagged by chance: 0.05 / 20, one-sided, with a margin for
# correlation between blocks.
STANDARD_ERRORS = 3.5
# Standard deviation that blocks of one run cannot show: another process has the model in another place in memory.
RELOAD_DEVIATION = 0.01
MIN_BLOCKS = 2  # a single one has no scatter, so that every difference would exceed the noise
_MEDIAN_TO_MEAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean


class LatencyChange(msgspec.Struct, frozen=True, kw_only=True):
    """One p50 of a row in both runs.

    Attributes:
        old_ms, new_ms: the latencies as measured.
        change: increase in latency as a fraction, with each latency relative to the reference workload of its own run.
        noise: how large `change` can be by chance.
    """

    row: str
    what: str
    old_ms: float
    new_ms: float
    change: float
    noise: float
    verdict: Verdict


class AccuracyChange(msgspec.Struct, frozen=True, kw_only=True):
    """One accuracy of a row in both runs, as fractions.

    Attributes:
        interval: confidence interval of `new - old`, by paired bootstrap, widened for the number of comparisons.
    """

    row: str
    task: str
    measure: str
    old: float
    new: float
    interval: Interval
    verdict: Verdict


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """All changes between two runs.

    Attributes:
        lost: rows and tasks that are missing from the new run, with the reason; each counts as a regression.
        uncompared: tasks of both runs on which the accuracy of a row could not be compared.
        remarks: what was not compared, and caveats about the rest.
        regressions: total number of regressions.
    """

    latencies: tuple[LatencyChange, ...]
    accuracies: tuple[AccuracyChange, ...]
    lost: dict[str, str]
    uncompared: tuple[str, ...]
    remarks: tuple[str, ...]
    regressions: int


def compare_runs(old: Results, new: Results) -> Changes:
    """Compare all rows that both runs have, by label."""
    new_rows = {row.label: row for row in new.rows}
    pairs = [(row, new_rows[row.label]) for row in old.rows if row.label in new_rows]
    old_tasks, new_tasks = (list(dict.fromkeys(s.task for row in run.rows for s in row.scores)) for run in (old, new))
    lost = {row.label: "It is not in the suite." for row in old.rows if row.label not in new_rows}
    lost |= {task: "The suite has no task of this name." for task in old_tasks if task not in new_tasks}
    reasons = {row.label: row.reason for row in new.skipped} | {task.name: task.reason for task in new.missing}
    accuracies = _accuracy_changes(pairs)
    compared = {(change.row, change.task) for change in accuracies}
    uncompared = [
        task for task in old_tasks if task in new_tasks and any((row.label, task) not in compared for row, _ in pairs)
    ]
    obstacles = _latency_obstacles(old, new)
    remarks = [*obstacles, *_package_remarks(old, new), *([] if obstacles else _machine_remarks(old, new))]
    remarks += [
        f"Accuracy on {task} is not compared: the two runs have other images, labels or captions of it."
        for task in uncompared
    ]
    latencies = () if obstacles else tuple(_latency_changes(old, new, pairs))
    if noisy := sum(change.noise > DETECTABLE_CHANGE for change in latencies):
        remarks.append(
            f"{noisy} of {len(latencies)} latencies are too noisy to detect a change of "
            f"{share(DETECTABLE_CHANGE, 1)}: repeat both runs on a quiet machine."
        )
    return Changes(
        latencies=latencies,
        accuracies=accuracies,
        lost={name: reasons.get(name, reason) for name, reason in lost.items()},
        uncompared=tuple(uncompared),
        remarks=tuple(remarks),
        regressions=len(lost) + [change.verdict for change in latencies + accuracies].count("regression"),
    )


def _latency_changes(old: Results, new: Results, pairs: list[tuple[RowResult, RowResult]]) -> Iterator[LatencyChange]:
    for field, name in MEASUREMENTS.items():
        measured = [pair for pair in pairs if all(getattr(row.latency, field) for row in pair)]  # text may be left out
        old_ratios = {row.label: _log_ratios(old, row, field) for row, _ in measured}
        new_ratios = {row.label: _log_ratios(new, row, field) for _, row in measured}
        pooled = pooled_deviation([*old_ratios.values(), *new_ratios.values()])
        for old_row, new_row in measured:
            ratios = old_ratios[old_row.label], new_ratios[old_row.label]
            change, noise = relative_change(*ratios), change_noise(*ratios, pooled=pooled)
            slower, faster = change > noise, change < 1 / (1 + noise) - 1
            yield LatencyChange(
                row=old_row.label,
                what=name,
                old_ms=getattr(old_row.latency, field).p50,
                new_ms=getattr(new_row.latency, field).p50,
                change=change,
                noise=noise,
                verdict="regression" if slower else "improvement" if faster else "noise",
            )


def _log_ratios(results: Results, row: RowResult, field: str) -> LogRatios:
    """Return the logarithm of a row's latency over the reference's, per block, (B,)."""
    ratios: LogRatios = np.log(getattr(row.latency, field).blocks) - np.log(getattr(results.reference, field))
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


def latency_noise(results: Results) -> float | None:
    """Return how much any row's p50 can differ between two such runs by chance, as a fraction; None if unknown."""
    if len(results.reference.image) < MIN_BLOCKS:
        return None
    noise = []
    for field in MEASUREMENTS:
        models = [_log_ratios(results, row, field) for row in results.rows if getattr(row.latency, field)]
        noise += [change_noise(ratios, ratios, pooled=pooled_deviation(models)) for ratios in models]
    return max(noise)


def _accuracy_changes(pairs: list[tuple[RowResult, RowResult]]) -> tuple[AccuracyChange, ...]:
    matches: list[tuple[str, Correctness, Correctness]] = []
    for old_row, new_row in pairs:
        found = {(new.task, new.measure, new.questions, new.images): new for new in new_row.correctness}
        for old in old_row.correctness:
            if new := found.get((old.task, old.measure, old.questions, old.images)):
                matches.append((old_row.label, old, new))
    # Bonferroni: with many comparisons, some 95 % intervals would exclude 0 by chance.
    level = 1 - 0.05 / max(len(matches), 1)
    return tuple(_accuracy_change(label, old, new, level=level) for label, old, new in matches)


def _accuracy_change(row: str, old: Correctness, new: Correctness, *, level: float) -> AccuracyChange:
    old_hits, new_hits = old.hits(), new.hits()
    interval = difference_interval(new_hits, old_hits, level=level)
    if bool((old_hits == new_hits).all()):
        verdict: Verdict = "same"
    elif may_be_chance(interval, difference_p_value(new_hits, old_hits), level=level):
        verdict = "noise"
    else:
        verdict = "improvement" if interval.low > 0 else "regression"
    return AccuracyChange(
        row=row,
        task=old.task,
        measure=old.measure,
        old=float(old_hits.mean()),
        new=float(new_hits.mean()),
        interval=interval,
        verdict=verdict,
    )


def _latency_obstacles(old: Results, new: Results) -> list[str]:
    """Return why latencies cannot be compared; empty if they can."""
    for name, run in (("old", old), ("new", new)):
        if run.other_load is not None and run.other_load > TOO_BUSY:
            return [
                f"Latency is not compared: other processes used {share(run.other_load, 1)} of the machine during the "
                f"{name} run; repeat it on a quiet machine."
            ]
        if len(run.reference.image) < MIN_BLOCKS:
            return [
                f"Latency is not compared: a single round in the {name} run does not show the noise; repeat it with "
                f"more rounds."
            ]
    settings: list[tuple[str, object, object]] = [
        ("machines", old.environment.machine, new.environment.machine),
        ("GPUs", old.environment.accelerator or "none", new.environment.accelerator or "none"),
        ("numbers of threads", old.suite.threads, new.suite.threads),
    ]
    sets = [", ".join(run.environment.instruction_sets) for run in (old, new)]
    if old.environment.machine == new.environment.machine and all(sets):  # AMD EPYC names several generations
        settings.append(("instruction sets of the machines", sets[0], sets[1]))
    return [
        f"Latency is not compared: the {name} differ, {before} and {after}."
        for name, before, after in settings
        if before != after
    ]


def _package_remarks(old: Results, new: Results) -> list[str]:
    before, after = old.environment.packages, new.environment.packages
    differing = [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if not differing:
        return []
    note = " The reference workload runs in ONNX Runtime, so changes in its speed count as changes of the machine."
    return [f"Packages differ: {', '.join(differing)}.{note if 'onnxruntime' in ' '.join(differing) else ''}"]


def _machine_remarks(old: Results, new: Results) -> list[str]:
    remarks = []
    change = float(np.median(new.reference.image) / np.median(old.reference.image)) - 1
    if abs(change) >= 0.01:
        remarks.append(
            f"The machine itself was {share(abs(change), 1)} {'slower' if change > 0 else 'faster'} in the new run; "
            f"this is corrected for."
        )
    for name, run in (("old", old), ("new", new)):
        if run.other_load is not None and run.other_load > BUSY:
            remarks.append(f"Other processes used {share(run.other_load, 1)} of the machine during the {name} run.")
    return remarks
