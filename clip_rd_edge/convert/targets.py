"""Targets: what a bundle runs on, as data in `export/<name>/device.yaml`, with a README.md beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.convert.options import (
    ExportOptions,
    ExportRequest,
    Format,
    Precision,
    budget_of,
    require_fit,
    require_via,
)
from clip_rd_edge.errors import InputError, UsageError, near_matches
from clip_rd_edge.runtime.labels import read_labels_file
from clip_rd_edge.utils.io import read_yaml, shipped

DEVICES = "export"
BROWSER = "browser"
_FILE = "device.yaml"
_RTX = "rtx"  # the device that all of RTX_TARGETS are
# Compute capabilities that TensorRT for RTX builds for on any machine.
RTX_TARGETS = {
    "sm75": "GeForce RTX 20, T4",
    "sm80": "A100",
    "sm86": "GeForce RTX 30, A10, RTX A",
    "sm89": "GeForce RTX 40, L4, RTX Ada",
    "sm120": "GeForce RTX 50, RTX PRO Blackwell",
    "sm121": "GB10 (DGX Spark)",
}
# Devices that build their engines themselves, and what they need for it.
SELF_BUILDING_TARGETS = {
    "nvidia-gpu": "NVIDIA GPU with TensorRT 10 or 11",
    "jetson-orin": "Jetson Orin, compute capability 8.7; JetPack 6, TensorRT 10",
    "jetson-thor": "Jetson Thor, compute capability 11.0; JetPack 7, TensorRT 10.13",
}
TARGETS = {**RTX_TARGETS, **SELF_BUILDING_TARGETS}


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is exported for a target.

    Attributes:
        format: of `clip-rd-edge export`; it decides by which runtime INT8 is tried, and in which ways.
        precisions: that the target takes, the one to try first in front.
    """

    format: Literal["onnx", "openvino", "trt"]
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8"], ...]


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One target.

    Attributes:
        title: what it is, in a few words.
        examples: products that are meant.
        needs: what has to be there before anything is installed.
        install: the command that installs what runs a bundle there.
        precision: what to export for it, with the reason.
        profile: the same for `clip-rd-edge export --target`.
        export: the command that makes the bundle.
        runs: what of this has been run by the project itself: `here` on such a machine, `nearby` on another that
            shares the software, `not yet`.
        proof: what exactly was run and what was not, in one sentence.
    """

    title: str
    examples: str
    needs: tuple[str, ...]
    install: str
    precision: str
    profile: Profile
    export: str
    runs: Literal["here", "nearby", "not yet"]
    proof: str


def device_names() -> list[str]:
    """Names of the targets that are shipped, sorted."""
    return sorted(path.parent.name for path in shipped(DEVICES).glob(f"*/{_FILE}"))


def read_device(name: str) -> Device:
    """The target of that name.

    Raises:
        InputError: there is none.
        ConfigError: its file does not fit.
    """
    return read_yaml(_folder(name) / _FILE, Device)


def device_guide(name: str) -> str:
    """What its README.md says, as Markdown; raises as `read_device`."""
    return (_folder(name) / "README.md").read_text(encoding="utf-8")


def _folder(name: str) -> Path:
    known = device_names()
    if name not in known:
        raise InputError(
            f"There is no device {name!r}; there are {', '.join(known)}.{near_matches(name, known)}",
            hint="clip-rd-edge devices lists them",
        )
    return shipped(DEVICES) / name


@dataclass(frozen=True)
class Aim:
    """What is exported; `engine` is what TensorRT engines are for, or None."""

    format: Format
    precision: Precision
    engine: str | None


def aim_at(target: str | None, *, format: Format | None, precision: Precision | None) -> Aim:
    """What the options say together; what they leave open is the target's first choice, else ONNX in float32.

    Raises:
        InputError: there is no target of that name, or an engine's is missing.
        UsageError: the target takes no such format or precision, or the format no such precision.
    """
    if target is None:
        format = format or "onnx"
        if format == "trt":
            require_target(target)
        require_fit(format, precision or "fp32")
        return Aim(format, precision or "fp32", None)
    if target not in (*device_names(), *RTX_TARGETS):
        known = [*(name for name in device_names() if name != _RTX), *RTX_TARGETS]
        raise InputError(
            f"There is no target {target!r}; there are {', '.join(known)}.{near_matches(target, known)}",
            hint="clip-rd-edge devices says what each is",
        )
    profile = read_device(_RTX if target in RTX_TARGETS else target).profile
    if format not in (None, profile.format):
        raise UsageError(
            f"{target} takes --format {profile.format}, not {format}.", hint="leave --format away, or --target"
        )
    if profile.format == "trt":
        require_target(target)
    if precision is not None and precision not in profile.precisions:
        raise UsageError(f"{target} takes --precision {' or '.join(profile.precisions)}, not {precision}.")
    return Aim(profile.format, precision or profile.precisions[0], target if target in TARGETS else None)


@dataclass(frozen=True)
class ExportPlan:
    """What the options of an export mean together.

    Attributes:
        request: what is exported, without its provenance.
        layout: what is written: a bundle's folder, immich's, or a page for the browser.
        device: the target as it was named, or empty.
    """

    request: ExportRequest
    layout: Literal["bundle", "immich", "browser"]
    device: str = ""


def plan_export(options: ExportOptions) -> ExportPlan:
    """Check an export's options and fill in what they leave open, before anything heavy is imported.

    Raises:
        InputError: there is no such target, or the labels cannot be read.
        UsageError: options do not go together, or there is no such option.
    """
    if unknown := sorted(set(options) - set(ExportOptions.__annotations__)):
        raise UsageError(
            f"There is no export option {unknown[0]!r}.{near_matches(unknown[0], ExportOptions.__annotations__)}"
        )
    target, layout = options.get("target"), options.get("layout", "bundle")
    if target == BROWSER:
        _require_browser(options)
        aim = aim_at(None, format="onnx", precision=options.get("precision"))
    else:
        aim = aim_at(target, format=options.get("format"), precision=options.get("precision"))
    via = options.get("via", "onnx")
    require_via(via, format=aim.format, precision=aim.precision)
    budget = budget_of(options, precision=aim.precision, format=aim.format)
    if layout == "immich" and aim.format != "onnx":
        raise UsageError(f"immich runs ONNX; expected --format onnx, not {aim.format}.")
    labels = options.get("labels")
    if isinstance(labels, str | os.PathLike):
        labels = read_labels_file(Path(labels))
    request = ExportRequest(
        precision=aim.precision,
        format=aim.format,
        target=aim.engine or "",
        via=via,
        preprocess_in_graph=options.get("preprocess_in_graph", False),
        budget=budget,
        fallback=options.get("fallback"),
        labels=None if labels is None else tuple(labels),
        threads=options.get("threads", 1),
    )
    return ExportPlan(request, "browser" if target == BROWSER else layout, device=target or "")


def _require_browser(options: ExportOptions) -> None:
    """Refuse options that do not go with a browser."""
    format, layout = options.get("format"), options.get("layout", "bundle")
    for given, option in (
        (format not in (None, "onnx"), f"--format {format}"),
        (layout != "bundle", f"--layout {layout}"),
        (bool(options.get("preprocess_in_graph")), "--preprocess-in-graph"),
    ):
        if given:
            raise UsageError(f"--target browser does not go with {option}.", hint=f"leave {option} away")


def require_target(name: str | None) -> str:
    """`name` where an engine, or what builds one, can be made for it.

    Raises:
        InputError: it cannot.
    """
    if name in TARGETS:
        return str(name)
    known = ", ".join(f"{target} ({meant.partition(';')[0]})" for target, meant in TARGETS.items())
    problem = "An engine needs a target" if name is None else f"There is no engine for {name!r}"
    raise InputError(
        f"{problem}; there are {known}.{near_matches(name or '', TARGETS)}", hint="name one: --target sm86"
    )
