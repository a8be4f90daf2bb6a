"""Export a model as a bundle: in float32, each file is checked against the model; conversions start from there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.labels import require_readable
from clip_rd_edge.bundle.manifest import (
    EXTERNAL_DATA_SUFFIX,
    FORMAT_VERSION,
    IMAGE_MODEL,
    TEXT_MODEL,
    TOKENIZER,
    Manifest,
    Tower,
    read_manifest,
    write_manifest,
)
from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.bundle.tokenizer import TokenIds, Tokenizer, TokenizerSpec
from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.conversion import ConvertedBundle
from clip_rd_edge.exporting.converters import Conversion, converter_for
from clip_rd_edge.exporting.parity import (
    HARD_TEXTS,
    Inputs,
    NodeByNode,
    add_reference,
    agreement,
    embed,
    latencies,
    measurement,
)
from clip_rd_edge.exporting.plan import ExportRequest, require_fallback, require_precision, require_via
from clip_rd_edge.exporting.preprocess_graph import IMAGE, with_preprocessing
from clip_rd_edge.exporting.towers import (
    IMAGE_INPUT,
    IMAGE_OUTPUT,
    TEXT_INPUT,
    TEXT_OUTPUT,
    export_image_tower,
    export_text_tower,
)
from clip_rd_edge.models.clip import ClipModel, deployed_parameter_count, evaluation_mode, float32_on_cpu
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.tokenizers import export_tokenizer
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.labels import write_label_bank
from clip_rd_edge.runtime.load import open_bundle
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.host import ONNXRUNTIMES, installed_versions
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter

_PACKAGES = ("clip-rd-edge", "torch", "open_clip_torch", "onnx", *ONNXRUNTIMES, "pillow")
MAX_DIFFERENCE, MIN_COSINE = 1e-4, 0.99999
TARGET = "onnxruntime"


def write_fp32(clip: ClipModel, folder: Path, request: ExportRequest, *, reporter: Reporter = SILENT) -> Manifest:
    """Write both towers and the tokenizer into `folder`; return their manifest, not yet written."""
    with evaluation_mode(clip.model):
        reporter.update("exporting the image tower")
        export_image_tower(clip, folder)
        reporter.update("exporting the text tower")
        export_text_tower(clip, folder)
        spec = export_tokenizer(clip.tokenizer, folder)
        reporter.update("comparing the files with torch")
        ids = _checked_ids(clip, folder / TOKENIZER, spec)
        height, width = clip.preprocessing.size
        pixels = np.random.default_rng(0).standard_normal((len(HARD_TEXTS), 3, height, width)).astype(np.float32)
        encoder = TorchEncoder(clip)
        image = _checked_tower(
            folder / IMAGE_MODEL, pixels, encoder.encode_pixels(pixels), (IMAGE_INPUT, IMAGE_OUTPUT), request.threads
        )
        text = _checked_tower(
            folder / TEXT_MODEL, ids, encoder.encode_ids(ids), (TEXT_INPUT, TEXT_OUTPUT), request.threads
        )
    manifest = Manifest(
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
        parameters=deployed_parameter_count(clip.model, text_tower=True),
        provenance=request.provenance,
    )
    return manifest.with_scoring(clip.scoring)


def _checked_ids(clip: ClipModel, path: Path, spec: TokenizerSpec) -> TokenIds:
    """Return the token ids of HARD_TEXTS; raise ClipRdEdgeError if open_clip's tokenizer gives others."""
    expected = clip.tokenizer(list(HARD_TEXTS)).numpy()
    ids = Tokenizer(path, spec)(HARD_TEXTS)
    for text, row, expected_row in zip(HARD_TEXTS, ids, expected, strict=True):
        if not np.array_equal(row, expected_row):
            raise ClipRdEdgeError(
                f"The exported tokenizer of {clip.name} turns {text[:40]!r} into {row.tolist()[:12]}; "
                f"expected {expected_row.tolist()[:12]}, as from open_clip's tokenizer."
            )
    return ids


def _checked_tower(path: Path, inputs: Inputs, expected: Embeddings, names: tuple[str, str], threads: int) -> Tower:
    """Return the manifest entry of a tower's file; raise ClipRdEdgeError if its embeddings differ from `expected`."""
    session = open_session(str(path), threads=threads)
    for batch_size in (1, len(inputs)):
        parity = agreement(expected, embed(session, inputs, batch_size=batch_size))
        if not (parity.max_difference <= MAX_DIFFERENCE and parity.cosine >= MIN_COSINE):
            raise ClipRdEdgeError(
                f"{path.name} differs from the model at batch size {batch_size}: max difference "
                f"{parity.max_difference:.2g} (expected at most {MAX_DIFFERENCE:g}), cosine {parity.cosine:.6f} "
                f"(expected at least {MIN_COSINE}).",
                hint="try a newer torch, whose exporter may support this architecture better",
            )
    latencies_ms = latencies({"fp32": session}, inputs)["fp32"]
    return Tower(
        file=path.name,
        input_name=names[0],
        output_name=names[1],
        precision="fp32",
        measured=measurement(parity, latencies_ms, reference_ms=latencies_ms, threads=threads),
    )


@float32_on_cpu()
def export_bundle(
    clip: ClipModel,
    output: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet | None = None,
    source: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ConvertedBundle:
    """Export a model as a bundle in the folder `output`; its manifest is written last.

    Args:
        clip: the model.
        output: the bundle's folder.
        request: format, precision and the other parameters.
        calibration: samples to calibrate and evaluate INT8 on; only INT8 needs them.
        source: the model's float32 bundle, if there is one, so that it is not exported again for other precisions.
        overwrite: replace an earlier export in `output`.
        reporter: shows progress.
    """
    require_output(output, "export", overwrite=overwrite)
    _require_supported(clip, request, calibration)
    with new_folder(output, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        if (request.format, request.precision) == ("onnx", "fp32"):
            source = folder
            converted = ConvertedBundle(write_fp32(clip, folder, request, reporter=reporter))
        else:
            if source is None:
                source = Path(scratch)
                write_manifest(source, write_fp32(clip, source, request, reporter=reporter))
            job = Conversion(clip, source, folder, request, calibration, reporter)
            converted = converter_for(request.format).convert(job)
        if request.precision == "int8" and calibration is not None:
            request = msgspec.structs.replace(
                request, provenance={**request.provenance, "calibration": calibration.name}
            )
        manifest = converted.manifest
        if not request.text_tower:
            parameters = deployed_parameter_count(clip.model, text_tower=False)
            manifest = msgspec.structs.replace(manifest, parameters=parameters)
        return ConvertedBundle(_finish(folder, manifest, request, source, reporter), converted.trials)


@float32_on_cpu()
def export_bundles(
    clip: ClipModel,
    output: Path,
    requests: Mapping[str, ExportRequest],
    *,
    calibration: CalibrationSet | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, ConvertedBundle]:
    """Export a model as several bundles, each in the folder of its name in `output`; the towers are exported once.

    Args:
        requests: one per name.
        clip, output, calibration, overwrite, reporter: as for `export_bundle`.
    """
    require_output(output, "export", overwrite=overwrite)
    for request in requests.values():
        _require_supported(clip, request, calibration)
    with new_folder(output, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "fp32"
        export_bundle(clip, source, ExportRequest(threads=next(iter(requests.values())).threads), reporter=reporter)
        return {
            name: export_bundle(
                clip,
                folder / name,
                request,
                calibration=calibration if request.precision == "int8" else None,
                source=source,
                reporter=PrefixedReporter(reporter, f"{name}: "),
            )
            for name, request in requests.items()
        }


def _require_supported(clip: ClipModel, request: ExportRequest, calibration: CalibrationSet | None) -> None:
    """Raise UsageError or InputError if the request cannot be met."""
    require_precision(request.format, request.precision)
    require_fallback(request.fallback, format=request.format, precision=request.precision)
    require_via(request.via, format=request.format, precision=request.precision)
    converter_for(request.format).check(request)
    if request.precision == "int8" and calibration is None:
        raise UsageError("INT8 needs a calibration set, to measure the activation ranges on.")
    if request.labels is not None:  # the precision of their embeddings is known later: int8 takes the least
        require_readable(tuple(dict.fromkeys(request.labels)), clip.embedding_size, "int8")


def _finish(
    folder: Path,
    manifest: Manifest,
    request: ExportRequest,
    source: Path,
    reporter: Reporter,
) -> Manifest:
    """Add what was requested and the reference answers to the bundle, and write the manifest.

    Args:
        source: the float32 bundle that it was converted from, with both towers.
    """
    manifest = msgspec.structs.replace(manifest, provenance=dict(request.provenance))
    if request.preprocess_in_graph:
        manifest = _with_preprocessing(folder, manifest)
    converter = converter_for(request.format)
    origin = converter.runnable(folder, source)
    known = manifest if origin == folder else read_manifest(origin)
    if request.labels is not None:
        reporter.update("embedding the labels")
        complete = (origin, known) if known.text else (source, read_manifest(source))
        write_label_bank(folder, manifest, request.labels, encoder=_label_encoder(*complete))
    if not request.text_tower:
        manifest, known = _without_text(folder, manifest), known.without_text()
    reporter.update("computing the reference answers")
    add_reference(folder, converter.reference(origin, known))
    return write_manifest(folder, manifest)


def _label_encoder(folder: Path, manifest: Manifest) -> BundleEncoder:
    """Return the bundle as a device runs it, or if its text tower's INT8 gives wrong answers here, node by node."""
    encoder = open_bundle(folder, manifest, device="cpu")
    return NodeByNode(folder, manifest) if encoder.int8_fault(manifest.require_text()) else encoder


def _without_text(folder: Path, manifest: Manifest) -> Manifest:
    """Delete the files of a text tower that was needed for the labels alone; return the manifest without it."""
    if manifest.text is not None:
        for name in (TEXT_MODEL, f"{TEXT_MODEL}{EXTERNAL_DATA_SUFFIX}", TOKENIZER):
            (folder / name).unlink(missing_ok=True)
    return manifest.without_text()


def _with_preprocessing(folder: Path, manifest: Manifest) -> Manifest:
    path = folder / manifest.image.file
    if (folder / f"{path.name}{EXTERNAL_DATA_SUFFIX}").is_file():
        raise UsageError(
            "{preprocess_in_graph} takes image towers of up to 2 GB, and this one is larger.", hint="omit it"
        )
    write_bytes(path, with_preprocessing(onnx.load(path), manifest.preprocessing).SerializeToString())
    image = msgspec.structs.replace(manifest.image, input_name=IMAGE, preprocesses=True)
    return msgspec.structs.replace(manifest, image=image)


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that an export depends on, for its provenance."""
    return installed_versions(_PACKAGES)
