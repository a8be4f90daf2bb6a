"""A whole run: from a configuration to a folder with a student that open_clip loads.

config.yaml      the resolved configuration
metrics.jsonl    one line a log step
checkpoints/     all state, for --resume
student/         the trained model, an open_clip local-dir; written last, so that a run without one is unfinished
best/            the best student by the run's own evaluations, where there were some
report/          plots
tensorboard/     the metrics once more, where asked for
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from clip_rd_edge.contract.checkpoint import STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.distillation.build import Ingredients, load_ingredients, make_dataset, provenance, similarities
from clip_rd_edge.distillation.config import RunConfig, first_difference
from clip_rd_edge.distillation.distributed import Processes, join_processes
from clip_rd_edge.distillation.embedding_store import build_cache, manifest_of, open_cache
from clip_rd_edge.distillation.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distillation.metrics import last_evaluation, plot_run
from clip_rd_edge.distillation.step import AUTOCAST, TrainingStep, choose_precision, choose_teacher_precision
from clip_rd_edge.distillation.teacher import CachedTeacher, Teacher, TeacherOfBatches
from clip_rd_edge.distillation.train import set_training_mode, step_settings, total_steps, train
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import to_device
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.io import read_yaml, to_yaml, write_text
from clip_rd_edge.utils.reporting import SILENT, Reporter

CONFIG_FILE, REPORT_FOLDER = "config.yaml", "report"


def run_distillation(
    config: RunConfig,
    run: Path,
    *,
    resume: bool,
    reporter: Reporter = SILENT,
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
) -> Path:
    """Train what `config` describes into the folder `run`; returns the student's folder.

    Args:
        resume: go on from the newest checkpoint in `run` where there is one; a finished run is left as it is.
        reporter: receives the progress of indexing, of the teacher cache and of training, and what was decided.

    Raises:
        UsageError: `run` holds something and `resume` is false, or holds a run of another configuration; or the teacher
            cache is of something else.
        InputError, ConfigError: data, teacher or student do not fit.
        InterruptedRunError: a signal asked to stop; the state was saved.
    """
    with join_processes() as processes:
        if not processes.first:
            reporter = SILENT
        config = msgspec.structs.replace(config, processes=processes.count)
        config, fresh = _agree_with_folder(config, run, resume=resume, reporter=reporter)
        processes.wait()  # before the first writes: the others would find the folder in use
        if (run / STUDENT_FOLDER / WEIGHTS_FILE).is_file():
            reporter.say(f"{run} is finished already")
            return run / STUDENT_FOLDER
        of = load_ingredients(config, name=run.resolve().name, processes=processes, reporter=reporter)
        steps = total_steps(config, of.pairs)
        if fresh:
            reporter.say(f"{len(of.pairs):,} pairs, {steps:,} steps of {config.recipe.batch_size}")
            config = _with_measured_precision(config, of, processes, reporter)
            if processes.first:
                write_text(run / CONFIG_FILE, to_yaml(config))
        teacher, dataset = _prepare_teacher(config, of, processes, reporter)
        student = train(
            config,
            run,
            of,
            teacher=teacher,
            dataset=dataset,
            processes=processes,
            reporter=reporter,
            evaluate=evaluate,
        )
        if processes.first:
            student.model.to("cpu")
            of = dataclasses.replace(of, student=student)
            plot_run(run, run / REPORT_FOLDER, similarities(config, of))
            figures = {"evaluation": last_evaluation(run)}
            save_clip(run / STUDENT_FOLDER, student, provenance={**provenance(config, of, steps=steps), **figures})
        return run / STUDENT_FOLDER


def _agree_with_folder(config: RunConfig, run: Path, *, resume: bool, reporter: Reporter) -> tuple[RunConfig, bool]:
    """The configuration to run, and whether the run is new: a resumed run keeps the precision it was measured to be."""
    if config.teacher_cache and not config.views:
        raise UsageError(
            "A teacher cache holds a fixed number of views of each pair, and none was given.",
            hint="add --views 8, say: eight crops of each picture, gone through again and again",
        )
    path = run / CONFIG_FILE
    if not (run.exists() and (run.is_file() or any(run.iterdir()))):
        return config, True
    if not resume:
        raise UsageError(
            f"The output {run} exists already and is not empty.",
            hint="choose another -o, or go on with that run by --resume",
        )
    if not path.is_file():
        return config, True
    old = read_yaml(path, RunConfig)
    if config.recipe.precision == "auto":
        config = _with_precision(config, student=old.recipe.precision)
    if config.teacher_precision == "auto":
        config = _with_precision(config, teacher=old.teacher_precision)
    if difference := first_difference(old, config):
        raise UsageError(
            f"{run} holds a run of another configuration: {difference}.",
            hint="give the same options as before, or choose another -o",
        )
    if config.processes != old.processes:
        reporter.say(
            f"the run began on {old.processes} processes and goes on on {config.processes}: batches and loss stay the "
            "same, but batch norms and dropout see other parts of a batch"
        )
    return config, False


def _prepare_teacher(
    config: RunConfig, of: Ingredients, processes: Processes, reporter: Reporter
) -> tuple[TeacherOfBatches | None, ViewDataset]:
    """The teacher as the steps ask it, and the views as it wants them: live, or from a cache that is filled first."""
    if of.teacher is None:
        return None, make_dataset(config, of)
    teacher = Teacher(of.teacher, processes.device, autocast=AUTOCAST[config.teacher_precision])
    if config.teacher_cache is None:
        return teacher, make_dataset(config, of)
    folder = Path(config.teacher_cache)
    manifest = manifest_of(
        of.teacher,
        of.pairs,
        crop_scale=config.recipe.crop_scale,
        seed=config.seed,
        views=config.views,
        precision=config.teacher_precision,
    )
    build_cache(
        folder,
        manifest,
        teacher,
        of.pairs,
        processes,
        workers=config.workers,
        max_bad=config.max_bad,
        reporter=reporter,
    )
    of.teacher.model.to("cpu")
    dataset = make_dataset(config, of, with_teacher_pixels=False)
    dataset.cache = open_cache(folder)
    return CachedTeacher(manifest.logit_scale, processes.device), dataset


def _with_measured_precision(config: RunConfig, of: Ingredients, processes: Processes, reporter: Reporter) -> RunConfig:
    """The configuration with each `auto` replaced by what is faster on this machine."""
    alone = Processes(device=processes.device)
    to_device(of.student.model, alone.device)
    set_training_mode(of.student, config)
    own = config.recipe.batch_size // processes.count
    first = StepSampler(len(of.pairs), own, seed=config.seed, start=0, stop=1)
    batch = next(iter(step_loader(make_dataset(config, of), first, workers=0)))

    def teacher_in(autocast: torch.dtype | None) -> Teacher:
        # A teacher of its own each time, so that the captions it remembers do not stay.
        assert of.teacher is not None
        return Teacher(of.teacher, alone.device, autocast=autocast)

    if of.teacher:
        chosen, reason = choose_teacher_precision(config.teacher_precision, teacher_in, batch)
        config = _with_precision(config, teacher=_agreed(chosen, processes))
        reporter.say(f"precision of the teacher: {reason}")

    def step_in(autocast: torch.dtype | None) -> TrainingStep:
        teacher = teacher_in(AUTOCAST[config.teacher_precision]) if of.teacher else None
        objective = of.objective.to(alone.device)
        return TrainingStep(of.student, teacher, objective, alone, step_settings(config, autocast))

    chosen, reason = choose_precision(config.recipe.precision, step_in, batch)
    reporter.say(f"precision: {reason}")
    return _with_precision(config, student=_agreed(chosen, processes))


def _agreed(chosen: str, processes: Processes) -> str:
    """What all processes compute in: one for which float32 is the faster decides."""
    return "fp32" if processes.any(chosen == "fp32") else chosen


def _with_precision(config: RunConfig, *, student: str | None = None, teacher: str | None = None) -> RunConfig:
    if student is not None:
        config = msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, precision=student))
    return config if teacher is None else msgspec.structs.replace(config, teacher_precision=teacher)
