"""A complete run: from a configuration to a folder with a student that open_clip loads.

config.yaml      the resolved configuration
inputs.json      fingerprints of data and teacher
metrics.jsonl    one line per logged step
checkpoints/     the complete state, for --resume
student/         the trained model, an open_clip local-dir; a run without it is unfinished
best/            the best student by the run's own evaluations, if there were any
report/          plots, drawn once the student is saved
tensorboard/     the same metrics for TensorBoard, if requested; see also trackers.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import torch

from clip_rd_edge.contract.checkpoint import STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.contract.run_folder import RUN_CONFIG_FILE
from clip_rd_edge.data.unpaired import MixedSamples, describe_counts
from clip_rd_edge.distillation.batches.loader import StepSampler, ViewDataset, lost_worker, step_loader
from clip_rd_edge.distillation.build import (
    RunSetup,
    histogram_embeddings,
    lack_of_pairs,
    load_setup,
    make_dataset,
    provenance,
)
from clip_rd_edge.distillation.checkpoint import (
    CHECKPOINTS_FOLDER,
    host_generators_kept,
    list_checkpoints,
    no_trace_of_failure,
)
from clip_rd_edge.distillation.config import (
    CHANGEABLE_ON_RESUME,
    LOCATIONS,
    RunConfig,
    first_difference,
    is_texts_alone,
)
from clip_rd_edge.distillation.freezing import frozen_at_random, set_training_mode
from clip_rd_edge.distillation.inputs import (
    changed_inputs,
    check_inputs,
    common_inputs,
    inputs_of,
    newer_inputs,
    record_inputs,
    record_locations,
    sources_known_by_content,
    teachers_digest,
)
from clip_rd_edge.distillation.monitoring.metrics import last_evaluation
from clip_rd_edge.distillation.monitoring.plots import plot_run
from clip_rd_edge.distillation.monitoring.trackers import require_tracker
from clip_rd_edge.distillation.optim import named_divergence
from clip_rd_edge.distillation.processes.distributed import Processes, join_processes
from clip_rd_edge.distillation.processes.roll_call import is_lost_connection, lost_error
from clip_rd_edge.distillation.processes.signals import Stopped, StopRequest, stop_on_signals
from clip_rd_edge.distillation.step import AUTOCAST, TrainingStep, choose_precision, choose_teacher_precision
from clip_rd_edge.distillation.student import open_shape, with_default_shape, with_shape_of
from clip_rd_edge.distillation.teachers.bank import make_bank, require_same_kind
from clip_rd_edge.distillation.teachers.choosing import ChoosingTeacher, texts_to_choose_from
from clip_rd_edge.distillation.teachers.embedding_store import CacheManifest, cache_folders, manifests, open_caches
from clip_rd_edge.distillation.teachers.store_build import build_cache, shard_maker
from clip_rd_edge.distillation.teachers.teacher import (
    BatchTeacher,
    CachedTeacher,
    LiveTeacher,
    Teacher,
    refuse_idle_teacher,
)
from clip_rd_edge.distillation.train import caption_batch, encoder_of, prepare, step_settings, total_steps, train
from clip_rd_edge.errors import (
    ClipRdEdgeError,
    ConfigError,
    DiskFullError,
    InterruptedRunError,
    UsageError,
    in_one_line,
)
from clip_rd_edge.models.clip import to_device
from clip_rd_edge.models.defaults import float32_on_cpu
from clip_rd_edge.models.interpolate import interpolate_clip
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.student import TEACHER
from clip_rd_edge.utils.files import disk_full_error, write_text
from clip_rd_edge.utils.folders import remove_leftovers
from clip_rd_edge.utils.lock import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, read_yaml, to_yaml

REPORT_FOLDER = "report"


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
    tasks: Mapping[str, str] | None = None,
) -> Path:
    """Train the student that `config` describes in the folder `run`; return the student's folder.

    Args:
        resume: continue from the newest checkpoint in `run`, if there is one; a finished run is left unchanged.
        accept_changes: resume also if data or teacher are no longer those that the run began with.
        reporter: receives the progress of indexing, caching and training, and messages about what was decided.
        evaluate: see `train.train`.
        tasks: the fingerprint of each task of `evaluate` by its name, which those of before may share.

    Raises:
        UsageError: `run` is not empty and `resume` is false, holds a run with another configuration, data or teacher,
            or is being written by another process, or is removed meanwhile; or the teacher cache was made with other
            settings.
        InputError, ConfigError: data, teacher or student cannot be used.
        InterruptedRunError: a signal requested a stop; the state was saved.
        DivergedRunError: the loss, a weight or an embedding is not finite; the last good checkpoint is kept.
        DiskFullError: there is no space left on the disk; the checkpoints that are complete are kept.
        LostProcessError: another process of the run, or one that loads its data, was killed.
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
                        tasks=tasks or {},
                    )
        except Stopped:
            where = f"saved in {run}" if list_checkpoints(run) else "before the first step"
            raise InterruptedRunError(
                f"Stopped by {request.signal_name}; {where}.", hint="resume with the same command and --resume"
            ) from None
        except Exception as error:  # torch and safetensors hide the type of what the system reports
            if killed := lost_worker(error):
                raise killed from error
            if full := disk_full_error(error):
                raise _without_space(run, full) from error
            if _is_within(error, run) and not run.exists():
                raise UsageError(
                    f"The folder of the run, {run}, was moved or removed while it was being written.",
                    hint="move it back and resume with the same command and --resume, or begin again without",
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
        hint="free some space, then resume with the same command and --resume",
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
    tasks: Mapping[str, str],
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
        change = processes.on_main(lambda: _change_since(config, run))
        reporter.say(f"{run} is already finished{change}")
        return run / STUDENT_FOLDER
    start = config
    if processes.from_main(bool(list_checkpoints(run))):
        start = _without_initial_weights(config)
    setup = load_setup(start, name=run.resolve().name, processes=processes, reporter=reporter)
    setup = dataclasses.replace(setup, tasks=tasks)
    config = with_shape_of(config, setup.student)
    steps = total_steps(config, setup.pairs)
    if state == "new":
        reporter.say(
            f"{describe_counts(setup.pairs)}, {steps:,} steps of {_batch_words(config, setup)}, "
            f"learning rate {config.recipe.learning_rate:g}"
        )
        for sentence in (*lack_of_pairs(config, setup.pairs), *frozen_at_random(config)):
            reporter.say(sentence)
        config = _with_measured_precision(config, setup, processes, reporter)
        if processes.is_main:
            write_text(run / RUN_CONFIG_FILE, to_yaml(config))
    inputs = common_inputs(config, setup, processes)
    processes.on_main(
        lambda: check_inputs(run, inputs, config, setup, accept_changes=accept_changes, reporter=reporter)
    )
    processes.on_main(lambda: record_locations(run, config))
    if is_finished:
        reporter.say(f"{run} is already finished")
        return run / STUDENT_FOLDER
    teacher, dataset = _prepare_teacher(config, setup, processes, reporter)
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
    student = train(
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
        student.model.to("cpu")
        evaluation = last_evaluation(run, step=steps)
        if config.tuned_share < 1:
            student = interpolate_clip(load_clip(config.student), student, share=config.tuned_share)
            if evaluate:  # the run has evaluated the trained weights alone
                evaluation = evaluate(encoder_of(student, trained.quantization))
                scores = ", ".join(f"{name} {value:.1%}" for name, value in evaluation.items())
                reporter.say(f"the student with a share of {config.tuned_share:g} of the trained weights: {scores}")
        setup = dataclasses.replace(setup, student=student)
        with named_divergence(run):
            embeddings = histogram_embeddings(config, setup)
        record = {**provenance(config, setup, steps=steps), "evaluation": evaluation}
        save_clip(run / STUDENT_FOLDER, student, provenance=record)
        try:
            plot_run(run, run / REPORT_FOLDER, embeddings)
        except Exception as error:  # noqa: BLE001 - the student is there; a run must not end by its plots
            reporter.say(f"the plots in {run / REPORT_FOLDER} could not be drawn: {in_one_line(error)}")
    return run / STUDENT_FOLDER


def _without_initial_weights(config: RunConfig) -> RunConfig:
    """Return the configuration without weights that a checkpoint replaces, and that cost time, or are gone."""
    initial = {"pretrained_image": config.pretrained_image, "pretrained_text": config.pretrained_text}
    # A teacher's also shape the student.
    return msgspec.structs.replace(config, **{name: None for name in initial if initial[name] != TEACHER})


def _change_since(config: RunConfig, run: Path) -> str:
    """Return in words what changed in the inputs of a finished run; empty if nothing did.

    The content is compared where a date is newer, as it also is in a copy.
    """
    newer = newer_inputs(config, run / STUDENT_FOLDER)
    if not newer:
        return ""
    try:
        setup = load_setup(_without_initial_weights(config), name=run.resolve().name, processes=Processes())
        change = changed_inputs(run, inputs_of(config, setup), config, setup)
    except ClipRdEdgeError:  # what is there now cannot be used for this run
        change = f"{' and '.join(newer)} changed since then"
    return f"; {change}, which a new run with another -o would use" if change else ""


def _batch_words(config: RunConfig, setup: RunSetup) -> str:
    size = config.recipe.batch_size
    if is_texts_alone(config):
        return f"{size} texts"
    return f"{size} images and {size} captions" if isinstance(setup.pairs, MixedSamples) else f"{size} pairs"


def check_folder(
    config: RunConfig, run: Path, *, resume: bool, reporter: Reporter = SILENT
) -> tuple[RunConfig, Literal["new", "same", "moved"]]:
    """Return the configuration to run and what the run is; a resumed run keeps its measured precision.

    Of a run that was `moved`, data or models have paths that may lead elsewhere: their content has to be compared.

    Raises:
        UsageError: the folder, which exists, holds a run with another configuration, or something else.
        ConfigError: a file of its run is damaged.
    """
    config = _with_precision_of_store(config)
    if config.teacher_cache and not config.views and not is_texts_alone(config):  # which takes no cache at all
        raise UsageError(
            "A teacher cache holds a fixed number of views of each pair, but no number was given.",
            hint="add --views 8, for example: eight crops of each image, over which the epochs cycle",
        )
    path = run / RUN_CONFIG_FILE
    if not any(path.name != LOCK_FILE for path in run.iterdir()):
        return config, "new"
    if not resume:
        raise UsageError(
            f"The output {run} already exists and is not empty.",
            hint="choose another -o, or continue that run with --resume",
        )
    if not path.is_file():
        # What is left of a run that was killed at its start is hidden.
        if strangers := sorted(own.name for own in run.iterdir() if not own.name.startswith(".")):
            raise UsageError(
                f"There is no run in {run} to resume: it has no {RUN_CONFIG_FILE}, but {strangers[0]}.",
                hint="choose another -o: a run would replace files in that folder",
            )
        return config, "new"
    old = read_yaml(path, RunConfig)
    if config.recipe.precision == "auto":
        config = _with_precision(config, student=old.recipe.precision)
    if config.teacher_precision == "auto":
        config = _with_precision(config, teacher=old.teacher_precision)
    sources = sources_known_by_content(run, old, config)
    decided = open_shape(config)  # by a model
    if difference := first_difference(old, config, ignored=CHANGEABLE_ON_RESUME | sources | decided):
        raise UsageError(
            f"{run} holds a run with another configuration: {difference}.",
            hint="use the same options as before, or choose another -o",
        )
    is_finished = (run / STUDENT_FOLDER / WEIGHTS_FILE).is_file()
    if config.recipe.objective.bank and list_checkpoints(run) and not is_finished:  # before a cache is built
        require_same_kind(began_stored=old.teacher_cache is not None, is_stored=config.teacher_cache is not None)
    if config.processes != old.processes:
        reporter.say(
            f"the run started with {old.processes} processes and continues with {config.processes}: batches and loss "
            "stay the same, but batch norms and dropout see other parts of a batch"
        )
    return config, "moved" if first_difference(old, config, ignored=CHANGEABLE_ON_RESUME | decided) else "same"


def _with_precision_of_store(config: RunConfig) -> RunConfig:
    """Return the configuration with a precision `auto` of the teacher replaced by that of its store, if it has one."""
    if config.teacher_cache and config.teacher_precision == "auto":
        for path in manifests(Path(config.teacher_cache)):
            with suppress(ConfigError):  # reported when the store is opened
                return _with_precision(config, teacher=read_json(path, CacheManifest).precision)
    return config


def _require_same_options(main: RunConfig, config: RunConfig) -> None:
    difference = first_difference(main, config, ignored={*LOCATIONS, "workers"})
    if len(main.tasks) != len(config.tasks):
        difference = f"tasks: {len(main.tasks)} → {len(config.tasks)}"
    if difference:
        raise UsageError(
            f"The processes of the run have different options: {difference}.", hint="start all with the same ones"
        )


def _prepare_teacher(
    config: RunConfig, setup: RunSetup, processes: Processes, reporter: Reporter
) -> tuple[BatchTeacher | None, ViewDataset]:
    """Return the teacher, live or from a cache that is built first, and the data set that provides its inputs."""
    if setup.ensemble is None:
        return None, make_dataset(config, setup)
    if setup.stored is not None:
        return CachedTeacher(setup.ensemble, processes.device), make_dataset(config, setup)
    teachers = _make_teachers(config, setup, processes.device, AUTOCAST[config.teacher_precision])
    live = LiveTeacher(teachers)
    teacher: BatchTeacher = live
    dataset = make_dataset(config, setup, with_teacher_pixels=config.teacher_cache is None)
    if config.teacher_cache is not None:
        with processes.together():
            folders = cache_folders(Path(config.teacher_cache), setup.teachers)
        for folder, one in zip(folders, teachers, strict=True):
            build_cache(folder, shard_maker(config, one, setup.pairs, dataset.crops), processes, reporter=reporter)
        dataset.cache = open_caches(folders)
        teacher = CachedTeacher(setup.ensemble, processes.device)
    with processes.together():
        texts = texts_to_choose_from(config, setup.pairs)
    if texts:
        reporter.say(f"the teacher chooses among {len(texts):,} texts for each image without a caption")
        teacher = ChoosingTeacher(teacher, texts, live.embed_captions, reporter=reporter)
    if config.teacher_cache is not None:
        for one in teachers:
            one.clip.model.to("cpu")
    return teacher, dataset


def _make_teachers(
    config: RunConfig, setup: RunSetup, device: torch.device, autocast: torch.dtype | None
) -> list[Teacher]:
    captions = caption_batch(config, device)
    return [Teacher(clip, device, autocast=autocast, caption_batch=captions) for clip in setup.teachers]


def _with_measured_precision(config: RunConfig, setup: RunSetup, processes: Processes, reporter: Reporter) -> RunConfig:
    """Return the configuration with each precision `auto` replaced by the faster one on this machine."""
    single = Processes(device=processes.device)
    to_device(setup.student.model, single.device)
    set_training_mode(setup.student, config)
    local_size = config.recipe.batch_size // processes.world_size
    sampler = StepSampler(setup.pairs.groups, local_size, seed=config.seed, start=0, stop=1)
    with processes.together():
        batch = next(iter(step_loader(make_dataset(config, setup), sampler, workers=0)))

    # New ones each time, so that no cached caption embeddings remain.
    make_teachers = partial(_make_teachers, config, setup, single.device)
    if setup.teachers:
        precision, reason = choose_teacher_precision(config.teacher_precision, make_teachers, batch, single.device)
        config = _with_precision(config, teacher=_common_precision(precision, processes))
        reporter.say(f"precision of the teacher{'s' if len(setup.teachers) > 1 else ''}: {reason}")

    def make_step(autocast: torch.dtype | None) -> TrainingStep:
        teacher: BatchTeacher | None = None
        if setup.ensemble is not None and setup.stored is not None:
            teacher = CachedTeacher(setup.ensemble, single.device)
        elif setup.teachers:
            teacher = LiveTeacher(make_teachers(AUTOCAST[config.teacher_precision]))
        objective = setup.objective.to(single.device)
        settings = step_settings(config, autocast, single.device)
        # An empty bank serves: its products have the same precision in every case.
        bank = make_bank(config, len(setup.pairs), None, setup.ensemble, single.device)
        return TrainingStep(setup.student, teacher, objective, single, settings, bank=bank)

    precision, reason = choose_precision(config.recipe.precision, make_step, batch, single.device)
    reporter.say(f"precision: {reason}")
    return _with_precision(config, student=_common_precision(precision, processes))


def _common_precision(precision: str, processes: Processes) -> str:
    """Return the precision that all processes use: the most robust one that any of them chose."""
    return next(name for name in ("fp32", "bf16", "fp16") if processes.any(precision == name))


def _with_precision(config: RunConfig, *, student: str | None = None, teacher: str | None = None) -> RunConfig:
    if student is not None:
        config = msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, precision=student))
    return config if teacher is None else msgspec.structs.replace(config, teacher_precision=teacher)
