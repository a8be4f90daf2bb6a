"""A complete run: from a configuration to a folder with a student that open_clip loads.

config.yaml      the resolved configuration
inputs.json      fingerprints of data and teacher
metrics.jsonl    one line per logged step
checkpoints/     the complete state, for --resume
calibration.npz  images and captions of the data, on which an export in INT8 is calibrated
student/         the trained model, an open_clip local-dir; a run without it is unfinished
best/            the best student by the run's own evaluations, if there were any
report/          plots, drawn at each evaluation and once the student is saved
tensorboard/     the same metrics for TensorBoard, if requested; see also trackers.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from PIL import Image

from clip_rd_edge.bundle.encoder import Embeddings, Encoder
from clip_rd_edge.bundle.runs import REPORT_FOLDER, RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.data.tasks import Task
from clip_rd_edge.distillation.checkpoint import (
    CHECKPOINTS_FOLDER,
    host_generators_kept,
    list_checkpoints,
    no_trace_of_failure,
)
from clip_rd_edge.distillation.config import (
    LOCATIONS,
    RunConfig,
    first_difference,
    is_texts_alone,
)
from clip_rd_edge.distillation.embed import prepare_teacher
from clip_rd_edge.distillation.inputs import (
    RunSetup,
    check_inputs,
    common_inputs,
    histogram_embeddings,
    lack_of_pairs,
    load_setup,
    provenance,
    record_inputs,
    record_locations,
    teachers_digest,
)
from clip_rd_edge.distillation.loader import lost_worker
from clip_rd_edge.distillation.loop import Trained, encoder_of, prepare, total_steps, train
from clip_rd_edge.distillation.metrics import last_evaluation, plot_run
from clip_rd_edge.distillation.optimizer import named_divergence
from clip_rd_edge.distillation.precision import with_measured_precision
from clip_rd_edge.distillation.processes import (
    Processes,
    Stopped,
    StopRequest,
    is_lost_connection,
    join_processes,
    lost_error,
    stop_on_signals,
)
from clip_rd_edge.distillation.resume import change_since, check_folder, without_initial_weights
from clip_rd_edge.distillation.student import frozen_at_random, load_student, with_default_shape, with_shape_of
from clip_rd_edge.distillation.teacher import refuse_idle_teacher
from clip_rd_edge.distillation.trackers import require_tracker
from clip_rd_edge.errors import (
    ClipRdEdgeError,
    DiskFullError,
    InterruptedRunError,
    UsageError,
    in_one_line,
)
from clip_rd_edge.exporting.calibration import choose_pairs, keep_pairs
from clip_rd_edge.models.clip import float32_on_cpu
from clip_rd_edge.models.edit import interpolate_clip
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.files import disk_full_error, write_text
from clip_rd_edge.utils.outputs import exclusive_writer, remove_leftovers
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import to_yaml


@host_generators_kept()
@float32_on_cpu()
def run_distillation(
    config: RunConfig,
    run: Path,
    *,
    resume: bool,
    accept_changes: bool = False,
    reporter: Reporter = SILENT,
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
    tasks: Sequence[Task] = (),
) -> Path:
    """Train the student that `config` describes in the folder `run`; return the student's folder.

    Args:
        resume: continue from the newest checkpoint in `run`, if there is one; a finished run is left unchanged.
        accept_changes: resume also if data or teacher are no longer those that the run began with.
        reporter: receives the progress of indexing, caching and training, and messages about what was decided.
        evaluate: see `train.train`.
        tasks: those of `evaluate`; a tracker shows the student's predictions about images of the first.
    """
    with stop_on_signals() as request:
        try:
            with join_processes() as processes, _named_losses(processes, request):
                processes.agree(None)  # one that failed before it joined says so here
                with _sole_writer(run, processes), no_trace_of_failure(run, processes):
                    return _run(
                        config,
                        run,
                        processes,
                        resume=resume,
                        accept_changes=accept_changes,
                        reporter=reporter if processes.is_main else SILENT,
                        evaluate=evaluate,
                        tasks=tasks,
                    )
        except Stopped:
            where = f"saved in {run}" if list_checkpoints(run) else "before the first step"
            raise InterruptedRunError(
                f"Stopped by {request.signal_name}; {where}.", hint="resume with the same command and {resume}"
            ) from None
        except Exception as error:  # torch and safetensors hide the type of what the system reports
            if killed := lost_worker(error):
                raise killed from error
            if full := disk_full_error(error):
                raise _without_space(run, full) from error
            if _is_within(error, run) and not run.exists():
                raise UsageError(
                    f"The folder of the run, {run}, was moved or removed while it was being written.",
                    hint="move it back and resume with the same command and {resume}, or begin again without",
                ) from error
            raise


def _is_within(error: Exception, run: Path) -> bool:
    """Return whether a file of the run was not found."""
    return isinstance(error, FileNotFoundError) and run in Path(str(error.filename)).parents


def _without_space(run: Path, error: DiskFullError) -> DiskFullError:
    """Return the error of a full disk, with what is left of the run."""
    checkpoints = list_checkpoints(run)
    kept = f"step {checkpoints[-1].name.removeprefix('step-')}" if checkpoints else "the beginning"
    where = str(error).partition(";")[0]
    return DiskFullError(
        f"{where}; the run {run} goes on from {kept}.",
        hint="free some space, then resume with the same command and {resume}",
    )


@contextmanager
def _named_losses(processes: Processes, request: StopRequest) -> Iterator[None]:
    """Within the block, a message that fails because another process has ended is a sentence that names it."""
    try:
        yield
    except ClipRdEdgeError:
        if processes.world_size > 1:
            request.obey_no_more()  # the launcher signals the others as soon as one of those that fail has ended
        raise
    except RuntimeError as error:
        if processes.world_size == 1 or not is_lost_connection(error):
            raise
        with request.deferred():  # the launcher signals all that are left
            lost = lost_error(error, processes.rank, processes.members)
        raise lost from error


@contextmanager
def _sole_writer(run: Path, processes: Processes) -> Iterator[None]:
    """Lock the run's folder, for all processes of the run together, and remove what a killed one left unfinished."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(exclusive_writer(run))
            remove_leftovers(run)
            remove_leftovers(run / CHECKPOINTS_FOLDER)

        processes.on_main(lock)
        yield


@contextmanager
def resumed_by_the_same_call() -> Iterator[None]:
    """Within the block, an interruption's hint is that of commands that always resume, without --resume."""
    try:
        yield
    except InterruptedRunError as error:
        raise InterruptedRunError(str(error), hint="run the same command again to resume") from error
    except DiskFullError as error:
        raise DiskFullError(str(error), hint="free some space, then run the same command again to resume") from error


def _run(
    config: RunConfig,
    run: Path,
    processes: Processes,
    *,
    resume: bool,
    accept_changes: bool,
    reporter: Reporter,
    evaluate: Callable[[Encoder], dict[str, float]] | None,
    tasks: Sequence[Task],
) -> Path:
    processes.on_main(lambda: require_tracker(config.report_to))
    config = with_default_shape(msgspec.structs.replace(config, processes=processes.world_size))
    main_config = processes.from_main(config)
    with processes.together():
        _require_same_options(main_config, config)
    # Only the main process needs to see the run's folder: machines need not share their files.
    main_config, state = processes.on_main(lambda: check_folder(config, run, resume=resume, reporter=reporter))
    config = msgspec.structs.replace(main_config, **{name: getattr(config, name) for name in LOCATIONS})
    if state == "new":  # older versions began such runs, which can be resumed
        with processes.together():
            refuse_idle_teacher(config)
    is_finished = processes.from_main((run / STUDENT_FOLDER / WEIGHTS_FILE).is_file())
    if is_finished and state != "moved":
        change = processes.on_main(lambda: change_since(config, run))
        reporter.note(f"{run} is already finished{change}")
        return run / STUDENT_FOLDER
    is_begun = processes.from_main(bool(list_checkpoints(run)))
    start = without_initial_weights(config) if is_begun else config
    setup = load_setup(start, name=run.resolve().name, processes=processes, reporter=reporter)
    setup = dataclasses.replace(setup, tasks=tasks)
    config = with_shape_of(config, setup.student)
    if state == "new":
        config = _begin(config, run, setup, processes, reporter)
    inputs = common_inputs(config, setup, processes)
    processes.on_main(
        lambda: check_inputs(run, inputs, config, setup, accept_changes=accept_changes, reporter=reporter)
    )
    processes.on_main(lambda: record_locations(run, config))
    if is_finished:
        reporter.note(f"{run} is already finished")
        return run / STUDENT_FOLDER
    teacher, dataset = prepare_teacher(config, setup, processes, reporter)
    trained = prepare(
        config,
        run,
        setup,
        teacher=teacher,
        dataset=dataset,
        processes=processes,
        reporter=reporter,
        bank_source=teachers_digest(inputs),
    )
    processes.on_main(lambda: record_inputs(run, inputs))
    train(
        config,
        run,
        setup,
        trained,
        dataset=dataset,
        processes=processes,
        reporter=reporter,
        evaluate=evaluate,
    )
    if processes.is_main:
        _save_student(config, run, setup, trained, evaluate=evaluate, reporter=reporter)
    return run / STUDENT_FOLDER


def _begin(config: RunConfig, run: Path, setup: RunSetup, processes: Processes, reporter: Reporter) -> RunConfig:
    """Say what a new run is going to do, and record its configuration, with the precisions that it measures first."""
    reporter.note(
        f"{setup.pairs.counts}, {total_steps(config, setup.pairs):,} steps of {_batch_words(config, setup)}, "
        f"learning rate {config.recipe.learning_rate:g}"
    )
    for sentence in (*lack_of_pairs(config, setup.pairs), *frozen_at_random(config)):
        reporter.note(sentence)
    config = with_measured_precision(config, setup, processes, reporter)
    if processes.is_main:
        write_text(run / RUN_CONFIG_FILE, to_yaml(config))
    return config


def _save_student(
    config: RunConfig,
    run: Path,
    setup: RunSetup,
    trained: Trained,
    *,
    evaluate: Callable[[Encoder], dict[str, float]] | None,
    reporter: Reporter,
) -> None:
    """Save the student of a run with its provenance, and draw the run's plots."""
    student = trained.student
    student.model.to("cpu")
    evaluation = last_evaluation(run, step=trained.steps)
    if config.tuned_share < 1:
        student = interpolate_clip(load_student(config), student, share=config.tuned_share)
        if evaluate:  # the run has evaluated the trained weights alone
            evaluation = evaluate(encoder_of(student, trained.quantization))
            scores = ", ".join(f"{name} {value:.1%}" for name, value in evaluation.items())
            reporter.note(f"the student with a share of {config.tuned_share:g} of the trained weights: {scores}")
    with named_divergence(run):  # which an encoder reports
        encoder = encoder_of(student, trained.quantization)
        encoder.encode_images([Image.new("RGB", (1, 1))])
        encoder.encode_texts([""])
    setup = dataclasses.replace(setup, student=student)
    if setup.pairs.counts.has_images:
        try:  # a run must not end by what only INT8 needs
            keep_pairs(run, choose_pairs(setup.pairs, preprocessing=student.preprocessing, max_bad=config.max_bad))
        except Exception as error:  # noqa: BLE001 - too few pairs, or images that cannot be read now
            reporter.note(f"no images are kept to calibrate INT8 with: {in_one_line(error)}")
    record = {**provenance(config, setup, steps=trained.steps), "evaluation": evaluation}
    save_clip(run / STUDENT_FOLDER, student, provenance=record)
    embeddings = dict[str, tuple[Embeddings, Embeddings]]()
    try:  # the student is there: a run must not end by its plots
        embeddings = histogram_embeddings(config, setup)
    except Exception as error:  # noqa: BLE001 - also images that cannot be read now
        reporter.note(f"the similarities of pairs could not be plotted: {in_one_line(error)}")
    try:
        plot_run(run, run / REPORT_FOLDER, embeddings)
    except Exception as error:  # noqa: BLE001
        reporter.note(f"the plots in {run / REPORT_FOLDER} could not be drawn: {in_one_line(error)}")


def _batch_words(config: RunConfig, setup: RunSetup) -> str:
    size = config.recipe.batch_size
    if is_texts_alone(config):
        return f"{size} texts"
    return f"{size} images and {size} captions" if setup.pairs.counts.is_mixed else f"{size} pairs"


def _require_same_options(main: RunConfig, config: RunConfig) -> None:
    difference = first_difference(main, config, ignored={*LOCATIONS, "workers"})
    if len(main.tasks) != len(config.tasks):
        difference = f"tasks: {len(main.tasks)} → {len(config.tasks)}"
    if difference:
        raise UsageError(
            f"The processes of the run have different options: {difference}.", hint="start all with the same ones"
        )
