"""The flow of `distill`, from a configuration to a folder whose `student/` open_clip loads; and what guards a run.

config.yaml      the resolved configuration
inputs.json      fingerprints of data and teacher
metrics.jsonl    one line per logged step
checkpoints/     the complete state, for --resume
calibration.npz  images and captions of the data, on which an export in INT8 is calibrated
student/         the trained model, an open_clip local-dir; a run without it is unfinished
data/            what was held back from the data, if that was asked for
best/            the best student by the run's own evaluations, if there were any
report/          plots, drawn at each evaluation and once the student is saved
tensorboard/     the same metrics for TensorBoard, if requested; see also trackers.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from PIL import Image

from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.bundle.runs import DATA_FOLDER, REPORT_FOLDER, RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.distillation.checkpoint import BEST_FOLDER, CHECKPOINTS_FOLDER, list_checkpoints, no_trace_of_failure
from clip_rd_edge.distillation.config import (
    CHANGEABLE_ON_RESUME,
    LOCATIONS,
    RecordedConfig,
    RunConfig,
    first_difference,
    is_texts_alone,
)
from clip_rd_edge.distillation.embed import prepare_teacher
from clip_rd_edge.distillation.loader import lost_worker
from clip_rd_edge.distillation.loop import Training, TrainingState
from clip_rd_edge.distillation.metrics import last_evaluation, plot_run
from clip_rd_edge.distillation.optimizer import named_divergence
from clip_rd_edge.distillation.processes import (
    Processes,
    Stopped,
    StopRequest,
    join_processes,
    lost_process,
    stop_on_signals,
)
from clip_rd_edge.distillation.setup import (
    RunSetup,
    check_inputs,
    common_inputs,
    lack_of_pairs,
    load_setup,
    provenance,
    record_inputs,
    record_locations,
    sources_known_by_content,
    teachers_digest,
)
from clip_rd_edge.distillation.speed import with_measured_precision, with_precision
from clip_rd_edge.distillation.store import stored_precision
from clip_rd_edge.distillation.student import load_student, open_shape, with_default_shape, with_shape_of
from clip_rd_edge.distillation.teacher import refuse_idle_teacher
from clip_rd_edge.errors import ClipRdEdgeError, DiskFullError, InterruptedRunError, UsageError, in_one_line
from clip_rd_edge.exporting.calibration import choose_pairs, keep_pairs
from clip_rd_edge.models.clip import float32_on_cpu
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.utils.files import disk_full_error, require_utf8_path, write_text
from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer, remove_leftovers
from clip_rd_edge.utils.structs import read_yaml, to_yaml
from clip_rd_edge.utils.text import SILENT, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.data.tasks import Task

Evaluate = Callable[[Encoder], dict[str, float]]
_RESUME = "run the same command again, distill with {resume}"


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
        evaluate: called with the student every `config.evaluate_every` steps and at the end, in the main process. Its
            scores are added to the metrics, and the best student is saved as `RUN/best`.
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
            lambda: check_inputs(folder, inputs, setup, accept_changes=accept_changes, reporter=run.reporter)
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
    for sentence in lack_of_pairs(config, setup.pairs):
        run.reporter.note(sentence)
    run.config = with_measured_precision(config, setup, run.processes, run.reporter)
    if run.processes.is_main:
        write_text(run.folder / RUN_CONFIG_FILE, to_yaml(run.config))


def _save_student(run: Run, setup: RunSetup, state: TrainingState) -> None:
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


@dataclass
class Run:
    """A run that this process takes part in.

    Attributes:
        config: resolved; with measured precisions, once the run has begun.
        state: `new`; `same`, which was begun with these options; or `moved`, with places that may lead elsewhere, so
            that the content has to be compared.
        stop: whether a signal has requested a stop.
        reporter: silent in all processes but the main one.
        evaluate: returns the scores of a student by the name of the task; None without tasks.
    """

    config: RunConfig
    folder: Path
    state: Literal["new", "same", "moved"]
    processes: Processes
    stop: StopRequest
    reporter: Reporter
    evaluate: Evaluate | None = None

    @property
    def student(self) -> Path:
        return self.folder / STUDENT_FOLDER

    def interrupted(self, done: int, steps: int) -> InterruptedRunError:
        """Return the error for a stopped run, whose state was saved after `done` steps."""
        where = f"after step {done:,} of {steps:,}; saved in {self.folder}"
        return InterruptedRunError(
            f"Stopped by {self.stop.signal_name or 'a signal'} "
            f"{where if done else f'before the first of {steps:,} steps'}.",
            hint=_RESUME,
        )


@contextmanager
def open_run(config: RunConfig, folder: Path, *, resume: bool, reporter: Reporter) -> Iterator[Run]:
    """Join the processes of a run, lock its folder, and decide what the run is; what ends it becomes a sentence."""
    require_utf8_path(folder)  # now, and not when the student is saved
    with (
        stop_on_signals() as stop,
        _named_failures(folder, stop),
        join_processes() as processes,
        _named_losses(processes, stop),
    ):
        processes.agree(None)  # one that failed before it joined says so here
        with _sole_writer(folder, processes), no_trace_of_failure(folder, processes):
            shown = reporter if processes.is_main else SILENT
            if config.report_to:
                from clip_rd_edge.distillation.trackers import require_tracker

                processes.on_main(partial(require_tracker, config.report_to))
            config = with_default_shape(msgspec.structs.replace(config, processes=processes.world_size))
            of_main = processes.from_main(config)
            with processes.together():
                _require_same_options(of_main, config)
                refuse_idle_teacher(config)
            # Only the main process needs to see the run's folder: machines need not share their files.
            of_main, state = processes.on_main(lambda: check_folder(config, folder, resume=resume, reporter=shown))
            config = msgspec.structs.replace(of_main, **{name: getattr(config, name) for name in LOCATIONS})
            yield Run(config, folder, state, processes, stop, shown)


@contextmanager
def _named_failures(folder: Path, stop: StopRequest) -> Iterator[None]:
    """Within the block, what ends a run from outside becomes a sentence: a signal, the system, a full disk."""
    try:
        yield
    except Stopped:
        where = f"saved in {folder}" if list_checkpoints(folder) else "before the first step"
        raise InterruptedRunError(f"Stopped by {stop.signal_name}; {where}.", hint=_RESUME) from None
    except Exception as error:  # torch and safetensors hide the type of what the system reports
        if killed := lost_worker(error):
            raise killed from error
        if full := disk_full_error(error):
            checkpoints = list_checkpoints(folder)
            kept = f"step {checkpoints[-1].name.removeprefix('step-')}" if checkpoints else "the beginning"
            raise DiskFullError(
                f"{str(full).partition(';')[0]}; the run {folder} goes on from {kept}.",
                hint=f"free some space, then {_RESUME}",
            ) from error
        raise


@contextmanager
def _named_losses(processes: Processes, stop: StopRequest) -> Iterator[None]:
    """Within the block, a message that fails because another process has ended becomes an error that names it."""
    try:
        yield
    except (ClipRdEdgeError, RuntimeError) as error:
        if processes.world_size > 1:
            stop.obey_no_more()  # the launcher signals the others as soon as one of those that fail has ended
        if isinstance(error, RuntimeError) and (lost := lost_process(error, processes)):
            raise lost from error
        raise


@contextmanager
def _sole_writer(folder: Path, processes: Processes) -> Iterator[None]:
    """Lock the run's folder, for all processes of the run together, and remove what a killed one left unfinished."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(exclusive_writer(folder))
            remove_leftovers(folder, of=(STUDENT_FOLDER, BEST_FOLDER))
            remove_leftovers(folder / CHECKPOINTS_FOLDER)

        processes.on_main(lock)
        yield


def check_folder(
    config: RunConfig, folder: Path, *, resume: bool, reporter: Reporter = SILENT
) -> tuple[RunConfig, Literal["new", "same", "moved"]]:
    """Return the configuration to run, and what the run is, see `Run`; a resumed run keeps its measured precision."""
    if config.store and config.teacher_precision == "auto":
        config = with_precision(config, teacher=stored_precision(Path(config.store)))
    if config.store and not config.views and not is_texts_alone(config):  # which takes no store at all
        raise UsageError(
            "A store of the teacher holds a fixed number of views of each pair, but no number was given.",
            hint="add {views} 8, for example: eight crops of each image, over which the epochs cycle",
            option="views",
        )
    path = folder / RUN_CONFIG_FILE
    if not any(path.name not in (LOCK_FILE, DATA_FOLDER) for path in folder.iterdir()):
        return config, "new"
    # What is left of a run that was killed at its start is hidden.
    others = (own.name for own in folder.iterdir() if own.name != DATA_FOLDER)
    has_strangers = not path.is_file() and any(not name.startswith(".") for name in others)
    if not resume or has_strangers:
        raise UsageError(
            f"The output {folder} already exists and is not empty.",
            hint="choose another {output}, or continue the run in it, if there is one, with {resume}",
            option="output",
        )
    if not path.is_file():
        return config, "new"
    old = read_yaml(path, RecordedConfig)
    config = with_precision(
        config,
        student=old.recipe.precision if config.recipe.precision == "auto" else None,
        teacher=old.teacher_precision if config.teacher_precision == "auto" else None,
    )
    decided = open_shape(config)  # by a model
    known = CHANGEABLE_ON_RESUME | decided | sources_known_by_content(folder, config)
    if difference := first_difference(old, config, ignored=known):
        raise UsageError(
            f"{folder} holds a run with another configuration: {difference}.",
            hint="use the same options as before, or choose another {output}",
        )
    is_begun = list_checkpoints(folder) and not (folder / STUDENT_FOLDER / WEIGHTS_FILE).is_file()
    if config.recipe.objective.needing("bank") and is_begun and (old.store is None) is not (config.store is None):
        raise UsageError(  # before a store is built
            f"The run began with{'out' if old.store is None else ''} a teacher's store, which its bank is read from.",
            hint="go on with {store} and {views} as before, or start a new run",
            option="store",
        )
    return config, "moved" if first_difference(old, config, ignored=CHANGEABLE_ON_RESUME | decided) else "same"


def _require_same_options(of_main: RunConfig, config: RunConfig) -> None:
    difference = first_difference(of_main, config, ignored={*LOCATIONS, "workers"})
    if len(of_main.tasks) != len(config.tasks):
        difference = f"tasks: {len(of_main.tasks)} → {len(config.tasks)}"
    if difference:
        raise UsageError(
            f"The processes of the run have different options: {difference}.", hint="start all with the same ones"
        )
