"""What the folder of a run holds, and whether a run with these options, inputs and models goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.bundle.runs import RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.distillation.bank import require_same_kind
from clip_rd_edge.distillation.checkpoint import list_checkpoints
from clip_rd_edge.distillation.config import (
    CHANGEABLE_ON_RESUME,
    RecordedConfig,
    RunConfig,
    first_difference,
    is_texts_alone,
)
from clip_rd_edge.distillation.inputs import (
    changed_inputs,
    inputs_of,
    load_setup,
    newer_inputs,
    sources_known_by_content,
)
from clip_rd_edge.distillation.precision import with_precision
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.store import stored_precision
from clip_rd_edge.distillation.student import open_shape
from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.utils.outputs import LOCK_FILE
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_yaml


def check_folder(
    config: RunConfig, run: Path, *, resume: bool, reporter: Reporter = SILENT
) -> tuple[RunConfig, Literal["new", "same", "moved"]]:
    """Return the configuration to run and what the run is; a resumed run keeps its measured precision.

    Of a run that was `moved`, data or models have paths that may lead elsewhere: their content has to be compared.
    """
    config = _with_precision_of_store(config)
    if config.store and not config.views and not is_texts_alone(config):  # which takes no store at all
        raise UsageError(
            "A teacher's store holds a fixed number of views of each pair, but no number was given.",
            hint="add {views} 8, for example: eight crops of each image, over which the epochs cycle",
        )
    path = run / RUN_CONFIG_FILE
    if not any(path.name != LOCK_FILE for path in run.iterdir()):
        return config, "new"
    if not resume:
        raise UsageError(
            f"The output {run} already exists and is not empty.",
            hint="choose another {output}, or continue that run with {resume}",
        )
    if not path.is_file():
        # What is left of a run that was killed at its start is hidden.
        if strangers := sorted(own.name for own in run.iterdir() if not own.name.startswith(".")):
            raise UsageError(
                f"There is no run in {run} to resume: it has no {RUN_CONFIG_FILE}, but {strangers[0]}.",
                hint="choose another {output}: a run would replace files in that folder",
            )
        return config, "new"
    old = read_yaml(path, RecordedConfig)
    if config.recipe.precision == "auto":
        config = with_precision(config, student=old.recipe.precision)
    if config.teacher_precision == "auto":
        config = with_precision(config, teacher=old.teacher_precision)
    sources = sources_known_by_content(run, old, config)
    decided = open_shape(config)  # by a model
    if difference := first_difference(old, config, ignored=CHANGEABLE_ON_RESUME | sources | decided):
        raise UsageError(
            f"{run} holds a run with another configuration: {difference}.",
            hint="use the same options as before, or choose another {output}",
        )
    is_finished = (run / STUDENT_FOLDER / WEIGHTS_FILE).is_file()
    if config.recipe.objective.needing("bank") and list_checkpoints(run) and not is_finished:  # before a cache is built
        require_same_kind(began_stored=old.store is not None, is_stored=config.store is not None)
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


def without_initial_weights(config: RunConfig) -> RunConfig:
    """Return the configuration without weights that a checkpoint replaces, and that cost time, or are gone."""
    initial = {"pretrained_image": config.pretrained_image, "pretrained_text": config.pretrained_text}
    # A teacher's also shape the student.
    return msgspec.structs.replace(config, **{name: None for name in initial if initial[name] != TEACHER})


def change_since(config: RunConfig, run: Path) -> str:
    """Return in words what changed in the inputs of a finished run; empty if nothing did.

    The content is compared where a date is newer, as it also is in a copy.
    """
    newer = newer_inputs(config, run / STUDENT_FOLDER)
    if not newer:
        return ""
    try:
        setup = load_setup(without_initial_weights(config), name=run.resolve().name, processes=Processes())
        change = changed_inputs(run, inputs_of(config, setup), config, setup)
    except ClipRdEdgeError:  # what is there now cannot be used for this run
        change = f"{' and '.join(newer)} changed since then"
    return f"; {change}, which a new run with another -o would use" if change else ""
