"""Evidence suites as small YAML files, students × methods × seeds trained with the same settings; and their results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.metrics import RESAMPLES, Interval, Score, primary_metric
from clip_rd_edge.benchmarking.results import Environment, Results
from clip_rd_edge.benchmarking.suite import Threads, find_suite
from clip_rd_edge.benchmarking.tables import NO_VALUE, inert_markdown, markdown_table
from clip_rd_edge.data.load import local_place
from clip_rd_edge.distillation.config import Recipe, Seed, load_recipe
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.structs import (
    CheckedStruct,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    convert,
    read_json,
    read_yaml,
)

TEACHER_RESULT = "teacher-result.json"  # beside the suite's own NAME.json
TUNED_TEACHER = "teacher"  # the built-in one's folder beside it, and so its name
_SafeName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*\Z")]  # of a file or folder, on any system


class Method(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method to train students with.

    Attributes:
        weights: loss weights that differ from the recipe's.
        settings: further keys that differ from the recipe's, such as `bank_temperature`.
        steps: the suite's by default; others, or those of some students by their names, make methods comparable that
            take different times per step.
        text: the text tower, as in `RunConfig`; the suite's by default.
        pretrained_text: what the text tower starts from, as in `RunConfig`; random weights by default.
        freeze_text_layers: groups of layers of the text tower that are not trained, as in `RunConfig`.
    """

    name: _SafeName
    recipe: str
    weights: dict[str, NonNegativeFloat] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    steps: PositiveInt | dict[str, PositiveInt] | None = None
    text: str | None = None
    pretrained_text: str | None = None
    freeze_text_layers: NonNegativeInt = 0


class EvidenceSuite(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison of methods.

    Attributes:
        data, tasks: training data and test tasks, named as for `distill` and `evaluate`.
        compare_with: methods that all others are compared with, paired by seed.
        views: see `RunConfig`; the teacher's embeddings of the views are computed once per seed.
        evaluate_every: steps between the points of the learning curves.
        context_length: tokens per caption; the text tower of a model, in `text`, keeps its own.
        teacher_steps: steps to tune the built-in teacher, if no other teacher is given.
    """

    name: _SafeName
    data: str
    tasks: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    students: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    methods: Annotated[tuple[Method, ...], msgspec.Meta(min_length=1)]
    compare_with: tuple[str, ...] = ()
    seeds: Annotated[tuple[Seed, ...], msgspec.Meta(min_length=1)]
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    precision: Literal["fp32", "bf16", "fp16"]  # not auto: all runs have the same
    image_size: PositiveInt
    text: str
    context_length: PositiveInt
    embedding_size: PositiveInt
    views: PositiveInt
    evaluate_every: PositiveInt
    log_every: PositiveInt
    teacher_steps: PositiveInt = 400
    threads: Threads = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [method.name for method in self.methods]
        for field, values in (("methods", names), ("students", self.students), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{field} has duplicates: {', '.join(map(str, values))}")
        of_steps = [(f"steps of the method {m.name}", m.steps) for m in self.methods if isinstance(m.steps, dict)]
        for what, given, known in (
            ("compare_with", self.compare_with, names),
            *((what, steps, self.students) for what, steps in of_steps),
        ):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"{what} has {unknown[0]!r}; expected one of {', '.join(known)}")

    def runs(self) -> Iterator[Run]:
        """Yield all runs, seed by seed, so that an unfinished suite already gives complete tables."""
        for seed in self.seeds:
            for student in self.students:
                for method in self.methods:
                    yield Run(student, method, seed)

    def place(self, text: str) -> Typed:
        """Return a name or a path in the suite, as if it was typed."""
        return local_place(text, source=f"The suite {self.name}")

    def steps_of(self, method: Method, student: str) -> int:
        """Return the number of steps for which a method trains a student."""
        own = method.steps.get(student) if isinstance(method.steps, dict) else method.steps
        return own or self.steps

    def recipe(self, method: Method, student: str) -> Recipe:
        """Return a method's recipe with this suite's settings."""
        raw = msgspec.to_builtins(load_recipe(method.recipe))
        raw |= {**method.settings, "objective": {**raw["objective"], **method.weights}}
        own = {name: getattr(self, name) for name in ("batch_size", "learning_rate", "precision")}
        recipe = convert(raw, Recipe, source=f"The method {method.name}")
        return msgspec.structs.replace(recipe, steps=self.steps_of(method, student), **own)


@dataclass(frozen=True)
class Run:
    """One training run of a suite."""

    student: str
    method: Method
    seed: int

    def __str__(self) -> str:
        return f"{self.student}, {self.method.name}, seed {self.seed}"

    @property
    def subfolder(self) -> Path:
        """The run's folder, relative to the suite's; a student that is the path of a file makes a single name."""
        return (
            Path("runs") / re.sub(r"[/\\:]+", "-", self.student).lstrip("-.") / self.method.name / f"seed-{self.seed}"
        )


def read_evidence(suite: str) -> EvidenceSuite:
    """Read a suite from a YAML file, or a shipped suite by its name."""
    evidence_suite = read_yaml(find_suite(suite, key="methods"), EvidenceSuite)
    for place in (evidence_suite.data, *evidence_suite.tasks):
        evidence_suite.place(place)
    for method in evidence_suite.methods:
        evidence_suite.recipe(method, evidence_suite.students[0])
    return evidence_suite


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
