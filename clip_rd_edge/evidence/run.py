"""Run an evidence suite: train each run, evaluate the trained model, and collect the results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from clip_rd_edge.benchmarking.accuracy import (
    correctness_of,
    embed_images,
    evaluate,
    image_digest,
    predict,
    task_fingerprint,
)
from clip_rd_edge.benchmarking.metrics import primary_metric
from clip_rd_edge.benchmarking.results import this_environment
from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.bundle.runs import EVALUATION_PREFIX, INPUTS_FILE, STUDENT_FOLDER, WEIGHTS_FILE, read_metrics
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.data.tasks import RetrievalTask, Task, ZeroShotTask, load_task, with_distinct_names
from clip_rd_edge.distillation.checkpoint import BEST_FOLDER, CHECKPOINTS_FOLDER, list_checkpoints
from clip_rd_edge.distillation.config import CROP_SCALE, RunConfig
from clip_rd_edge.distillation.embed import STORE_STAGE
from clip_rd_edge.distillation.metrics import mean_similarities
from clip_rd_edge.distillation.run import check_folder, run_distillation
from clip_rd_edge.distillation.setup import RunInputs, data_inputs, input_difference, sha256_of_file, training_pairs
from clip_rd_edge.distillation.student import crops_of, empty_student, takes_text
from clip_rd_edge.errors import DivergedRunError, UsageError
from clip_rd_edge.evidence.report import training_data_remark, write_evidence
from clip_rd_edge.evidence.suite import (
    RESULT,
    TEACHER_RESULT,
    TUNED_TEACHER,
    Curve,
    Evidence,
    EvidenceSuite,
    Geometry,
    ModelResult,
    Run,
    RunResult,
    TaskResult,
    read_run,
    tasks_of,
)
from clip_rd_edge.losses.terms import own_terms, source_of
from clip_rd_edge.models.clip import model_fingerprint
from clip_rd_edge.models.encoder import TorchEncoder, torch_threads
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.names import student_file
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.pipeline import tune_teacher
from clip_rd_edge.settings.measuring import Quickstart
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import Typed, is_file, typed
from clip_rd_edge.utils.structs import read_json, to_json
from clip_rd_edge.utils.text import PrefixedReporter, Reporter, shown_source


def evaluate_model(encoder: Encoder, tasks: Sequence[Task], *, name: str) -> ModelResult:
    """Measure scores, hits and geometry of a model."""
    return ModelResult(
        model=name,
        parameters=encoder.describe().parameters or 0,
        tasks=tuple(_evaluate_task(encoder, task) for task in tasks),
    )


def curve_scores(encoder: Encoder, tasks: Sequence[Task]) -> dict[str, float]:
    """Return what the learning curves show, by task: top-1 of zero-shot tasks, or R@1 where there are none."""
    shown = [task for task in tasks if isinstance(task, ZeroShotTask)] or tasks
    return {task.name: primary_metric(evaluate(encoder, task)) for task in shown}


def _evaluate_task(encoder: Encoder, task: Task) -> TaskResult:
    predictions = predict(encoder, task)
    hits = correctness_of(task, predictions)[0].hits()
    return TaskResult(
        score=predictions.score,
        content=task_fingerprint(task),
        images=image_digest(task),
        hits="".join("01"[int(hit)] for hit in hits),
        geometry=_geometry(encoder, task) if isinstance(task, RetrievalTask) else None,
    )


def _geometry(encoder: Encoder, task: RetrievalTask) -> Geometry:
    # One caption per image, as in training: captions of the same image are not negatives of each other.
    first_caption = task.first_captions()
    captioned = sorted(first_caption)
    images = embed_images(encoder, [task.images[image] for image in captioned], task.name)
    texts = encoder.encode_texts([task.captions[first_caption[image]] for image in captioned])
    positive, negative = mean_similarities(torch.from_numpy(images), torch.from_numpy(np.ascontiguousarray(texts)))
    return Geometry(positive=positive, negative=negative)


STORES = "store"
# The curves taken from metrics.jsonl, without the total loss: methods sum different terms.
CURVES = ("student_positive", "student_negative", "teacher_positive", "teacher_negative", "loss/task")


def run_evidence(suite: EvidenceSuite, folder: Path, reporter: Reporter, *, teacher: Typed | None = None) -> Evidence:
    """Train and evaluate the runs that are not finished yet, and return all results.

    NAME.json is updated after every run. One that diverges is left to the same call again, after all others.

    Args:
        teacher: model name, as in `load_clip`; None tunes the built-in teacher in `folder`.
    """
    with torch_threads(suite.threads), exclusive_writer(folder):
        runs = list(suite.runs())
        for remark in training_data_remark(suite):
            reporter.note(remark)
        reporter.begin("Teacher", 1, len(runs) + 1)
        if teacher is None:
            teacher = _embedded_teacher(suite, folder, reporter)
        configs = [run_config(suite, run, teacher=teacher, stores=folder / STORES) for run in runs]
        _check_runs(configs, [folder / run.subfolder for run in runs], reporter)
        tasks = with_distinct_names([load_task(suite.place(name)) for name in suite.tasks], suite.tasks)
        _evaluate_teacher(suite, folder, teacher, tasks)
        diverged = list[str]()
        for number, (run, config) in enumerate(zip(runs, configs, strict=True), start=2):
            reporter.begin(str(run), number, len(runs) + 1)
            try:
                _train_and_evaluate(config, run, folder / run.subfolder, tasks=tasks, reporter=reporter)
            except DivergedRunError as error:
                reporter.note(str(error))
                diverged.append(str(run))
            else:
                write_evidence(folder / f"{suite.name}.json", collect(suite, folder))
    if diverged:
        raise DivergedRunError(
            f"{len(diverged)} of {len(runs)} runs {'has' if len(diverged) == 1 else 'have'} diverged: "
            f"{'; '.join(diverged)}.",
            hint="finished runs are kept: remove the method from the suite, or give it other settings and another name",
        )
    return collect(suite, folder)


_OF_ALL_RUNS = ("image_size", "context_length", "embedding_size", "views", "log_every", "evaluate_every")


def run_config(suite: EvidenceSuite, run: Run, *, teacher: Typed, stores: Path) -> RunConfig:
    """Return the configuration of a run.

    Args:
        stores: folder of the teacher's embeddings, with one store per seed and crops, because views depend on these.
    """
    recipe = suite.recipe(run.method, run.student)
    needs_teacher = recipe.objective.needs_teacher
    text, pretrained_text = run.method.text or suite.text, run.method.pretrained_text
    config = RunConfig(
        recipe_name=Typed(run.method.name),
        recipe=recipe,
        data=suite.place(suite.data),
        teacher=teacher if needs_teacher else None,
        student=suite.place(run.student),
        text=suite.place(text),
        freeze_text=text == TEACHER,
        pretrained_text=suite.place(pretrained_text) if pretrained_text else None,
        freeze_text_layers=run.method.freeze_text_layers,
        teacher_precision=suite.precision,
        seed=run.seed,
        workers=0,
        checkpoint_every=suite.evaluate_every,
        tasks=tuple(map(suite.place, suite.tasks)),
        **{name: getattr(suite, name) for name in _OF_ALL_RUNS},
    )
    if takes_text(config):
        config = msgspec.structs.replace(config, context_length=None)
    if not needs_teacher:
        return config
    return msgspec.structs.replace(config, store=typed(stores / _store_name(config)))


def _store_name(config: RunConfig) -> str:
    crops, name = crops_of(config), f"seed-{config.seed}"
    if crops.scale != CROP_SCALE:
        name += f"-crops-{crops.scale[0]}-{crops.scale[1]}"
    if crops.aspect_ratio is None:
        return f"{name}-squash"
    return name if crops.aspect_ratio == 1 else f"{name}-{crops.aspect_ratio:.3f}"


def collect(suite: EvidenceSuite, folder: Path) -> Evidence:
    """Collect the finished runs in a suite's folder.

    Runs that were evaluated on other tasks than the teacher are not finished: `run_evidence` evaluates them again.
    """
    results = [result for run in suite.runs() if (result := read_run(folder / run.subfolder)) is not None]
    teacher = read_json(folder / TEACHER_RESULT, ModelResult) if results else None
    runs = tuple(run for run in results if teacher and tasks_of(run.result) == tasks_of(teacher))
    if teacher is None or not runs:
        raise UsageError(f"{folder} has no finished run of the suite {suite.name}.", hint="run the suite first")
    return Evidence(suite=suite, teacher=teacher, runs=runs)


def _embedded_teacher(suite: EvidenceSuite, folder: Path, reporter: Reporter) -> Typed:
    if suite.data != "emoji":
        raise UsageError(
            f"The suite {suite.name} trains on {shown_source(suite.data)}, for which there is no built-in teacher.",
            hint="name a teacher: {teacher} local-dir:PATH, or hf-hub:ORG/REPO",
        )
    tune_teacher(Quickstart(folder, teacher_steps=suite.teacher_steps, reporter=reporter))
    return typed(folder / TUNED_TEACHER)


def _evaluate_teacher(suite: EvidenceSuite, folder: Path, teacher: Typed, tasks: Sequence[Task]) -> None:
    path = folder / TEACHER_RESULT
    clip = load_clip(teacher)
    weights = model_fingerprint(clip)
    if path.is_file():
        known = read_json(path, ModelResult)
        is_same = known.weights == weights
        if not is_same and any(read_run(folder / run.subfolder) for run in suite.runs()):
            raise UsageError(
                f"{folder} has finished runs beside another teacher, {known.model}, or one with other weights.",
                hint="name that teacher again, or choose another {output}",
            )
        if is_same and known.model == clip.name and tasks_of(known) == _named(tasks):
            return
    result = evaluate_model(TorchEncoder(clip), tasks, name=clip.name)
    write_bytes(path, to_json(msgspec.structs.replace(result, weights=weights)))


def _named(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    return [(task.name, task_fingerprint(task)) for task in tasks]


class _TrainingClock(PrefixedReporter):
    """Measures the CPU time of a run; it stands still while a store is filled, which one run does for all."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(reporter, prefix="")
        self._start = self._last_update = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._start

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        now = time.process_time()
        if stage == STORE_STAGE and step:
            self._start += now - self._last_update
        self._last_update = now
        super().update(stage, step, total, message)


def _check_runs(configs: Sequence[RunConfig], folders: Sequence[Path], reporter: Reporter) -> None:
    """Check all runs of a suite before the first is trained: the others may be days away."""
    pairs = training_pairs(configs[0], reporter=reporter)
    for config, folder in zip(configs, folders, strict=True):
        if folder.is_dir():
            check_folder(config, folder, resume=True)
            _check_files(config, folder, pairs)
    for config in {(config.student, config.recipe_name): config for config in configs}.values():  # of one seed
        empty_student(config, name=config.student)


def _check_files(config: RunConfig, run: Path, pairs: Samples) -> None:
    """Refuse other data, code of an own term, or another file of the student than a run that has trained began with."""
    if is_file(run / STUDENT_FOLDER / WEIGHTS_FILE) or list_checkpoints(run):
        old = read_json(run / INPUTS_FILE, RunInputs)
        file = sha256_of_file(student_file(config.student))
        terms = {name: source_of(name) for name in own_terms(config.recipe.objective)}
        new = msgspec.structs.replace(old, **data_inputs(pairs), student_file_sha256=file, terms_sha256=terms)
        if difference := input_difference(old, new, data=pairs.name, teachers=config.teachers):
            raise UsageError(
                f"{run} began with other inputs: {difference}.",
                hint="restore them, name a changed term as a new method, or choose another {output}",
            )


def _train_and_evaluate(
    config: RunConfig, run: Run, run_folder: Path, *, tasks: Sequence[Task], reporter: Reporter
) -> None:
    resumed, clock = run_folder.is_dir(), _TrainingClock(reporter)
    # Also called for a finished run, whose student it returns.
    student = run_distillation(
        config, run_folder, resume=True, reporter=clock, evaluate=lambda encoder: curve_scores(encoder, tasks)
    )
    known, named = read_run(run_folder), _named(tasks)
    if known is not None and tasks_of(known.result) == named:
        return
    measured = evaluate_model(TorchEncoder(load_clip(typed(student))), tasks, name=run.student)
    result = RunResult(
        student=run.student,
        method=run.method.name,
        seed=run.seed,
        cpu_seconds=None if resumed else round(clock.seconds, 1),
        result=measured,
        curves=_curves(read_metrics(run_folder)),
        environment=this_environment(),
    )
    if known is not None:  # of a suite that had other tasks then, or the same with other images or labels
        same = {name for name, content in tasks_of(known.result) if (name, content) in named}
        curves = {
            name: curve
            for name, curve in known.curves.items()
            if not name.startswith(EVALUATION_PREFIX) or name.removeprefix(EVALUATION_PREFIX) in same
        }
        result = msgspec.structs.replace(known, result=measured, curves=curves)
    write_bytes(run_folder / RESULT, to_json(result))
    # `best` was selected on the test tasks, so only the model of the last step may be evaluated on them.
    for leftover in (CHECKPOINTS_FOLDER, BEST_FOLDER):
        shutil.rmtree(run_folder / leftover, ignore_errors=True)
    reporter.note(", ".join(f"{task.score.task} {primary_metric(task.score):.1%}" for task in result.result.tasks))


def _curves(lines: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    names = [*CURVES, *dict.fromkeys(key for line in lines for key in line if key.startswith(EVALUATION_PREFIX))]
    points = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}
    return {
        name: Curve(steps=tuple(step for step, _ in curve), values=tuple(round(value, 4) for _, value in curve))
        for name, curve in points.items()
        if curve
    }
