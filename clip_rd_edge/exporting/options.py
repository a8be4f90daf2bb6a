"""Options of an export. Imports nothing heavy, so a command line can check them quickly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal, TypedDict

import msgspec

from clip_rd_edge.bundle.formats import FORMATS, Format, Precision
from clip_rd_edge.errors import UsageError
from clip_rd_edge.runtime.label_list import Labels

# Precision of a tower that INT8 does not improve; `none` refuses the export.
Fallback = Literal["fp32", "fp16", "none"]
# Bits of INT8 weights on CPUs. 7 is right on every processor; with 8, x86 processors without VNNI saturate (see
# `exporting.int8.saturation`).
WeightBits = Literal[7, 8]
# How TensorRT engines are built.
Via = Literal["onnx", "torch-tensorrt"]
# What is written: a bundle, or a folder for other programs.
Layout = Literal["bundle", "huggingface", "immich"]


@dataclass(frozen=True)
class Budget:
    """The accuracy that INT8 may cost.

    Attributes:
        image, text: min centred cosine with float32, per tower. The text tower has to agree more closely, because its
            embeddings are the classifier of every image.
        max_loss: max loss of a tower's zero-shot accuracy on the held-out pairs, in points, each image among all
            captions. Any rounding changes some answers in both directions; a loss within chance is accepted.
    """

    image: float = 0.99
    text: float = 0.995
    max_loss: float = 0.5

    def min_agreement(self, tower: str) -> float:
        """Return the min centred cosine of `image` or `text`."""
        return self.image if tower == "image" else self.text


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of one export.

    Attributes:
        precision, format: a supported combination; see `require_precision`.
        target: target of the TensorRT engines, one of `targets.TARGETS`, or empty.
        via: how engines are built: from ONNX without a GPU, or by torch-tensorrt on this machine's GPU.
        preprocess_in_graph: the image tower takes bytes of any size, and resizes, crops and normalises them itself.
        budget: the accuracy that INT8 may cost.
        weight_bits: of INT8 weights that a CPU multiplies; TensorRT always uses 8.
        fallback: precision of a tower that INT8 does not improve. None: float32 if the other tower is in INT8; if
            neither is, the export is refused. `none` also refuses it for a single tower.
        labels: names for a label bank, so that a device with fixed labels needs no text tower; None for no bank.
        text_tower: False leaves the text tower and the tokenizer out.
        in_batches: the clients run INT8 on several inputs at once, whatever the manifest says of a tower.
        threads: number of threads when measuring latency.
        provenance: where the model comes from, for the manifest.
    """

    precision: Precision = "fp32"
    format: Format = "onnx"
    target: str = ""
    via: Via = "onnx"
    preprocess_in_graph: bool = False
    budget: Budget = Budget()
    weight_bits: WeightBits = 7
    fallback: Fallback | None = None
    labels: tuple[str, ...] | None = None
    text_tower: bool = True
    in_batches: bool = False
    threads: int = 1
    provenance: dict[str, str] = {}

    def adapts(self, tower: str) -> bool:
        """Return whether roundings in INT8 are chosen by what the layers of `image` or `text` see.

        An image tower that was trained under the rounding to the nearest level has adapted itself to that.
        """
        return tower == "text" or "quantize" not in self.provenance


class ExportOptions(TypedDict, total=False):
    """The options of `clip_rd_edge.export` and the command line, before defaults and the target's profile apply.

    Keys:
        format: one of `bundle.formats.FORMATS`. Default: the target's, else onnx.
        precision: `fp32`, `fp16`, `bf16` or `int8`. Default: the target's, else fp32.
        target: a device's name, an RTX card's capability such as `sm86`, or `browser`; or several devices, in a list
            or separated by commas. Default for `trt`: the GPU that is here, else a folder that builds its engines on
            any.
        via: `onnx` or `torch-tensorrt`.
        layout: `bundle`; `huggingface` for a folder that open_clip, transformers.js and fastembed load; or `immich`
            for a model folder of immich.
        as_name: for `immich`, the model that immich knows by this name and whose place the student takes. Default:
            `ViT-B-32__openai` for embeddings of 512 numbers, and others for 640, 768 and 1,024.
        report: folder of a benchmark's report, whose figures `huggingface` puts into the model card.
        preprocess_in_graph: image.onnx takes uint8 RGB of any size, one image at a time.
        labels: names, or a label file, whose embeddings are stored in the bundle. Default: the model's own, which those
            that `stitch` writes have.
        text_tower: False leaves the text tower out: the bundle embeds images, and classifies among `labels` alone.
            Default: True.
        calibration: pairs to calibrate INT8 on, in any form that `distill` takes data. Default: those that
            the model's run has kept.
        node_modules: where npm has installed the packages for the browser. Default: downloaded once.
        min_agreement: min centred cosine between the embeddings in INT8 and in float32. Default: see `Budget`.
        max_loss: max loss of zero-shot accuracy by INT8 on held-out pairs, in points. Default: see `Budget`.
        fallback: precision of a tower that INT8 does not improve: `fp32`, `fp16` or `none`.
        threads: number of threads when measuring latency. Default: 1.
    """

    format: Format | None
    precision: Precision | None
    target: str | Sequence[str] | None
    via: Via
    layout: Layout
    as_name: str | None
    report: str | os.PathLike[str] | None
    preprocess_in_graph: bool
    labels: Labels
    text_tower: bool
    calibration: str | os.PathLike[str] | None
    node_modules: str | os.PathLike[str] | None
    min_agreement: float | None
    max_loss: float | None
    fallback: Fallback | None
    threads: int


def require_precision(format: Format, precision: Precision) -> None:
    """Raise UsageError if a format does not support a precision."""
    precisions = FORMATS[format].precisions
    if precision not in precisions:
        raise UsageError(
            f"{format} does not support {precision}; expected {', '.join(precisions)}.",
            hint=f"choose one of them: {{precision}} {precisions[0]}",
        )


def require_fallback(fallback: Fallback | None, *, format: Format, precision: Precision) -> None:
    """Raise UsageError if a tower that INT8 does not improve cannot have this precision in a format."""
    info = FORMATS[format]
    if precision == "int8" and fallback not in (None, "none", *info.precisions):
        raise UsageError(
            f"{{fallback}} {fallback} does not work with {info.title}, which is exported in "
            f"{', '.join(info.precisions).upper()}.",
            hint="use {fallback} fp32",
        )


def require_via(via: Via, *, format: Format, precision: Precision) -> None:
    """Raise UsageError if engines cannot be built this way in a format and precision."""
    if via == "torch-tensorrt" and format != "trt":
        raise UsageError(f"{{via}} torch-tensorrt builds TensorRT engines; expected {{format}} trt, not {format}.")
    if via == "torch-tensorrt" and precision == "int8":
        raise UsageError(
            "{via} torch-tensorrt does not support INT8, because its Q/DQ nodes are in the ONNX.",
            hint="use {precision} fp16, or omit {via}",
        )


def require_int8(options: ExportOptions, precisions: Sequence[Precision]) -> None:
    """Raise UsageError if an option is for INT8, and none of the targets, whose precisions are given, is in INT8."""
    if "int8" in precisions:
        return
    for name in ("calibration", "min_agreement", "max_loss", "fallback"):
        if options.get(name) is not None:
            option = f"{{{name}}}"
            raise UsageError(
                f"{option} is for {{precision}} int8, not {precisions[0]}.",
                hint=f"omit {option}, or export with --precision int8",
            )


def require_unconverted(bundle: Path, options: ExportOptions, pretrained: str | None) -> None:
    """Raise UsageError if an option would have to be applied before `bundle` was exported."""
    fixed = {
        "pretrained": pretrained is not None,
        "precision": options.get("precision") is not None,
        "calibration": options.get("calibration") is not None,
        "text_tower": not options.get("text_tower", True),
    }
    for name, is_given in fixed.items():
        if is_given:
            raise UsageError(
                f"{bundle} is a bundle already; {{{name}}} cannot change it.", hint=f"run the export without {{{name}}}"
            )


def int8_budget(options: ExportOptions, *, precision: Precision, format: Format) -> Budget:
    """Return the accuracy that the options allow INT8 to cost."""
    min_agreement, max_loss = options.get("min_agreement"), options.get("max_loss")
    _require_within("{min_agreement}", min_agreement, 1)
    _require_within("{max_loss}", max_loss, 100)
    fallback = options.get("fallback")
    if precision == "int8" and format == "trt" and (fallback or max_loss is not None):
        name = "{fallback}" if fallback else "{max_loss}"
        raise UsageError(f"{name} is for ONNX Runtime and OpenVINO; TensorRT's INT8 falls back to FP16 per layer.")
    default = Budget()
    return Budget(
        image=default.image if min_agreement is None else min_agreement,
        text=default.text if min_agreement is None else min_agreement,
        max_loss=default.max_loss if max_loss is None else max_loss,
    )


def _require_within(option: str, value: object, highest: int) -> None:
    """Raise UsageError if an option is given and is no number from 0 to `highest`; NaN would switch its check off."""
    if value is not None and not (isinstance(value, Real) and 0 <= float(value) <= highest):
        raise UsageError(
            f"{option} is {value!r}; expected a number from 0 to {highest}.",
            hint=f"correct it, or omit {option} for its default",
        )
