"""What is settled before a run begins: its batch, its steps, and whether it trains on what it is evaluated on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from clip_rd_edge.bundle.runs import RUN_CONFIG_FILE
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.data.load import names_shards
from clip_rd_edge.data.look import overlap
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.data.tables import Table
from clip_rd_edge.data.tasks import Task
from clip_rd_edge.distillation.config import RecordedConfig, RunConfig
from clip_rd_edge.distillation.distill import run_distillation
from clip_rd_edge.distillation.setup import training_pairs
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_yaml

PROBE_STEPS = 12
_UNTIMED = 4  # of them, in which buffers are allocated


class Speed(NamedTuple):
    """How long a step takes, and how long it took to find out, in which a teacher's store was filled."""

    seconds_per_step: float
    spent_s: float

    def steps_in(self, hours: float) -> int:
        """Return how many steps there is time for; at least one."""
        return max(int((3600 * hours - self.spent_s) / self.seconds_per_step), 1)


class _TimedError(Exception):
    """Ends a run whose steps have been timed."""


class _Timer(Reporter):
    """Shows what comes before the training, and ends it after a few steps.

    Attributes:
        ends: when each step ended, in seconds.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self.ends = reporter, list[float]()

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        if stage != "training":
            return self._reporter.update(stage, step, total, message)
        self.ends.append(time.monotonic())
        self._reporter.update("timing a few steps", step, PROBE_STEPS)
        if len(self.ends) == PROBE_STEPS:
            raise _TimedError


def measure_speed(config: RunConfig, folder: Path, *, reporter: Reporter = SILENT) -> Speed:
    """Time a few steps of a run, in a folder of their own, which is removed; nothing is saved."""
    began, probe, timer = time.monotonic(), folder.with_name(f".{folder.name}.probe"), _Timer(reporter)
    shutil.rmtree(probe, ignore_errors=True)
    recipe = msgspec.structs.replace(config.recipe, steps=PROBE_STEPS + 1)
    short = msgspec.structs.replace(config, recipe=recipe, tasks=(), evaluate_every=0, report_to=None)
    try:
        with suppress(_TimedError):
            run_distillation(short, probe, resume=False, reporter=timer)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    per_step = (timer.ends[-1] - timer.ends[_UNTIMED - 1]) / (PROBE_STEPS - _UNTIMED)
    return Speed(float(f"{max(per_step, 1e-4):.3g}"), time.monotonic() - began)


def with_steps_for(config: RunConfig, folder: Path, hours: float, *, reporter: Reporter = SILENT) -> RunConfig:
    """Return a run with as many steps as there is time for, or as many as it began with."""
    if is_file(folder / RUN_CONFIG_FILE):
        steps = read_yaml(folder / RUN_CONFIG_FILE, RecordedConfig).recipe.steps
    else:
        speed = measure_speed(config, folder, reporter=reporter)
        steps = speed.steps_in(hours)
        reporter.note(f"{steps:,} steps in {hours:g} h, measured: {speed.seconds_per_step:g} s each")
    return msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, steps=steps))


def fitting_batch(config: RunConfig) -> int:
    """Return the size of a run's batches, or the number of its samples if that is less. Shards have enough."""
    places = (config.data, config.images)
    if any(place is not None and names_shards(place) for place in places):
        return config.recipe.batch_size
    return min(config.recipe.batch_size, len(training_pairs(config)))


def note_overlap(config: RunConfig, tasks: Sequence[Task], *, reporter: Reporter = SILENT) -> None:
    """Say which images of tasks are trained on, by their content: names and compression may differ."""
    if any(place is not None and names_shards(place) for place in (config.data, config.images)):
        return
    trained = image_paths(training_pairs(config))
    for task in tasks:
        evaluated = [image for image in task.images if isinstance(image, Path)]
        found, count = overlap(trained, evaluated, reporter=reporter) if trained and evaluated else ([], 0)
        if found:
            own, other = found[0]
            reporter.note(
                f"{len(found):,} of {count:,} images of {task.name} are trained on, such as {other.name} as {own}: its "
                "scores are not of new images"
            )


def image_paths(samples: Samples) -> list[Path]:
    """Return the files of samples, as far as these are files."""
    if isinstance(samples, Table):
        return [samples.pair(index).path for index in range(len(samples))]
    return list(samples.images) if isinstance(samples, Folder) else []
