"""How a build trains: chosen with reasons, and written once, so that the same call does the same again."""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from clip_rd_edge.benchmarking.results import read_results
from clip_rd_edge.building.look import Look
from clip_rd_edge.distillation.config import Precision, RunConfig, load_recipe, recipe_names
from clip_rd_edge.distillation.speed import Speed
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError, UsageError
from clip_rd_edge.exporting.parity import p10
from clip_rd_edge.exporting.plan import plan_exports
from clip_rd_edge.exporting.towers import IMAGE_INPUT, export_image_tower
from clip_rd_edge.models.classifiers import CLASSIFIERS, SENTENCE_ENCODERS
from clip_rd_edge.models.edit import trim_text_tower
from clip_rd_edge.models.load import known_config, load_clip, save_clip
from clip_rd_edge.models.stitch import IMAGENET, read_class_names, stitch_models
from clip_rd_edge.models.students import PACKAGE, TEACHER, TIMM, build_student, init_image_tower, student_config
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.labels import everyday_labels
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.utils.files import size_bytes
from clip_rd_edge.utils.host import instruction_sets
from clip_rd_edge.utils.paths import Typed, as_text, is_file
from clip_rd_edge.utils.structs import CheckedStruct, read_yaml
from clip_rd_edge.utils.text import Reporter
from clip_rd_edge.utils.timing import time_in_turn

PLAN = "plan.yaml"
BATCH = 32  # pairs per step: on little data, many small steps train better than few large ones
VIEWS = 5  # of each image, which the teacher sees once: less than half of its work is left
TEXT_LAYERS, VOCABULARY = 2, 7500  # of the teacher's text tower that the student's starts from
FROZEN_TEXT_LAYERS = 2  # groups of that tower: its embeddings, and the first of two layers
# Of each kind of data that build takes, see benchmarks/measurements/build.md.
_LEVEL = "level with the best of nine settings by hand on class folders, captions, and images alone"
LIVE_ABOVE = 100_000  # images: of more, the teacher sees each crop as it comes
# As many steps as this number of epochs has, but at least MIN_STEPS, unless these are more epochs than few images need.
EPOCHS, MIN_STEPS, MAX_EPOCHS = 40, 400, 100
# Students that take more steps than a ResNet, by the beginning of their names. A small MobileViT learns more slowly, in
# steps of less than half the time (benchmarks/measurements/relations.md).
_MORE_STEPS = {"mobilevit": 2.2}
TRAINING_SHARE = 0.85  # of the hours; the rest is for exporting and measuring
# What decides the training. A build with other values is a new one.
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
    """Return the run of a plan, for this many steps."""
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


def relative_steps(student: str) -> float:
    """Return how many times the steps of a ResNet a student takes."""
    return next((times for name, times in _MORE_STEPS.items() if student.startswith(name)), 1.0)


def steps_of(request: Build, plan: Plan, found: Look, speed: Speed | None) -> tuple[int, str]:
    """Return how many steps to train, and why; `speed` is needed unless a number is asked for."""
    rows = len(found.of("train"))
    if speed is None:
        return request.steps or MIN_STEPS, "as asked for"
    epoch = rows * relative_steps(plan.student) / plan.batch_size
    enough = max(round(EPOCHS * epoch), min(MIN_STEPS, math.ceil(MAX_EPOCHS * epoch)))
    affordable = speed.steps_in(TRAINING_SHARE * request.hours)
    steps = min(enough, affordable)
    times, each = f"{steps * plan.batch_size / rows:.1f} times all images", f"{speed.seconds_per_step:g} s each"
    return steps, f"{times}, {each}: {'more would hardly help' if steps == enough else f'{request.hours:g} h allow'}"


def reasons(plan: Plan) -> Iterator[str]:
    """Yield a line for each choice, with its reason."""
    yield f"student {plan.student} at {plan.image_size} pixels, which {STARTS[plan.start]}"
    rate = f"learning rate {plan.learning_rate:g}, {plan.precision}"
    yield f"recipe {plan.recipe}, {plan.batch_size} pairs per step, {rate}: {_LEVEL}"
    crops = (
        f"{plan.views} crops of each image, which the teacher sees once" if plan.views else "new crops in each epoch"
    )
    yield crops


# By timm's top-1 on ImageNet, best first; all are small enough for boards and phones. The default's weights come with
# the extra `emoji`, so that it starts trained without a network.
DEFAULT = "efficientnet_lite0"
STUDENTS = (DEFAULT, "mobilenetv4_conv_small", "resnet18", "mobilenetv3_small", "resnet10t")
STARTS = {
    TEACHER: "starts as the teacher's image tower, which has the same architecture",
    PACKAGE: "starts from ImageNet's weights, of an installed package",
    TIMM: "starts from the weights that timm publishes",
    "": "starts from random weights: others are neither installed nor can be fetched",
}
_ROUNDS = 30
_SMALLER = {"int8": 4, "fp16": 2, "bf16": 2}  # than float32, about
_HERE = {"x86_64": "cpu-x86", "amd64": "cpu-x86", "aarch64": "cpu-arm", "arm64": "cpu-arm"}


def is_here(target: str) -> bool:
    """Return whether a target is the processor of this machine."""
    return target.removesuffix("-vnni") == _HERE.get(platform.machine().lower())


def require_measurable(request: Build) -> None:
    """Refuse a latency limit for a device that is not here and that nobody has measured on."""
    if request.max_latency and request.measured is None and not is_here(request.target):
        raise UsageError(
            f"This machine is not {request.target}, so a latency of {request.max_latency:g} ms there cannot be "
            "measured here.",
            hint="run `clip-rd-edge benchmark` on the device with a bundle of each student, and name its results with "
            "{measured}; or omit {max_latency}",
            option="max_latency",
        )


def choose_student(request: Build, *, image_size: int) -> str:
    """Return the name of the student: the one that was asked for, or the best within the limits."""
    if request.student or not (request.max_latency or request.max_size):
        return request.student or DEFAULT
    reporter = request.reporter
    export = Export(model=DEFAULT, output=request.output, target=request.target)
    precision = plan_exports(export)[0].precision
    on_device = _latencies_in(Path(request.measured)) if request.measured else {}
    for name in STUDENTS:
        if request.measured and name not in on_device:
            continue
        reporter.update(f"measuring {name}")
        float_mb, latency = measured_tower(name, image_size)
        size, latency = float_mb / _SMALLER.get(precision, 1), on_device.get(name, latency)
        fits = latency <= (request.max_latency or latency) and size <= (request.max_size or size)
        where = "on the device" if on_device else "here in float32"
        reporter.note(f"{name}: {latency:.1f} ms {where}, about {size:.1f} MB{'' if fits else ', which is too much'}")
        if fits:
            return name
    limits = {"ms": request.max_latency, "MB": request.max_size}
    named = [f"{limit:g} {unit}" for unit, limit in limits.items() if limit]
    raise InputError(
        f"No student is within {' and '.join(named)} at {image_size} pixels.",
        hint="allow more, or fewer pixels with {image_size}, or name another {student}; the rows of {measured} are "
        f"named by {', '.join(STUDENTS)}",
        option="max_latency" if request.max_latency else "max_size",
    )


def measured_tower(name: str, image_size: int) -> tuple[float, float]:
    """Return the megabytes of a student's image tower in float32, and its milliseconds here on one thread."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        config = student_config(name, embedding_size=384, image_size=image_size, text="tiny")
        path = export_image_tower(build_student(config, name=name), Path(folder))
        session = open_session(str(path), threads=1)
        pixels = np.zeros((1, 3, image_size, image_size), np.float32)
        times = time_in_turn({name: lambda: session.run(None, {IMAGE_INPUT: pixels})}, rounds=_ROUNDS)
        return size_bytes(Path(folder)) / 1e6, p10(times[name])


def _latencies_in(results: Path) -> dict[str, float]:
    """Return the latencies of the image towers in results of a benchmark, by the students that name its rows."""
    rows = {row.label.rpartition(" ")[2]: row.latency.image.p50 for row in read_results(results).rows}
    return {name: rows[name] for name in STUDENTS if name in rows}


def start_of(student: str, teacher: Typed) -> str:
    """Return what the image tower of a student starts from: the best that is here, or can be fetched."""
    with torch.random.fork_rng(devices=[]):
        clip = build_student(student_config(student, embedding_size=64, image_size=64, text="tiny"), name=student)
        trunk = clip.model_cfg["vision_cfg"].get("timm_model_name")
        if trunk and known_config(teacher).get("vision_cfg", {}).get("timm_model_name") == trunk:
            return TEACHER
        for source in (PACKAGE, TIMM):
            try:
                init_image_tower(clip, source)
            except (InputError, ConfigError, MissingExtraError):
                continue
            return source
    return ""


CLASSIFIER, SENTENCE_ENCODER = "tf_efficientnet_lite0", "all-MiniLM-L6-v2"


def built_in_teacher(folder: Path, *, image_size: int, context_length: int, reporter: Reporter) -> Path:
    """Stitch the built-in teacher from packages with weights; an existing folder is left unchanged."""
    if not folder.is_dir():
        for package in (CLASSIFIERS[CLASSIFIER], SENTENCE_ENCODERS[SENTENCE_ENCODER]):
            package.verified()  # `stitch_models` would download what is not installed
        clip, provenance = stitch_models(
            CLASSIFIER,
            Typed(SENTENCE_ENCODER),
            read_class_names(IMAGENET),
            image_size=image_size,
            context_length=context_length,
            reporter=reporter,
        )
        save_clip(folder, replace(clip, labels=tuple(everyday_labels())), provenance=provenance)
    return folder


def trim_text_tower_of(teacher: Typed, folder: Path, texts: Sequence[str], reporter: Reporter) -> None:
    """Write what the student's text tower starts from: the teacher's, with as much of it left out as can be."""
    clip = load_clip(teacher)
    tries = ((TEXT_LAYERS, VOCABULARY), (None, VOCABULARY), (TEXT_LAYERS, None))
    for layers, vocabulary in tries:
        try:
            trimmed, kept = trim_text_tower(clip, layers=layers, vocabulary=vocabulary, texts=texts, reporter=reporter)
        except ConfigError:  # it has no more than that
            continue
        reporter.note(kept)
        return save_clip(folder, trimmed, provenance={})
    save_clip(folder, clip, provenance={})
