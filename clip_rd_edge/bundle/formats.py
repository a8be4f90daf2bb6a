"""The formats of a bundle: what writes each, and what runs it.

A converter (an `exporting.formats.Format`) and an encoder (a `runtime.encoder.BundleEncoder`) are named as
`module:class` and imported when they are used, because each needs packages of its own. Another package adds a format by
an entry point of the group `clip_rd_edge.formats`, with the format's name, that leads to a FormatInfo.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from clip_rd_edge.errors import UsageError, near_matches

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "clip_rd_edge.formats"
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "litert", "executorch", "coreml"]
_CONVERTERS, _ENCODERS = "clip_rd_edge.exporting.formats", "clip_rd_edge.runtime.backends"


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """One format.

    Attributes:
        title: its name in messages.
        precisions: those that it supports; the first is the default.
        runtime: runs it, and is the first word of a manifest's target, which may add a device after a space.
        converter: writes a bundle in it.
        encoder: runs a bundle in it.
        extras: the extras of this package that it needs, each with what it is for.
        aliases: other names that users give it.
        is_onnx: whether the towers' files are ONNX, which other runtimes run as well.
    """

    title: str
    precisions: tuple[Precision, ...]
    runtime: str
    converter: str
    encoder: str
    extras: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    is_onnx: bool = False


FORMATS: dict[str, FormatInfo] = {
    "onnx": FormatInfo(
        title="ONNX",
        precisions=("fp32", "fp16", "int8"),
        runtime="onnxruntime",
        converter=f"{_CONVERTERS}.onnx:Onnx",
        encoder=f"{_ENCODERS}.onnxruntime:OrtEncoder",
        aliases=("onnxruntime",),
        is_onnx=True,
    ),
    "openvino": FormatInfo(
        title="OpenVINO",
        precisions=("fp32", "bf16", "int8"),
        runtime="openvino",
        converter=f"{_CONVERTERS}.openvino:OpenVino",
        encoder=f"{_ENCODERS}.openvino:OpenVinoEncoder",
        extras={"openvino": "export --format openvino, and running its bundles"},
        is_onnx=True,
    ),
    "trt": FormatInfo(
        title="TensorRT",
        precisions=("fp32", "fp16", "int8"),
        runtime="tensorrt",
        converter=f"{_CONVERTERS}.tensorrt:TensorRt",
        encoder=f"{_ENCODERS}.tensorrt:TensorRtEncoder",
        extras={
            "rtx": "export --format trt for RTX cards, and running the engines on them",
            "tensorrt": "running engines of the full TensorRT, which a Jetson has",
        },
        aliases=("tensorrt",),
        is_onnx=True,
    ),
    "litert": FormatInfo(
        title="LiteRT",
        precisions=("fp32", "fp16", "int8"),
        runtime="litert",
        converter=f"{_CONVERTERS}.litert:LiteRt",
        encoder=f"{_ENCODERS}.litert:LiteRtEncoder",
        extras={
            "litert": "running bundles of export --format litert",
            "litert-torch": "export --format litert",
        },
        aliases=("tflite",),
    ),
    "executorch": FormatInfo(
        title="ExecuTorch",
        precisions=("fp32", "int8"),
        runtime="executorch",
        converter=f"{_CONVERTERS}.executorch:ExecuTorch",
        encoder=f"{_ENCODERS}.executorch:ExecuTorchEncoder",
        extras={"executorch": "export --format executorch, and running its bundles"},
        aliases=("pte",),
    ),
    "coreml": FormatInfo(
        title="Core ML",
        precisions=("fp32", "fp16"),
        runtime="coreml",
        converter=f"{_CONVERTERS}.coreml:CoreMl",
        encoder=f"{_ENCODERS}.coreml:CoreMlEncoder",
        extras={"coreml": "export --format coreml, and running its bundles on a Mac"},
        aliases=("core-ml", "mlpackage"),
    ),
}
RUNTIMES = tuple(info.runtime for info in FORMATS.values())


def format_named(name: str) -> FormatInfo:
    """Return the format of this name, of this package or of another one."""
    if name in FORMATS:
        return FORMATS[name]
    others = {point.name: point for point in _points()}
    if name in others:
        return _loaded(others[name])
    known = [*FORMATS, *others]
    meant = next((f" Did you mean {key!r}?" for key, info in FORMATS.items() if name in info.aliases), "")
    raise UsageError(
        f"format is {name!r}; expected one of {', '.join(known)}.{meant or near_matches(str(name), known)}",
        option="format",
    )


def format_of(target: str) -> FormatInfo:
    """Return the format of a bundle by its manifest's target; ONNX for a target that no installed package has."""
    for info in FORMATS.values():  # a target `tensorrt-rtx sm89` is TensorRT's, too
        if target.startswith(info.runtime):
            return info
    return next((info for info in _others() if target.split()[:1] == [info.runtime]), FORMATS["onnx"])


def encoder_of(runtime: str) -> Any:
    """Return the class that runs bundles in a runtime."""
    return import_named(next(info for info in chain(FORMATS.values(), _others()) if info.runtime == runtime).encoder)


def _points() -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points  # which takes a while, and few need it

    return entry_points(group=GROUP)


def _others() -> Iterator[FormatInfo]:
    yield from map(_loaded, _points())


def _loaded(point: EntryPoint) -> FormatInfo:
    info: FormatInfo = point.load()
    return info


def import_named(reference: str) -> Any:
    """Return what a `module:name` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
