"""A model as a float32 bundle, each file checked against the model that it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
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
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.fp16 import write_fp16
from clip_rd_edge.convert.int8.bundle import write_int8
from clip_rd_edge.convert.int8.candidates import OPENVINO, ORT
from clip_rd_edge.convert.int8.select import Budget, Trial
from clip_rd_edge.convert.openvino import write_openvino
from clip_rd_edge.convert.options import Fallback, Format, Precision, Via, require_fit, require_via
from clip_rd_edge.convert.parity import PROBES, Inputs, agreement, embed, latencies, measurement
from clip_rd_edge.convert.preprocess_graph import PICTURE, with_preprocessing
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

MAX_DIFFERENCE, LEAST_COSINE = 1e-4, 0.99999
TARGET = "onnxruntime"


def write_fp32(
    clip: ClipModel, folder: Path, *, provenance: dict[str, str], threads: int, progress: Callable[[str], None]
) -> Manifest:
    """Write both towers and the tokenizer into `folder`, and return their manifest, not yet written.

    Raises:
        ClipRdEdgeError: a tower cannot be exported, or the file does not do what the model does.
    """
    with evaluating(clip.model):
        progress("exporting the image tower")
        export_image_tower(clip, folder)
        progress("exporting the text tower")
        export_text_tower(clip, folder)
        spec = export_tokenizer(clip.tokenizer, folder)
        progress("comparing with torch")
        ids = _same_ids(clip, folder / TOKENIZER, spec)
        height, width = clip.preprocessing.size
        pixels = np.random.default_rng(0).standard_normal((len(PROBES), 3, height, width)).astype(np.float32)
        encoder = TorchEncoder(clip)
        image = _checked(
            folder / IMAGE_MODEL, pixels, encoder.encode_pixels(pixels), (IMAGE_INPUT, IMAGE_OUTPUT), threads
        )
        text = _checked(folder / TEXT_MODEL, ids, encoder.encode_ids(ids), (TEXT_INPUT, TEXT_OUTPUT), threads)
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
        provenance=provenance,
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


def _unheard(_: object) -> None:
    """What nobody listens to."""


def export_bundle(
    clip: ClipModel,
    output: Path,
    *,
    precision: Precision,
    format: Format = "onnx",
    target: str | None = None,
    via: Via = "onnx",
    preprocess_in_graph: bool = False,
    calibration: CalibrationSet | None = None,
    budget: Budget = Budget(),  # noqa: B008 — frozen
    fallback: Fallback | None = None,
    labels: Sequence[str] | None = None,
    provenance: dict[str, str],
    overwrite: bool = False,
    source: Path | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = _unheard,
    on_trials: Callable[[Sequence[Trial]], None] = _unheard,
) -> Manifest:
    """Export a model as a bundle.

    Args:
        output: the bundle's folder.
        format: `onnx`; `openvino`, the same files measured by OpenVINO; or `trt`, TensorRT engines beside their ONNX.
        target: what engines are for, one of `tensorrt.TARGETS`.
        via: how engines are built: from ONNX without a GPU, or by torch-tensorrt on the GPU that is here.
        preprocess_in_graph: the image tower takes bytes of any size, and resizes, crops and normalises itself.
        calibration: what INT8 is calibrated on and judged by; needed for it alone.
        budget: what INT8 may cost.
        fallback: what a tower becomes that INT8 makes no better; see `int8.write_int8`.
        provenance: where the model comes from, for the manifest.
        source: the model's own float32 bundle, from which INT8 is then made without a second export.
        labels: names for a label bank, so that a device with fixed labels needs no text tower.
        overwrite: replace what stands at `output`.
        threads: threads that latencies are measured with.
        progress: told in a few words what is being done.
        on_trials: given the table of what was tried for INT8, once a tower.

    Raises:
        UsageError: `output` is in use; the format does not go with the precision; INT8 is asked for without a
            calibration set; `source` is no float32 bundle.
        InputError: engines cannot be built for `target`.
        MissingExtraError: TensorRT, torch-tensorrt or OpenVINO is needed and not installed.
        ClipRdEdgeError: a tower cannot be exported, the file does not do what the model does, or INT8 is worth
            shipping for no tower and `fallback` allows nothing else.
    """
    refuse_unless_free(output, overwrite=overwrite)
    require_fit(format, precision)
    require_via(via, format=format, precision=precision)
    if precision == "int8" and calibration is None:
        raise UsageError("INT8 needs a calibration set: pairs to set the ranges of activations by.")
    if format == "trt":
        target = require_target(target)
        if preprocess_in_graph:
            raise UsageError("TensorRT takes no pictures: it parses neither their bytes nor their free size.")
    # Before anything takes time.
    torch_tensorrt = require_torch_tensorrt(target) if target and via == "torch-tensorrt" else None
    with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        whole = (format, precision) == ("onnx", "fp32")
        if whole or source is None:
            source = folder if whole else Path(scratch)
            manifest = write_fp32(clip, source, provenance=provenance, threads=threads, progress=progress)
            write_manifest(source, manifest)
        if not whole:
            if precision == "int8" and calibration is not None:
                provenance = {**provenance, "calibration": calibration.name}
            manifest = _written_from(
                source,
                folder,
                format=format,
                precision=precision,
                target=target or "",
                build=engine_builder(torch_tensorrt, clip, source) if torch_tensorrt else None,
                calibration=calibration,
                budget=budget,
                fallback=fallback,
                threads=threads,
                progress=progress,
                on_trials=on_trials,
            )
            manifest = msgspec.structs.replace(manifest, provenance=provenance)
        if preprocess_in_graph:
            manifest = _with_preprocessing(folder, manifest)
        if labels is not None:
            progress("embedding the labels")
            write_label_bank(folder, manifest, labels)
        return write_manifest(folder, manifest)


def _written_from(
    source: Path,
    folder: Path,
    *,
    format: Format,
    precision: Precision,
    target: str,
    build: EngineBuilder | None,
    calibration: CalibrationSet | None,
    budget: Budget,
    fallback: Fallback | None,
    threads: int,
    progress: Callable[[str], None],
    on_trials: Callable[[Sequence[Trial]], None],
) -> Manifest:
    """What is made from the float32 bundle `source`, in `folder`."""
    if format == "trt" and precision != "bf16":
        return write_engines(
            source,
            folder,
            precision=precision,
            target=target,
            calibration=calibration,
            budget=budget,
            progress=progress,
            build=build,
        )
    if precision == "int8" and calibration is not None:
        return write_int8(
            source,
            folder,
            calibration=calibration,
            threads=threads,
            progress=progress,
            on_trials=on_trials,
            backend=OPENVINO if format == "openvino" else ORT,
            budget=budget,
            fallback=fallback,
        )
    if precision in ("fp32", "bf16"):
        return write_openvino(source, folder, precision=precision, threads=threads, progress=progress)
    return write_fp16(source, folder, threads=threads, progress=progress)


def _with_preprocessing(folder: Path, manifest: Manifest) -> Manifest:
    path = folder / manifest.image.file
    write_bytes(path, with_preprocessing(onnx.load(path), manifest.preprocessing).SerializeToString())
    image = msgspec.structs.replace(manifest.image, input_name=PICTURE, takes_pictures=True)
    return msgspec.structs.replace(manifest, image=image)
