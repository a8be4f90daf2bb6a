"""Which student a device gets: by its start weights, and by the latency and the size that are allowed."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

from clip_rd_edge.benchmarking.results import read_results
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError, UsageError
from clip_rd_edge.exporting.parity import p10
from clip_rd_edge.exporting.plan import plan_exports
from clip_rd_edge.exporting.towers import IMAGE_INPUT, export_image_tower
from clip_rd_edge.models.load import known_config
from clip_rd_edge.models.students import PACKAGE, TEACHER, TIMM, build_student, init_image_tower, student_config
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.utils.files import size_bytes
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.timing import time_in_turn

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
            f"This machine is no {request.target}, so that a latency of {request.max_latency:g} ms there cannot be "
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
        hint="allow more, or fewer pixels with {image_size}, or name another {student}",
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
    if not (known := {name: rows[name] for name in STUDENTS if name in rows}):
        raise InputError(
            f"{results} names no student by its rows, {', '.join(rows)}; expected some of {', '.join(STUDENTS)}.",
            hint="name bundles by their students: clip-rd-edge benchmark SUITE --model exported=resnet10t",
            option="measured",
        )
    return known


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
