"""What came out: a small file a run, written when it is done, and one of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.metrics import RESAMPLES, Interval, Score, primary_metric
from clip_rd_edge.benchmarking.results import Environment
from clip_rd_edge.evidence.suite import EvidenceSuite
from clip_rd_edge.utils.io import read_json

RESULT = "result.json"  # of one run, in its folder
FORMAT_VERSION = 1


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """Mean cosine of pictures with their own caption, and with all others'."""

    positive: float
    negative: float

    @property
    def gap(self) -> float:
        """How far the two stand apart."""
        return self.positive - self.negative


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """A model on one task.

    Attributes:
        hits: of a zero-shot task, a `1` for each picture that was told right and a `0` for each other; so that two
            models can be compared picture by picture.
        geometry: of a retrieval task's pairs.
    """

    score: Score
    hits: str = ""
    geometry: Geometry | None = None


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """A model on all tasks of the suite, in the suite's order."""

    model: str
    parameters: int
    tasks: tuple[TaskResult, ...]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was logged while training."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """One training.

    Attributes:
        cpu_seconds: processor time of training and the evaluations in between, loading included and the teacher's
            cache not; None where the run was interrupted and resumed.
        curves: by their names in metrics.jsonl.
    """

    student: str
    method: str
    seed: int
    cpu_seconds: float | None
    result: ModelResult
    curves: dict[str, Curve]
    environment: Environment


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a suite; `runs` are those that are done, in the suite's order."""

    suite: EvidenceSuite
    teacher: ModelResult
    runs: tuple[RunResult, ...]
    format_version: int = FORMAT_VERSION


def read_run(folder: Path) -> RunResult | None:
    """The result of the run in `folder`, None where it is not done; raises ConfigError where it is damaged."""
    path = folder / RESULT
    return read_json(path, RunResult) if path.is_file() else None


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
    differences = [primary_metric(one.score) - primary_metric(other.score) for one, other in pairs]
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
