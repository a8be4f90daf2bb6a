"""The starting point of every conversion: an intact float32 bundle, and a calibration set that matches it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from clip_rd_edge.bundle.manifest import TOKENIZER, Manifest, damaged_files, read_manifest, require_whole_towers
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.plan import ExportRequest

if TYPE_CHECKING:
    from clip_rd_edge.exporting.int8.search import Trial


@dataclass(frozen=True)
class ConvertedBundle:
    """The manifest of a converted bundle, not yet written, and the INT8 candidates that were measured for it."""

    manifest: Manifest
    trials: tuple[Trial, ...] = ()


def start_conversion(
    source: Path, folder: Path, request: ExportRequest, *, calibration: CalibrationSet | None = None
) -> Manifest:
    """Start a bundle in `folder` from the float32 bundle `source`: copy its tokenizer and return its manifest.

    If the request leaves the text tower out, the manifest has none, and the tokenizer is not copied.
    """
    manifest = read_manifest(source)
    _require_fp32(source, manifest)
    converted = manifest if request.text_tower else msgspec.structs.replace(manifest, text=None)
    require_whole_towers(source, converted, purpose="every conversion of float32 ONNX")
    if calibration is not None:
        _require_matching_shapes(manifest, calibration)
    if not request.text_tower:
        return manifest.without_text()
    if calibration is not None:
        _require_different_captions(calibration)
    shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    return manifest


def _require_fp32(source: Path, manifest: Manifest) -> None:
    """Raise UsageError unless the source is an intact float32 bundle."""
    if manifest.precision != "fp32":
        raise UsageError(
            f"The bundle {source} is in {manifest.precision}; other precisions are made from a float32 bundle.",
            hint="export it with --precision fp32 first, or pass the model itself",
        )
    if damaged := damaged_files(source, manifest):
        raise UsageError(f"The bundle {source} is damaged: {', '.join(damaged)}.", hint="export it again")


def _require_matching_shapes(manifest: Manifest, calibration: CalibrationSet) -> None:
    """Raise UsageError if the calibration set was made for another model."""
    pixels, ids = calibration.calibrate.pixels, calibration.calibrate.ids
    expected = (*manifest.preprocessing.size, manifest.tokenizer.context_length)
    if (*pixels.shape[2:], ids.shape[1]) != expected:
        raise UsageError(
            f"The calibration set has images of size {pixels.shape[2:]} and texts of {ids.shape[1]} ids; "
            f"{manifest.name} takes {expected[:2]} and {expected[2]}."
        )


def _require_different_captions(calibration: CalibrationSet) -> None:
    """Raise UsageError if all held-out captions are alike: nothing is left of them after subtracting their mean."""
    if len(np.unique(calibration.held_out.ids, axis=0)) < 2:
        raise UsageError(
            f"All captions from {calibration.name} are alike, so the text tower in INT8 cannot be compared with "
            "float32; expected different ones.",
            hint="pass pairs with captions of their own: {calibration} pairs.csv, or leave the text tower out with "
            "{labels} and --no-text-tower",
        )
