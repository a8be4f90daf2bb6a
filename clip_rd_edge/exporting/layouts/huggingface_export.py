"""Export a model as a folder for the Hugging Face hub, which open_clip, transformers.js and fastembed load."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.conversion import ConvertedBundle
from clip_rd_edge.exporting.layouts.huggingface import Variant, require_supported, write_huggingface
from clip_rd_edge.exporting.layouts.model_card import write_model_card
from clip_rd_edge.exporting.onnx import MAX_FILE_BYTES
from clip_rd_edge.exporting.options import ExportRequest
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_open_clip, save_usage
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter


def export_huggingface(
    clip: ClipModel,
    output: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet | None = None,
    results: Results | None = None,
    training: dict[str, str] | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ConvertedBundle:
    """Export a model in float32 and FP16, and in INT8 too if the request says so, with its weights and a model card.

    Args:
        request: of an ONNX bundle; with `precision` int8, it needs a calibration set. A tower that INT8 does not
            improve is float32 in the INT8 files, unless `fallback` names another precision.
        results: a report of the model, whose figures and plot the card shows.
        training: for the card, facts about the model's training by name.
        clip, output, calibration, overwrite, reporter: as for `export_bundle`.

    Returns:
        The manifest of the last variant, and the trials of INT8.
    """
    require_output(output, "export", overwrite=overwrite)
    require_supported(clip.preprocessing, clip.name)
    size = sum(tensor.nbytes for tensor in clip.model.state_dict().values())
    if size > MAX_FILE_BYTES:
        raise UsageError(
            f"{clip.name} has {size / 1e9:.1f} GB of weights, and the Hugging Face layout has both towers in one file "
            "of up to 2 GB.",
            hint="omit {layout}, or distil a smaller student",
        )
    variants: list[Variant] = ["fp32", "fp16"]
    if request.precision == "int8":
        variants.append("int8")
    with tempfile.TemporaryDirectory() as scratch, new_folder(output, overwrite=overwrite) as folder:
        bundles: dict[Variant, Path] = {variant: Path(scratch) / variant for variant in variants}
        for variant, bundle in bundles.items():
            converted = export_bundle(
                clip,
                bundle,
                msgspec.structs.replace(request, precision=variant, in_batches=True),
                calibration=calibration if variant == "int8" else None,
                source=bundles["fp32"] if variant != "fp32" else None,
                reporter=PrefixedReporter(reporter, f"{variant}: "),
            )
        reporter.update("writing the folder")
        save_open_clip(folder, clip, location=output)
        save_usage(folder, clip)
        write_huggingface(bundles, folder)
        manifests = {variant: read_manifest(bundle) for variant, bundle in bundles.items()}
        write_model_card(folder, manifests, results=results, training=training or {})
        return converted
