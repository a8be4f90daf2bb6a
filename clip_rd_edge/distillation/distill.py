"""The flow of `distill`: from a configuration to a folder whose `student/` open_clip loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from PIL import Image

from clip_rd_edge.bundle.runs import REPORT_FOLDER, RUN_CONFIG_FILE, WEIGHTS_FILE
from clip_rd_edge.distillation.checkpoint import host_generators_kept, list_checkpoints
from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.embed import prepare_teacher
from clip_rd_edge.distillation.inputs import (
    check_inputs,
    common_inputs,
    record_inputs,
    record_locations,
    teachers_digest,
)
from clip_rd_edge.distillation.loop import Training, TrainingState
from clip_rd_edge.distillation.metrics import last_evaluation, plot_run
from clip_rd_edge.distillation.optimizer import named_divergence
from clip_rd_edge.distillation.run import Evaluate, Run, open_run
from clip_rd_edge.distillation.setup import RunSetup, lack_of_pairs, load_setup, provenance
from clip_rd_edge.distillation.speed import with_measured_precision
from clip_rd_edge.distillation.student import frozen_at_random, load_student, with_shape_of
from clip_rd_edge.errors import in_one_line
from clip_rd_edge.exporting.calibration import choose_pairs, keep_pairs
from clip_rd_edge.models.clip import float32_on_cpu
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.structs import to_yaml
from clip_rd_edge.utils.text import SILENT, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.data.tasks import Task


@host_generators_kept()
@float32_on_cpu()
def run_distillation(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool,
    accept_changes: bool = False,
    reporter: Reporter = SILENT,
    evaluate: Evaluate | None = None,
    tasks: Sequence[Task] = (),
) -> Path:
    """Train the student that `config` describes in `folder`; return the student's folder.

    Args:
        resume: continue from the newest checkpoint in `folder`, if there is one; a finished run is left unchanged.
        accept_changes: resume also if data or teacher are no longer those that the run began with.
        reporter: receives the progress of indexing, storing and training, and messages about what was decided.
        evaluate: called with the student every `config.evaluate_every` steps and at the end, in all processes with an
            encoder that they share. Its scores are added to the metrics, and the best student is saved as `RUN/best`.
        tasks: those of `evaluate`; a tracker shows the student's predictions about images of the first.
    """
    with open_run(config, folder, resume=resume, reporter=reporter) as run:
        run.evaluate, processes = evaluate, run.processes
        is_finished = processes.from_main((run.student / WEIGHTS_FILE).is_file())
        if is_finished and run.state != "moved":
            run.reporter.note(f"{folder} is already finished")
            return run.student
        is_begun = processes.from_main(bool(list_checkpoints(folder)))
        start = _without_initial_weights(run.config) if is_begun else run.config
        setup = load_setup(start, name=folder.resolve().name, processes=processes, reporter=run.reporter)
        setup = dataclasses.replace(setup, tasks=tasks)
        run.config = with_shape_of(run.config, setup.student)
        if run.state == "new":
            _begin(run, setup)
        inputs = common_inputs(run.config, setup, processes)
        processes.on_main(
            lambda: check_inputs(
                folder, inputs, run.config, setup, accept_changes=accept_changes, reporter=run.reporter
            )
        )
        processes.on_main(lambda: record_locations(folder, run.config))
        if is_finished:
            run.reporter.note(f"{folder} is already finished")
            return run.student
        teacher, dataset = prepare_teacher(run.config, setup, processes, run.reporter)
        state = TrainingState(run, setup, teacher, dataset, bank_source=teachers_digest(inputs))
        processes.on_main(lambda: record_inputs(folder, inputs))
        Training(run, setup, state, dataset)()
        if processes.is_main:
            _save_student(run, setup, state)
        return run.student


def _without_initial_weights(config: RunConfig) -> RunConfig:
    """Return the configuration without weights that a checkpoint replaces, and that cost time, or are gone."""
    initial = {"pretrained_image": config.pretrained_image, "pretrained_text": config.pretrained_text}
    # A teacher's also shape the student.
    return msgspec.structs.replace(config, **{name: None for name in initial if initial[name] != TEACHER})


def _begin(run: Run, setup: RunSetup) -> None:
    """Report what a new run will do, and record its configuration, with the precisions that it measures first."""
    config, size = run.config, run.config.recipe.batch_size
    batch = f"{size} images and {size} captions" if setup.pairs.counts.is_mixed else f"{size} pairs"
    run.reporter.note(
        f"{setup.pairs.counts}, {setup.total_steps(config):,} steps of "
        f"{f'{size} texts' if is_texts_alone(config) else batch}, learning rate {config.recipe.learning_rate:g}"
    )
    for sentence in (*lack_of_pairs(config, setup.pairs), *frozen_at_random(config)):
        run.reporter.note(sentence)
    run.config = with_measured_precision(config, setup, run.processes, run.reporter)
    if run.processes.is_main:
        write_text(run.folder / RUN_CONFIG_FILE, to_yaml(run.config))


def _save_student(run: Run, setup: RunSetup, state: TrainingState) -> None:
    """Save the student of a run with its provenance, and draw the run's plots."""
    config, student = run.config, state.student
    student.model.to("cpu")
    evaluation = last_evaluation(run.folder, step=state.steps)
    if config.tuned_share < 1:
        from clip_rd_edge.models.edit import interpolate_clip

        student = interpolate_clip(load_student(config), student, share=config.tuned_share)
        if run.evaluate:  # the run has evaluated the trained weights alone
            evaluation = run.evaluate(state.encoder_of(student))
            scores = ", ".join(f"{name} {value:.1%}" for name, value in evaluation.items())
            run.reporter.note(f"the student with a share of {config.tuned_share:g} of the trained weights: {scores}")
    with named_divergence(run.folder):  # which an encoder reports
        encoder = state.encoder_of(student)
        encoder.encode_images([Image.new("RGB", (1, 1))])
        encoder.encode_texts([""])
    setup = dataclasses.replace(setup, student=student)
    if setup.pairs.counts.has_images:
        with _forgiven(run, "no images are kept to calibrate INT8 with"):
            keep_pairs(
                run.folder, choose_pairs(setup.pairs, preprocessing=student.preprocessing, max_bad=config.max_bad)
            )
    record = {**provenance(config, setup, steps=state.steps), "evaluation": evaluation}
    save_clip(run.student, student, provenance=record)
    with _forgiven(run, f"the plots in {run.folder / REPORT_FOLDER} could not be drawn"):
        plot_run(run.folder, run.folder / REPORT_FOLDER)


@contextmanager
def _forgiven(run: Run, what: str) -> Iterator[None]:
    """Within the block, an error is reported: a trained student must not be lost by what only comes with it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - also images that cannot be read now
        run.reporter.note(f"{what}: {in_one_line(error)}")
