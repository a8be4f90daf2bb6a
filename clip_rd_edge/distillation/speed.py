"""What is measured on this machine before a run: the precisions that it computes in, and how long a step takes."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from clip_rd_edge.bundle.runs import RUN_CONFIG_FILE
from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation.config import Precision, RecordedConfig, RunConfig
from clip_rd_edge.distillation.embed import make_teachers
from clip_rd_edge.distillation.loader import step_loader
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.setup import RunSetup, make_dataset
from clip_rd_edge.distillation.step import AUTOCAST, TrainingStep, step_settings
from clip_rd_edge.distillation.store import make_bank
from clip_rd_edge.distillation.student import set_training_mode
from clip_rd_edge.distillation.teacher import BatchTeacher, LiveTeacher, StoredTeacher, Teacher
from clip_rd_edge.models.clip import to_device
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.structs import read_yaml
from clip_rd_edge.utils.text import SILENT, Reporter
from clip_rd_edge.utils.timing import time_in_turn

# A precision of fewer bits must be noticeably faster than the one before it in `measured_precisions`.
_FASTER = 0.95


def with_measured_precision(config: RunConfig, setup: RunSetup, processes: Processes, reporter: Reporter) -> RunConfig:
    """Return the configuration with each precision `auto` replaced by the faster one on this machine.

    All processes take the most robust one that any of them chose. Student and objective stay as they are.
    """
    device = processes.device
    single, model = Processes(device=device), to_device(setup.student.model, device)
    set_training_mode(setup.student, config)
    local_size = config.recipe.batch_size // processes.world_size
    sampler = StepSampler(setup.pairs.groups, local_size, seed=config.seed, steps=range(1))
    with processes.together():
        batch = next(iter(step_loader(make_dataset(config, setup), sampler, workers=0)))

    def teachers(precision: str) -> list[Teacher]:
        """New ones each time, so that no cached caption embeddings remain."""
        return make_teachers(config, setup, device, AUTOCAST[precision])

    def embedding(precision: Precision) -> Callable[[], object]:
        pairs = list(zip(teachers(precision), batch.teacher_pixels, strict=True))
        return lambda: [teacher.embed_images(pixels) for teacher, pixels in pairs]

    def step(precision: Precision) -> Callable[[], object]:
        teacher: BatchTeacher | None = None
        if setup.ensemble is not None and setup.stored is not None:
            teacher = StoredTeacher(setup.ensemble, device)
        elif setup.teachers:
            teacher = LiveTeacher(teachers(config.teacher_precision))
        # An empty bank serves: its products have the same precision in every case.
        bank = make_bank(config, len(setup.pairs), None, setup.ensemble, device)
        settings = step_settings(config, AUTOCAST[precision], device)
        return partial(TrainingStep(setup.student, teacher, objective, single, settings, bank=bank), batch, 0)

    def common(precision: str) -> str:
        return next(name for name in ("fp32", "bf16", "fp16") if processes.any(precision == name))

    if setup.teachers:
        if config.teacher_precision == "auto" and not any(pixels.numel() for pixels in batch.teacher_pixels):
            precision, reason = "fp32", "fp32, as there are no images whose embedding could be timed"
        else:
            precision, reason = _choose(config.teacher_precision, embedding, "embedding a batch's images", device)
        config = with_precision(config, teacher=common(precision))
        reporter.note(f"precision of the teacher{'s' if len(setup.teachers) > 1 else ''}: {reason}")
    objective = setup.objective.to(device)
    state = copy.deepcopy(model.state_dict())  # the steps update running statistics of batch norms
    precision, reason = _choose(config.recipe.precision, step, "a step", device)
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)
    reporter.note(f"precision: {reason}")
    return with_precision(config, student=common(precision))


def with_precision(config: RunConfig, *, student: str | None = None, teacher: str | None = None) -> RunConfig:
    """Return the configuration with another precision of the student, of the teacher, or of both."""
    if student is not None:
        config = msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, precision=student))
    return config if teacher is None else msgspec.structs.replace(config, teacher_precision=teacher)


def measured_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions that `auto` measures on a device, the most robust first.

    float16 needs a loss scale, so bfloat16 precedes it; on GPUs before Ampere, bfloat16 is emulated and slow. CPUs have
    no fast float16 training.
    """
    return ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")


def _choose(
    requested: Precision, make: Callable[[Precision], Callable[[], object]], task: str, device: torch.device
) -> tuple[Precision, str]:
    """Return a precision, for `auto` the fastest of those that `make` returns a call for; and why, in words."""
    if requested != "auto":
        return requested, f"{requested}, as requested"

    def finished(call: Callable[[], object]) -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a call returns once its kernels are queued

    kinds = measured_precisions(device)
    calls: dict[str, Callable[[], object]] = {name: partial(finished, make(name)) for name in kinds}
    times = time_in_turn(calls, rounds=3, warmup=1)
    fastest = {name: float(times[name].min()) for name in kinds}
    precision: Precision = "fp32"
    for name, milliseconds in fastest.items():
        if milliseconds < _FASTER * fastest[precision]:
            precision = name
    figures = [f"{milliseconds:.0f} ms in {name}" for name, milliseconds in fastest.items()]
    return precision, f"{precision}, measured: {task} takes {', '.join(figures[:-1])} and {figures[-1]}"


PROBE_STEPS = 12
_UNTIMED = 4  # of them, in which buffers are allocated


class Speed(NamedTuple):
    """How long a step takes, and how long measuring it took, during which a teacher's store was filled."""

    seconds_per_step: float
    spent_s: float

    def steps_in(self, hours: float) -> int:
        """Return how many steps there is time for; at least one."""
        return max(int((3600 * hours - self.spent_s) / self.seconds_per_step), 1)


class _TimedError(Exception):
    """Ends a run whose steps have been timed."""


class _Timer(Reporter):
    """Shows what comes before the training, and ends it after a few steps, whose `ends` it has in seconds."""

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
    from clip_rd_edge.distillation.run import run_distillation  # which measures the precision by this module

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
