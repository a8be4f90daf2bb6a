"""What a model can be exported as; imports nothing, so that a command line can ask before torch is loaded."""

from __future__ import annotations

from typing import Literal

from clip_rd_edge.errors import UsageError

Format = Literal["onnx", "openvino", "trt"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
# What a tower becomes that no INT8 version deserves; `none` refuses the export.
Fallback = Literal["fp32", "fp16", "none"]
# How TensorRT engines are built.
Via = Literal["onnx", "torch-tensorrt"]
PRECISIONS: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "trt": ("fp32", "fp16", "int8"),
}


def require_fit(format: Format, precision: Precision) -> None:
    """Refuse a precision that a format does not have; raises UsageError."""
    if precision not in PRECISIONS[format]:
        raise UsageError(f"{format} cannot be in {precision}; expected {', '.join(PRECISIONS[format])}.")


def require_via(via: Via, *, format: Format, precision: Precision) -> None:
    """Refuse a way that does not lead to a format in a precision; raises UsageError."""
    if via == "torch-tensorrt" and format != "trt":
        raise UsageError(f"--via torch-tensorrt builds TensorRT engines; expected --format trt, not {format}.")
    if via == "torch-tensorrt" and precision == "int8":
        raise UsageError(
            "--via torch-tensorrt takes no INT8: the Q/DQ that INT8 is made of stands in the ONNX.",
            hint="--precision fp16, or leave --via away",
        )
