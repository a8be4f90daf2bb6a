"""A model as a float32 bundle, each file checked against the model that it came from."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import onnx

from clip_rd_edge.contract.bundle import (
    FORMAT_VERSION,
    IMAGE_MODEL,
    TEXT_MODEL,
    TOKENIZER,
    Manifest,
    Tower,
    write_manifest,
)
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.tokenizer import TokenIds, Tokenizer, TokenizerSpec
from clip_rd_edge.convert.bundle import Converted
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.fp16 import write_fp16
from clip_rd_edge.convert.int8.bundle import write_int8
from clip_rd_edge.convert.openvino import write_openvino
from clip_rd_edge.convert.options import ExportRequest, require_fit, require_via
from clip_rd_edge.convert.parity import PROBES, Inputs, agreement, embed, latencies, measurement
from clip_rd_edge.convert.preprocess_graph import IMAGE, with_preprocessing
from clip_rd_edge.convert.targets import require_target
from clip_rd_edge.convert.tensorrt.bundle import EngineBuilder, write_engines
from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.exporters.onnx import (
    IMAGE_INPUT,
    IMAGE_OUTPUT,
    TEXT_INPUT,
    TEXT_OUTPUT,
    evaluating,
    export_image_tower,
    export_text_tower,
)
from clip_rd_edge.exporters.tokenizer import export_tokenizer
from clip_rd_edge.exporters.torch_tensorrt import engine_builder, require_torch_tensorrt
from clip_rd_edge.models.clip import ClipModel, parameter_count
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.labels import write_label_bank
from clip_rd_edge.utils.io import new_folder, refuse_unless_free, write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

_PACKAGES = ("clip-rd-edge", "torch", "open_clip_torch", "onnx", "onnxruntime", "pillow")
MAX_DIFFERENCE, LEAST_COSINE = 1e-4, 0.99999
TARGET = "onnxruntime"


def write_fp32(clip: ClipModel, folder: Path, request: ExportRequest, *, reporter: Reporter = SILENT) -> Manifest:
    """Write both towers and the tokenizer into `folder`, and return their manifest, not yet written.

    Raises:
        ClipRdEdgeError: a tower cannot be exported, or the file does not do what the model does.
    """
    with evaluating(clip.model):
        reporter.update("exporting the image tower")
        export_image_tower(clip, folder)
        reporter.update("exporting the text tower")
        export_text_tower(clip, folder)
        spec = export_tokenizer(clip.tokenizer, folder)
        reporter.update("comparing with torch")
        ids = _same_ids(clip, folder / TOKENIZER, spec)
        height, width = clip.preprocessing.size
        pixels = np.random.default_rng(0).standard_normal((len(PROBES), 3, height, width)).astype(np.float32)
        encoder = TorchEncoder(clip)
        image = _checked(
            folder / IMAGE_MODEL, pixels, encoder.encode_pixels(pixels), (IMAGE_INPUT, IMAGE_OUTPUT), request.threads
        )
        text = _checked(folder / TEXT_MODEL, ids, encoder.encode_ids(ids), (TEXT_INPUT, TEXT_OUTPUT), request.threads)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=clip.name,
        precision="fp32",
        target=TARGET,
        embedding_size=clip.embedding_size,
        logit_scale=clip.logit_scale,
        preprocessing=clip.preprocessing,
        tokenizer=spec,
        image=image,
        text=text,
        templates=clip.templates,
        parameters=parameter_count(clip.model),
        provenance=request.provenance,
    )


def _same_ids(clip: ClipModel, path: Path, spec: TokenizerSpec) -> TokenIds:
    """Token ids of the probes, which both tokenizers must agree on."""
    expected = clip.tokenizer(list(PROBES)).numpy()
    ids = Tokenizer(path, spec)(PROBES)
    for text, row, expected_row in zip(PROBES, ids, expected, strict=True):
        if not np.array_equal(row, expected_row):
            raise ClipRdEdgeError(
                f"The exported tokenizer of {clip.name} reads {text[:40]!r} as {row.tolist()[:12]}; "
                f"open_clip's reads it as {expected_row.tolist()[:12]}."
            )
    return ids


def _checked(path: Path, inputs: Inputs, expected: Embeddings, names: tuple[str, str], threads: int) -> Tower:
    session = open_session(str(path), threads=threads)
    for batch_size in (1, len(inputs)):
        found = agreement(expected, embed(session, inputs, batch_size=batch_size))
        if not (found.max_difference <= MAX_DIFFERENCE and found.cosine >= LEAST_COSINE):
            raise ClipRdEdgeError(
                f"{path.name} does not do what the model does at batch {batch_size}: greatest difference "
                f"{found.max_difference:.2g} (at most {MAX_DIFFERENCE:g} expected), cosine {found.cosine:.6f} "
                f"(at least {LEAST_COSINE} expected).",
                hint="a newer torch may export this architecture better",
            )
    times = latencies({"fp32": session}, inputs)["fp32"]
    return Tower(
        file=path.name,
        input_name=names[0],
        output_name=names[1],
        precision="fp32",
        measured=measurement(found, times, reference=times, threads=threads),
    )


def export_bundle(
    clip: ClipModel,
    output: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet | None = None,
    source: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Converted:
    """Export a model as a bundle in the folder `output`; its manifest is written last.

    Args:
        calibration: what INT8 is calibrated on and judged by; needed for it alone.
        source: the model's own float32 bundle, from which other precisions are then made without a second export.
        overwrite: replace what stands at `output`.

    Raises:
        UsageError: `output` is in use; the format does not go with the precision; INT8 is asked for without a
            calibration set; `source` is no float32 bundle.
        InputError: engines cannot be built for the target.
        MissingExtraError: TensorRT, torch-tensorrt or OpenVINO is needed and not installed.
        ClipRdEdgeError: a tower cannot be exported, the file does not do what the model does, or INT8 is worth
            shipping for no tower and the fallback allows nothing else.
    """
    refuse_unless_free(output, overwrite=overwrite)
    _require_possible(request, calibration)
    # Before anything takes time.
    torch_tensorrt = require_torch_tensorrt(request.target) if request.via == "torch-tensorrt" else None
    with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        if (request.format, request.precision) == ("onnx", "fp32"):
            converted = Converted(write_fp32(clip, folder, request, reporter=reporter))
        else:
            if source is None:
                source = Path(scratch)
                write_manifest(source, write_fp32(clip, source, request, reporter=reporter))
            build = engine_builder(torch_tensorrt, clip, source) if torch_tensorrt else None
            converted = _convert(source, folder, request, calibration=calibration, build=build, reporter=reporter)
        return Converted(_finish(folder, converted.manifest, request, calibration, reporter), converted.trials)


def _require_possible(request: ExportRequest, calibration: CalibrationSet | None) -> None:
    require_fit(request.format, request.precision)
    require_via(request.via, format=request.format, precision=request.precision)
    if request.precision == "int8" and calibration is None:
        raise UsageError("INT8 needs a calibration set: pairs to set the ranges of activations by.")
    if request.format == "trt":
        require_target(request.target)
        if request.preprocess_in_graph:
            raise UsageError("TensorRT takes no pictures: it parses neither their bytes nor their free size.")


def _convert(
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet | None,
    build: EngineBuilder | None,
    reporter: Reporter,
) -> Converted:
    """Write what is asked for, made from the float32 bundle `source`, into `folder`."""
    if request.format == "trt":
        return Converted(
            write_engines(source, folder, request, calibration=calibration, build=build, reporter=reporter)
        )
    if request.precision == "int8" and calibration is not None:
        return write_int8(source, folder, request, calibration=calibration, reporter=reporter)
    write = write_openvino if request.format == "openvino" else write_fp16
    return Converted(write(source, folder, request, reporter=reporter))


def _finish(
    folder: Path,
    manifest: Manifest,
    request: ExportRequest,
    calibration: CalibrationSet | None,
    reporter: Reporter,
) -> Manifest:
    """Put preprocessing into the graph and labels beside it where asked for, and write the manifest."""
    provenance = dict(request.provenance)
    if request.precision == "int8" and calibration is not None:
        provenance["calibration"] = calibration.name
    manifest = msgspec.structs.replace(manifest, provenance=provenance)
    if request.preprocess_in_graph:
        manifest = _with_preprocessing(folder, manifest)
    if request.labels is not None:
        reporter.update("embedding the labels")
        write_label_bank(folder, manifest, request.labels)
    return write_manifest(folder, manifest)


def _with_preprocessing(folder: Path, manifest: Manifest) -> Manifest:
    path = folder / manifest.image.file
    write_bytes(path, with_preprocessing(onnx.load(path), manifest.preprocessing).SerializeToString())
    image = msgspec.structs.replace(manifest.image, input_name=IMAGE, preprocesses=True)
    return msgspec.structs.replace(manifest, image=image)


def package_versions() -> dict[str, str]:
    """Versions of the packages that an export depends on, for its provenance."""
    return {package: version(package) for package in _PACKAGES}
