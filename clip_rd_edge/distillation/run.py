"""A run: its configuration and its folder, who takes part in it, and what guards it while it lasts.

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

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.bundle.runs import DATA_FOLDER, RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.distillation.checkpoint import CHECKPOINTS_FOLDER, list_checkpoints, no_trace_of_failure
from clip_rd_edge.distillation.config import (
    CHANGEABLE_ON_RESUME,
    LOCATIONS,
    RecordedConfig,
    RunConfig,
    first_difference,
    is_texts_alone,
)
from clip_rd_edge.distillation.inputs import sources_known_by_content
from clip_rd_edge.distillation.loader import lost_worker
from clip_rd_edge.distillation.processes import (
    Processes,
    Stopped,
    StopRequest,
    join_processes,
    lost_process,
    stop_on_signals,
)
from clip_rd_edge.distillation.speed import with_precision
from clip_rd_edge.distillation.store import stored_precision
from clip_rd_edge.distillation.student import open_shape, with_default_shape
from clip_rd_edge.distillation.teacher import refuse_idle_teacher
from clip_rd_edge.errors import ClipRdEdgeError, DiskFullError, InterruptedRunError, UsageError
from clip_rd_edge.utils.files import disk_full_error
from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer, remove_leftovers
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.structs import read_yaml
from clip_rd_edge.utils.text import SILENT, Reporter

Evaluate = Callable[[Encoder], dict[str, float]]
_RESUME = "resume with the same command and {resume}"


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
        """The folder of the trained student."""
        return self.folder / STUDENT_FOLDER

    def stopped_at_once(self) -> AbstractContextManager[None]:
        """Within the block, a signal raises `Stopped` in a single process.

        Several stop together, after a step or a round of batches: elsewhere they cannot agree.
        """
        return self.stop.at_once() if self.processes.world_size == 1 else nullcontext()

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
    with (
        stop_on_signals() as stop,
        _named_failures(folder, stop),
        join_processes() as processes,
        _named_losses(processes, stop),
    ):
        processes.agree(None)  # one that failed before it joined says so here
        with _sole_writer(folder, processes), no_trace_of_failure(folder, processes):
            shown = reporter if processes.is_main else SILENT
            processes.on_main(lambda: _require_tracker(config))
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
    except ClipRdEdgeError:
        if processes.world_size > 1:
            stop.obey_no_more()  # the launcher signals the others as soon as one of those that fail has ended
        raise
    except RuntimeError as error:
        if lost := lost_process(error, processes):
            stop.obey_no_more()
            raise lost from error
        raise


@contextmanager
def _sole_writer(folder: Path, processes: Processes) -> Iterator[None]:
    """Lock the run's folder, for all processes of the run together, and remove what a killed one left unfinished."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(exclusive_writer(folder))
            remove_leftovers(folder)
            remove_leftovers(folder / CHECKPOINTS_FOLDER)

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


def check_folder(
    config: RunConfig, folder: Path, *, resume: bool, reporter: Reporter = SILENT
) -> tuple[RunConfig, Literal["new", "same", "moved"]]:
    """Return the configuration to run, and what the run is, see `Run`; a resumed run keeps its measured precision."""
    config = _with_precision_of_store(config)
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
    is_begun = list_checkpoints(folder) and not is_file(folder / STUDENT_FOLDER / WEIGHTS_FILE)
    if config.recipe.objective.needing("bank") and is_begun and (old.store is None) is not (config.store is None):
        raise UsageError(  # before a store is built
            f"The run began with{'out' if old.store is None else ''} a teacher's store, which its bank is read from.",
            hint="go on with {store} and {views} as before, or start a new run",
            option="store",
        )
    if config.processes != old.processes:
        reporter.note(
            f"the run started with {old.processes} processes and continues with {config.processes}: batches and loss "
            "stay the same, but batch norms and dropout see other parts of a batch"
        )
    return config, "moved" if first_difference(old, config, ignored=CHANGEABLE_ON_RESUME | decided) else "same"


def _with_precision_of_store(config: RunConfig) -> RunConfig:
    """Return the configuration with a precision `auto` of the teacher replaced by that of its store, if it has one."""
    if config.store and config.teacher_precision == "auto":
        return with_precision(config, teacher=stored_precision(Path(config.store)))
    return config


def _require_tracker(config: RunConfig) -> None:
    if config.report_to:
        from clip_rd_edge.distillation.trackers import require_tracker  # which most runs do without

        require_tracker(config.report_to)


def _require_same_options(of_main: RunConfig, config: RunConfig) -> None:
    difference = first_difference(of_main, config, ignored={*LOCATIONS, "workers"})
    if len(of_main.tasks) != len(config.tasks):
        difference = f"tasks: {len(of_main.tasks)} → {len(config.tasks)}"
    if difference:
        raise UsageError(
            f"The processes of the run have different options: {difference}.", hint="start all with the same ones"
        )
