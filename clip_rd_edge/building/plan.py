"""How a build trains: chosen with reasons, and written once, so that the same call does the same again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from clip_rd_edge.building.look import Look
from clip_rd_edge.building.student import STARTS, STUDENTS
from clip_rd_edge.distillation.beforehand import Speed
from clip_rd_edge.distillation.config import Precision, RunConfig, load_recipe, recipe_names
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.host import instruction_sets
from clip_rd_edge.utils.paths import Typed, as_text, is_file
from clip_rd_edge.utils.structs import CheckedStruct, commented_yaml, read_yaml

PLAN = "plan.yaml"
BATCH = 32  # pairs per step: on little data, many small steps train better than few large ones
VIEWS = 5  # of each image, which the teacher sees once
LIVE_ABOVE = 100_000  # images: of more, the teacher sees each crop as it comes
MAX_EPOCHS, MIN_STEPS = 40, 400
TRAINING_SHARE = 0.85  # of the hours; the rest is for exporting and measuring
# What decides the training. A build with other values is another one.
_ASKED = ("teacher", "student", "image_size", "hours", "steps", "seed", "hold_out", "max_latency", "max_size")


class Plan(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a build trains.

    Attributes:
        data: a digest of the images and of how they are divided.
        asked: the options that the plan follows from.
        student: timm's name, or a preset.
        start: what the image tower starts from: `teacher`, `package`, `timm`, or empty for random weights.
        image_size: edge of the input in pixels.
        frozen_text_layers: groups of layers of the text tower that stay as the teacher's are.
        recipe: of `distill`.
        batch_size: pairs per step.
        learning_rate: peak.
        views: crops of each image, whose embeddings by the teacher are kept; 0 for new ones every epoch.
        precision: of student and teacher.
        steps: number of training steps.
    """

    data: str
    asked: dict[str, str]
    student: str
    start: str
    image_size: int
    frozen_text_layers: int
    recipe: str
    batch_size: int
    learning_rate: float
    views: int
    precision: Precision
    steps: int = 0


def asked_of(request: Build) -> dict[str, str]:
    """Return the options of a request that decide the training, as texts."""
    return {name: str(as_text(value)) for name in _ASKED if (value := getattr(request, name)) is not None}


def kept_plan(request: Build) -> Plan | None:
    """Return the plan of an earlier call; raise a UsageError if this call asks for something else."""
    path = Path(request.output) / PLAN
    if not is_file(path):
        return None
    plan, asked = read_yaml(path, Plan), asked_of(request)
    # What a file says is not opened: the names in it are ours, or what this call says, too.
    known = {"recipe": recipe_names(), "start": STARTS, "student": (*STUDENTS, str(request.student))}
    for name, names in known.items():
        if getattr(plan, name) not in names:
            raise ConfigError(f"{path} has the {name} {getattr(plan, name)!r}; expected one of {', '.join(names)}.")
    changed = [f"{name} {plan.asked.get(name, 'unset')} → {asked.get(name, 'unset')}"
               for name in _ASKED if plan.asked.get(name) != asked.get(name)]  # fmt: skip
    if changed:
        raise UsageError(
            f"{request.output} was built otherwise; changed: {', '.join(changed)}.",
            hint="repeat the earlier call, or name another {output}",
            option="output",
        )
    return plan


def write_plan(request: Build, plan: Plan) -> None:
    """Write plan.yaml."""
    write_text(Path(request.output) / PLAN, commented_yaml(plan))


def image_size_for(request: Build, found: Look) -> int:
    """Return the edge of the student's input: that of the images, in steps of 32 pixels, at most 224."""
    return request.image_size or min(224, max(32, round(found.edge / 32) * 32))


def context_length_for(found: Look) -> int:
    """Return how many tokens the longest caption may need: two for a word, with those of start and end."""
    words = max(len(row.caption.split()) for row in found.rows) if found.kind != "images" else 0
    words = max([words, *(len(label.split()) for label in found.labels)])
    return next((length for length in (16, 32, 64) if 2 * words + 2 <= length), 77)


def training_precision() -> Precision:
    """Return the precision to train in here: measuring it would take a minute of each build."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if "AMX BF16" in instruction_sets() else "fp32"


def run_config(request: Build, plan: Plan, *, steps: int, **settings: Any) -> RunConfig:
    """Return the run of a plan, for so many steps."""
    recipe = msgspec.structs.replace(
        load_recipe(plan.recipe),
        steps=steps, batch_size=plan.batch_size, learning_rate=plan.learning_rate, precision=plan.precision,
    )  # fmt: skip
    return RunConfig(
        recipe_name=Typed(plan.recipe), recipe=recipe, teacher_precision=plan.precision, student=Typed(plan.student),
        pretrained_image=Typed(plan.start) if plan.start else None, image_size=plan.image_size,
        freeze_text_layers=plan.frozen_text_layers, views=plan.views, seed=request.seed,
        workers=request.workers, **settings,
    )  # fmt: skip


def steps_of(request: Build, plan: Plan, found: Look, speed: Speed | None) -> tuple[int, str]:
    """Return how many steps to train, and why; `speed` is needed unless a number is asked for."""
    rows = len(found.of("train"))
    if speed is None:
        return request.steps or MIN_STEPS, "as asked for"
    enough = max(MIN_STEPS, MAX_EPOCHS * rows // plan.batch_size)
    affordable = speed.steps_in(TRAINING_SHARE * request.hours)
    steps = min(enough, affordable)
    times, each = f"{steps * plan.batch_size / rows:.1f} times all images", f"{speed.seconds_per_step:g} s each"
    return steps, f"{times}, {each}: {'more would hardly help' if steps == enough else f'{request.hours:g} h allow'}"


def reasons(plan: Plan) -> Iterator[str]:
    """Yield a line for each choice, with its reason."""
    yield f"student {plan.student} at {plan.image_size} pixels, which {STARTS[plan.start]}"
    rate = f"learning rate {plan.learning_rate:g}, {plan.precision}"
    yield f"recipe {plan.recipe}, {plan.batch_size} pairs per step, {rate}"
    crops = (
        f"{plan.views} crops of each image, which the teacher sees once" if plan.views else "new crops in each epoch"
    )
    yield crops
