"""Results of an evidence suite: one file per finished run, and one file with all runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.metrics import RESAMPLES, Interval, Score, primary_metric
from clip_rd_edge.benchmarking.results import Environment, Results
from clip_rd_edge.benchmarking.tables import NO_VALUE, inert_markdown, markdown_table
from clip_rd_edge.errors import InputError
from clip_rd_edge.evidence.suite import EvidenceSuite
from clip_rd_edge.utils.structs import read_json

RESULT = "result.json"  # of one run, in its folder
FORMAT_VERSION = 2


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """Mean cosine similarity of images with their own caption (`positive`) and with all other captions (`negative`)."""

    positive: float
    negative: float

    @property
    def gap(self) -> float:
        """The difference between the two."""
        return self.positive - self.negative


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one model on one task.

    Attributes:
        hits: one character per image, `1` if its label or one of its captions ranks first and `0` if not, so that
            models can be compared in pairs.
        geometry: for a retrieval task, computed from its image-caption pairs.
        content, images: fingerprints of the task's questions and images, and of the images alone, in order.
    """

    score: Score
    content: str
    images: str
    hits: str
    geometry: Geometry | None = None


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one model on all tasks of the suite, in order.

    Attributes:
        weights: of the teacher, a fingerprint of what it computes with; else empty.
    """

    model: str
    weights: str = ""
    parameters: int
    tasks: tuple[TaskResult, ...]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Values of one metric over the steps of a training run."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one training run.

    Attributes:
        cpu_seconds: CPU time of training, including data loading and intermediate evaluations but not filling the
            teacher's store; None if the run was interrupted and resumed.
        curves: training curves, by their names in metrics.jsonl.
    """

    student: str
    method: str
    seed: int
    cpu_seconds: float | None
    result: ModelResult
    curves: dict[str, Curve]
    environment: Environment


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All results of a suite; `runs` are the finished ones, in the suite's order."""

    suite: EvidenceSuite
    teacher: ModelResult
    runs: tuple[RunResult, ...]
    format_version: int = FORMAT_VERSION


def read_run(folder: Path) -> RunResult | None:
    """Return the result of the run in `folder`, or None if it is not finished; raise ConfigError if it is damaged."""
    path = folder / RESULT
    return read_json(path, RunResult) if path.is_file() else None


def has_tasks(result: ModelResult, others: Sequence[tuple[str, str]]) -> bool:
    """Return whether a model was evaluated on these tasks, in this order, given the name and content of each."""
    return tasks_of(result) == list(others)


def tasks_of(result: ModelResult) -> list[tuple[str, str]]:
    """Return name and content of the tasks that a model was evaluated on, in order."""
    return [(task.score.task, task.content) for task in result.tasks]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `count` seeds; the deviation is None for a single seed."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The difference between two methods on the seeds that both have.

    Attributes:
        same_sign: whether the difference has the same sign for all seeds.
        interval: 95 % confidence interval by bootstrap over images, each resampled together with all its seeds. It
            covers other images, not other trainings. Tasks of the same images are resampled together.
    """

    spread: Spread
    same_sign: bool
    interval: Interval


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of one or more values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def seeds_table(runs: Sequence[Results]) -> str:
    """Return the accuracy over several results of one benchmark, such as seeds, as a Markdown table.

    A row per model and a column per task, in percent: mean ± standard deviation (min to max). The last rows are ratios
    of the student to the teacher and to the baseline, paired by run. A task of which two runs have other images,
    labels or captions is left out; a sentence below the table names it.
    """
    for number, run in enumerate(runs):
        if run in runs[:number]:
            raise InputError(f"The results {runs.index(run) + 1} and {number + 1} are the same; expected other seeds.")
    scores = [
        {(row.label, score.task): primary_metric(score) for row in run.rows for score in row.scores} for run in runs
    ]
    common = [key for key in scores[0] if all(key in run for run in scores)]
    examples = {
        (entry.task, kind, digest)
        for run in runs
        for row in run.rows
        for entry in row.correctness
        for kind, digest in (("questions", entry.questions), ("images", entry.images))
        if digest
    }
    counts = Counter((task, kind) for task, kind, _ in examples)
    differing = {task for (task, _), count in counts.items() if count > 1}
    tasks = [*dict.fromkeys(task for _, task in common if task not in differing)]
    if not tasks:
        raise InputError("The results have no task in common with the same model, images, labels and captions.")
    labels = [*dict.fromkeys(label for label, _ in common)]
    roles = {row.role: row.label for row in runs[0].rows if row.label in labels}

    def cells(label: str, other: str | None = None) -> Iterator[str]:
        for task in tasks:
            own = [run.get((label, task)) for run in scores]
            others = [run.get((other, task)) if other else 0.01 for run in scores]
            # A ratio to 0 has no value either.
            ratios = [mine / theirs for mine, theirs in zip(own, others, strict=True) if mine is not None and theirs]
            yield _range(ratios, "×" if other else "") if len(ratios) == len(runs) else NO_VALUE

    lines = [["model", *tasks], *([label, *cells(label)] for label in labels)]
    for reference in (roles[role] for role in ("teacher", "baseline") if role in roles and "student" in roles):
        lines.append([f"{roles['student']} / {reference}", *cells(roles["student"], reference)])
    remarks = [
        f"Accuracy on {inert_markdown(task)} is left out: the results have other images, labels or captions of it."
        for task in dict.fromkeys(task for _, task in common)
        if task in differing
    ]
    return "\n\n".join([markdown_table(lines), *remarks])


def _range(values: Sequence[float], unit: str) -> str:
    digits = 2 if unit else 1
    low, high, deviation = min(values), max(values), float(np.std(values, ddof=1))
    return f"{np.mean(values):.{digits}f}{unit} ± {deviation:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def runs_of(evidence: Evidence, student: str, method: str) -> dict[int, RunResult]:
    """Return the finished runs of a student and method, by seed."""
    return {run.seed: run for run in evidence.runs if (run.student, run.method) == (student, method)}


def difference(runs: dict[int, RunResult], reference: dict[int, RunResult], tasks: Sequence[int]) -> Difference | None:
    """Return `runs` minus `reference`, averaged over tasks, or None if they have no seed in common.

    Args:
        tasks: indices of the tasks in the suite, which count alike.
    """
    pairs = [
        [(runs[s].result.tasks[task], reference[s].result.tasks[task]) for s in sorted(runs.keys() & reference)]
        for task in tasks
    ]
    if not all(pairs):
        return None
    differences = np.mean(
        [[primary_metric(result.score) - primary_metric(other.score) for result, other in task] for task in pairs],
        axis=0,
    )
    over_seeds, same_sign = spread(differences.tolist()), bool(differences.min() > 0 or differences.max() < 0)
    rng = np.random.default_rng(0)
    groups = _by_images(pairs)
    draws = np.average([_resampled(group, rng) for group in groups], axis=0, weights=list(map(len, groups)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Difference(over_seeds, same_sign, Interval(float(low), float(high)))


_Pairs = list[tuple[TaskResult, TaskResult]]  # one per seed


def _by_images(tasks: Sequence[_Pairs]) -> list[_Pairs]:
    """Return the pairs of each task, those of tasks with the same images, such as in other languages, as one."""
    groups: dict[str, _Pairs] = {}
    for pairs in tasks:
        groups.setdefault(pairs[0][0].images, []).extend(pairs)
    return list(groups.values())


def _resampled(pairs: _Pairs, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the mean difference of the hits in RESAMPLES draws of the images that the pairs share."""
    # An image is resampled with all of its seeds and tasks, or the interval would be too narrow.
    per_image = np.mean([_hits(result.hits) - _hits(other.hits) for result, other in pairs], axis=0)
    # In N draws with replacement, the counts of the few distinct values follow a multinomial distribution.
    values, counts = np.unique(per_image, return_counts=True)
    means: np.ndarray[tuple[int], np.dtype[np.float64]] = (
        rng.multinomial(counts.sum(), counts / counts.sum(), RESAMPLES) @ values / counts.sum()
    )
    return means


def _hits(digits: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.frombuffer(digits.encode(), dtype=np.uint8).astype(np.float64) - ord("0")
