"""What came out: a small file a run, written when it is done, and one of all of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.environment import Environment
from clip_rd_edge.benchmarking.scores import Score
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
