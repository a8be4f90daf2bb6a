"""The formats of a bundle, and the runtimes that run them: the one place to add another.

A format needs an entry in FORMATS, an encoder (a `runtime.encoder.BundleEncoder`) in RUNTIMES, and a converter (an
`exporting.converters.Converter`). Encoders and converters are named as `module:class` and imported when they are used,
because each needs packages of its own. Imports nothing heavy, so a command line can check its options quickly.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal["onnx", "openvino", "trt", "litert", "executorch", "coreml"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "litert", "executorch", "coreml"]


@dataclass(frozen=True)
class FormatInfo:
    """One format.

    Attributes:
        title: its name in messages.
        help: what it is, in a few words, for the command line; empty if its name says it.
        precisions: those that it supports.
        runtime: runs it, and is the first word of a manifest's target, which may add a device after a space.
        converter: writes a bundle in it.
        extras: the extras of this package that it needs, each with what it is for.
        aliases: other names that users give it.
        is_onnx: whether the towers' files are ONNX, which other runtimes run as well.
    """

    title: str
    precisions: tuple[Precision, ...]
    runtime: Runtime
    converter: str
    help: str = ""
    extras: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    is_onnx: bool = True


FORMATS: dict[Format, FormatInfo] = {
    "onnx": FormatInfo(
        title="ONNX",
        precisions=("fp32", "fp16", "int8"),
        runtime="onnxruntime",
        converter="clip_rd_edge.exporting.converters:OnnxConverter",
        aliases=("onnxruntime",),
    ),
    "openvino": FormatInfo(
        title="OpenVINO",
        help="ONNX files for OpenVINO",
        precisions=("fp32", "bf16", "int8"),
        runtime="openvino",
        converter="clip_rd_edge.exporting.converters:OpenVinoConverter",
        extras={"openvino": "export --format openvino, and running its bundles"},
    ),
    "trt": FormatInfo(
        title="TensorRT",
        help="TensorRT engines beside their ONNX files; needs no GPU",
        precisions=("fp32", "fp16", "int8"),
        runtime="tensorrt",
        converter="clip_rd_edge.exporting.converters:TensorRtConverter",
        extras={
            "rtx": "export --format trt for RTX cards, and running the engines on them",
            "tensorrt": "running engines of the full TensorRT, which a Jetson has",
        },
        aliases=("tensorrt",),
    ),
    "litert": FormatInfo(
        title="LiteRT",
        help="LiteRT (TensorFlow Lite) files for phones",
        precisions=("fp32", "fp16", "int8"),
        runtime="litert",
        converter="clip_rd_edge.exporting.converters:LiteRtConverter",
        extras={
            "litert": "running bundles of export --format litert",
            "litert-torch": "export --format litert",
        },
        aliases=("tflite",),
        is_onnx=False,
    ),
    "executorch": FormatInfo(
        title="ExecuTorch",
        help="ExecuTorch files for phones",
        precisions=("fp32", "int8"),
        runtime="executorch",
        converter="clip_rd_edge.exporting.converters:ExecuTorchConverter",
        extras={"executorch": "export --format executorch, and running its bundles"},
        aliases=("pte",),
        is_onnx=False,
    ),
    "coreml": FormatInfo(
        title="Core ML",
        help="Core ML packages for Apple devices; converted anywhere, run on a Mac",
        precisions=("fp32", "fp16"),
        runtime="coreml",
        converter="clip_rd_edge.exporting.converters:CoreMlConverter",
        extras={"coreml": "export --format coreml, and running its bundles on a Mac"},
        aliases=("core-ml", "mlpackage"),
        is_onnx=False,
    ),
}
# The encoder of each runtime. A target `tensorrt-rtx sm89` is TensorRT's, too.
RUNTIMES: dict[Runtime, str] = {
    "onnxruntime": "clip_rd_edge.runtime.backends.onnxruntime:OrtEncoder",
    "openvino": "clip_rd_edge.runtime.backends.openvino:OpenVinoEncoder",
    "tensorrt": "clip_rd_edge.runtime.backends.tensorrt:TensorRtEncoder",
    "litert": "clip_rd_edge.runtime.backends.litert:LiteRtEncoder",
    "executorch": "clip_rd_edge.runtime.backends.executorch:ExecuTorchEncoder",
    "coreml": "clip_rd_edge.runtime.backends.coreml:CoreMlEncoder",
}


def format_of(target: str) -> FormatInfo:
    """Return the format of a bundle by its manifest's target; ONNX for targets that this version does not know."""
    return next((info for info in FORMATS.values() if target.startswith(info.runtime)), FORMATS["onnx"])


def import_named(reference: str) -> Any:
    """Return what a `module:name` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
