"""What a model can be exported as; imports nothing, so that a command line can ask before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import msgspec

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


@dataclass(frozen=True)
class Budget:
    """What INT8 may cost.

    Attributes:
        image, text: least centred cosine with float32, by tower. Text asks for more: its embeddings are the classifier
            of every picture.
        max_loss: points of zero-shot accuracy that a tower may lose on the held-out pairs, each picture among all
            captions. Some answers change either way with any rounding; a loss that is within chance is let pass.
    """

    image: float = 0.99
    text: float = 0.995
    max_loss: float = 0.5

    def min_agreement(self, tower: str) -> float:
        """The least centred cosine of `image` or `text`."""
        return self.image if tower == "image" else self.text


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What an export is asked for, handed on whole.

    Attributes:
        precision, format: they have to go together; see `require_fit`.
        target: what TensorRT engines are for, one of `targets.TARGETS`, or empty.
        via: how engines are built: from ONNX without a GPU, or by torch-tensorrt on the GPU of this machine.
        preprocess_in_graph: the image tower takes bytes of any size, and resizes, crops and normalises itself.
        budget: what INT8 may cost.
        fallback: precision of a tower that INT8 does not improve. None: float32 where the other tower is in INT8;
            where neither is, the export is refused. `none` refuses it for one tower, too.
        labels: names for a label bank, so that a device with fixed labels needs no text tower; None for no bank.
        threads: threads that latencies are measured with.
        provenance: where the model comes from, for the manifest.
    """

    precision: Precision = "fp32"
    format: Format = "onnx"
    target: str = ""
    via: Via = "onnx"
    preprocess_in_graph: bool = False
    budget: Budget = Budget()
    fallback: Fallback | None = None
    labels: tuple[str, ...] | None = None
    threads: int = 1
    provenance: dict[str, str] = {}


class ExportOptions(TypedDict, total=False):
    """What `clip_rd_edge.export` and the command line take, before defaults and the target's profile are filled in.

    Keys:
        format: `onnx`, `openvino` or `trt`. Default: the target's, else onnx.
        precision: `fp32`, `fp16`, `bf16` or `int8`. Default: the target's, else fp32.
        target: a device's name, an RTX card's capability such as `sm86`, or `browser`.
        via: `onnx` or `torch-tensorrt`.
        layout: `bundle`, or `immich` for the folder that immich keeps a model in.
        preprocess_in_graph: image.onnx takes uint8 RGB of any size, one image at a time.
        labels: names, or a text file with one per line, whose embeddings travel with the bundle.
        calibration: pairs to calibrate INT8 on, as `distill` takes its data. Default: those of the model's training.
        node_modules: where npm has installed what the browser needs. Default: fetched once.
        min_agreement: least centred cosine of INT8's embeddings with float32's. Default: see `Budget`.
        max_loss: points of zero-shot accuracy that INT8 may lose on held-out pairs. Default: see `Budget`.
        fallback: precision of a tower that INT8 does not improve: `fp32`, `fp16` or `none`.
        threads: threads that latencies are measured with. Default: 1.
    """

    format: Format | None
    precision: Precision | None
    target: str | None
    via: Via
    layout: Literal["bundle", "immich"]
    preprocess_in_graph: bool
    labels: Sequence[str] | str | os.PathLike[str] | None
    calibration: str | None
    node_modules: str | os.PathLike[str] | None
    min_agreement: float | None
    max_loss: float | None
    fallback: Fallback | None
    threads: int


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


def budget_of(options: ExportOptions, *, precision: Precision, format: Format) -> Budget:
    """What the options allow INT8 to cost.

    Raises:
        UsageError: an option was given that the format or the precision has no use for.
    """
    min_agreement, max_loss = options.get("min_agreement"), options.get("max_loss")
    fallback = options.get("fallback")
    given = {"--min-agreement": min_agreement, "--max-loss": max_loss, "--fallback": fallback}
    names = [name for name, value in given.items() if value is not None]
    if precision != "int8" and names:
        raise UsageError(f"{names[0]} is for --precision int8, not {precision}.")
    if format == "trt" and (fallback or max_loss is not None):
        name = "--fallback" if fallback else "--max-loss"
        raise UsageError(f"{name} is for ONNX Runtime and OpenVINO; TensorRT's INT8 falls back to FP16 by layer.")
    default = Budget()
    return Budget(
        image=default.image if min_agreement is None else min_agreement,
        text=default.text if min_agreement is None else min_agreement,
        max_loss=default.max_loss if max_loss is None else max_loss,
    )
