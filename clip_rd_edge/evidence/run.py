"""A trained model on the suite's tasks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_rd_edge.benchmarking.accuracy import evaluate, zero_shot
from clip_rd_edge.benchmarking.metrics import primary_metric
from clip_rd_edge.benchmarking.results import this_environment
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.task import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.distillation.embedding_store import STORING
from clip_rd_edge.distillation.metrics import pair_similarities, read_metrics
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.errors import InterruptedRunError, UsageError
from clip_rd_edge.evidence.report import write_evidence
from clip_rd_edge.evidence.results import (
    RESULT,
    Curve,
    Evidence,
    Geometry,
    ModelResult,
    RunResult,
    TaskResult,
    read_run,
)
from clip_rd_edge.evidence.suite import EvidenceSuite, Run, run_config
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.io import read_json, to_json, write_bytes
from clip_rd_edge.utils.lock import only_writer
from clip_rd_edge.utils.reporting import Reporter
from clip_rd_edge.walkthrough.pipeline import Settings, tune_teacher


def measure(encoder: Encoder, tasks: Sequence[Task], *, name: str) -> ModelResult:
    """Scores, hits and geometry of a model.

    Args:
        name: the model's, as tables show it.
    """
    return ModelResult(
        model=name,
        parameters=encoder.describe().parameters or 0,
        tasks=tuple(_measure_task(encoder, task) for task in tasks),
    )


def top1(encoder: Encoder, tasks: Sequence[Task]) -> dict[str, float]:
    """Top-1 of each zero-shot task by its name: the points of a learning curve."""
    return {task.name: zero_shot(encoder, task).score.top1 for task in tasks if isinstance(task, ZeroShotTask)}


def _measure_task(encoder: Encoder, task: Task) -> TaskResult:
    if isinstance(task, ZeroShotTask):
        answers = zero_shot(encoder, task)
        return TaskResult(score=answers.score, hits="".join("01"[int(hit)] for hit in answers.hits(task)))
    return TaskResult(score=evaluate(encoder, task), geometry=_geometry(encoder, task))


def _geometry(encoder: Encoder, task: RetrievalTask) -> Geometry:
    # One caption a picture, as in training: of several captions of a picture, none is a negative of another.
    first = {picture: caption for caption, picture in reversed([*enumerate(task.caption_images)])}
    shown = sorted(first)
    images = encoder.encode_images([open_image(task.images[picture]) for picture in shown])
    texts = encoder.encode_texts([task.captions[first[picture]] for picture in shown])
    positive, negative = pair_similarities(torch.from_numpy(images), torch.from_numpy(np.ascontiguousarray(texts)))
    return Geometry(positive=positive.mean().item(), negative=negative.mean().item())


TEACHER, CACHES, TEACHER_RESULT = "teacher", "teacher-cache", "teacher-result.json"
# What is kept of metrics.jsonl; the total loss is left out, as methods add up different terms.
CURVES = ("student_positive", "student_negative", "teacher_positive", "teacher_negative", "loss/task")


def run_evidence(suite: EvidenceSuite, folder: Path, reporter: Reporter, *, teacher: str | None = None) -> Evidence:
    """Train and measure what is not done yet; returns all of it, which also stands in NAME.json after every run.

    Args:
        teacher: what `load_clip` takes; None tunes the embedded one in `folder`.

    Raises:
        UsageError: another process writes `folder`, or a run in it was made with other settings.
        InterruptedRunError: a signal asked to stop; the same call goes on from there.
    """
    torch.set_num_threads(suite.threads)
    with only_writer(folder):
        runs = list(suite.runs())
        reporter.begin("The teacher", 1, len(runs) + 1)
        if teacher is None:
            teacher = _embedded_teacher(suite, folder, reporter)
        tasks = [load_task(name) for name in suite.tasks]
        _measure_teacher(folder, teacher, tasks)
        for number, run in enumerate(runs, start=2):
            reporter.begin(str(run), number, len(runs) + 1)
            try:
                _train_and_measure(suite, run, folder, teacher=teacher, tasks=tasks, reporter=reporter)
            except InterruptedRunError as error:
                raise InterruptedRunError(str(error), hint="the same command goes on from there") from error
            write_evidence(folder / f"{suite.name}.json", collect(suite, folder))
    return collect(suite, folder)


def collect(suite: EvidenceSuite, folder: Path) -> Evidence:
    """What is done so far in a suite's folder.

    Raises:
        UsageError: nothing is.
    """
    found = (read_run(folder / run.place) for run in suite.runs())
    runs = tuple(result for result in found if result is not None)
    if not runs:
        raise UsageError(f"{folder} has no finished run of the suite {suite.name}.", hint="run the suite first")
    return Evidence(suite=suite, teacher=read_json(folder / TEACHER_RESULT, ModelResult), runs=runs)


def _embedded_teacher(suite: EvidenceSuite, folder: Path, reporter: Reporter) -> str:
    if suite.data != "emoji":
        raise UsageError(
            f"The suite {suite.name} trains on {suite.data}, for which there is no embedded teacher.",
            hint="name one: --teacher local-dir:PATH, or hf-hub:ORG/REPO",
        )
    tune_teacher(Settings(folder=folder, teacher_steps=suite.teacher_steps), reporter)
    return str(folder / TEACHER)


def _measure_teacher(folder: Path, teacher: str, tasks: Sequence[Task]) -> None:
    path = folder / TEACHER_RESULT
    if not path.is_file():
        clip = load_clip(teacher)
        write_bytes(path, to_json(measure(TorchEncoder(clip), tasks, name=clip.name)))


class _TrainingClock(Reporter):
    """Processor time of a run from the first report of its training on; whichever run comes first also fills the
    teacher cache for all, which is not counted."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._began

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        if stage == STORING:
            self._began = time.process_time()
        self._reporter.update(stage, step, total, message)


def _train_and_measure(
    suite: EvidenceSuite, run: Run, folder: Path, *, teacher: str, tasks: Sequence[Task], reporter: Reporter
) -> None:
    place = folder / run.place
    config = run_config(suite, run, teacher=teacher, caches=folder / CACHES)
    resumed, clock = place.is_dir(), _TrainingClock(reporter)
    # Asked of a finished run, too: it refuses one that was made with other settings.
    student = run_distillation(config, place, resume=True, reporter=clock, evaluate=lambda e: top1(e, tasks))
    if (place / RESULT).is_file():
        return
    result = RunResult(
        student=run.student,
        method=run.method.name,
        seed=run.seed,
        cpu_seconds=None if resumed else round(clock.seconds, 1),
        result=measure(TorchEncoder(load_clip(str(student))), tasks, name=run.student),
        curves=_curves(read_metrics(place)),
        environment=this_environment(),
    )
    write_bytes(place / RESULT, to_json(result))
    for leftover in ("checkpoints", "best"):  # `best` was chosen by what is tested here: the last step is what counts
        shutil.rmtree(place / leftover, ignore_errors=True)
    reporter.say(", ".join(f"{task.score.task} {primary_metric(task.score):.1%}" for task in result.result.tasks))


def _curves(lines: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    names = [*CURVES, *dict.fromkeys(key for line in lines for key in line if key.startswith("evaluation/"))]
    points = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}
    return {
        name: Curve(steps=tuple(step for step, _ in of), values=tuple(round(value, 4) for _, value in of))
        for name, of in points.items()
        if of
    }
