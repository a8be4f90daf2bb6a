"""Means and spreads over seeds, and differences between methods that are paired by seed and by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_rd_edge.benchmarking.scores import RESAMPLES, Interval, Score, ZeroShotScore
from clip_rd_edge.evidence.results import Evidence, RunResult


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `count` seeds; the deviation of a single one is None."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A method minus another on the seeds that both have.

    Attributes:
        agreed: whether all seeds give the same sign.
        interval: 95 %, by bootstrap over pictures, each with all its seeds; so it tells whether other pictures would
            say the same of these very models. None without hits.
    """

    spread: Spread
    agreed: bool
    interval: Interval | None


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def headline(score: Score) -> float:
    """Top-1, or how often a picture finds its caption first."""
    return score.top1 if isinstance(score, ZeroShotScore) else score.image_to_text.at1


def runs_of(evidence: Evidence, student: str, method: str) -> dict[int, RunResult]:
    """Finished runs by seed."""
    return {run.seed: run for run in evidence.runs if (run.student, run.method) == (student, method)}


def difference(
    runs: dict[int, RunResult], reference: dict[int, RunResult], task: int, *, seed: int = 0
) -> Difference | None:
    """`runs` minus `reference` on a task, or None where no seed has both.

    Args:
        task: its place in the suite.
        seed: of the bootstrap.
    """
    pairs = [(runs[s].result.tasks[task], reference[s].result.tasks[task]) for s in sorted(runs.keys() & reference)]
    if not pairs:
        return None
    differences = [headline(one.score) - headline(other.score) for one, other in pairs]
    between, agreed = spread(differences), min(differences) > 0 or max(differences) < 0
    if not all(one.hits and other.hits for one, other in pairs):
        return Difference(between, agreed, None)
    # Seeds share the pictures: a picture is drawn with all of its seeds, or the interval would be too narrow.
    a_picture = np.mean([_hits(one.hits) - _hits(other.hits) for one, other in pairs], axis=0)
    # N draws with replacement hold each of the few different values as often as a multinomial says.
    values, counts = np.unique(a_picture, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
    low, high = np.percentile(draws @ values / counts.sum(), [2.5, 97.5])
    return Difference(between, agreed, Interval(float(low), float(high)))


def _hits(marks: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.frombuffer(marks.encode(), dtype=np.uint8).astype(np.float64) - ord("0")
