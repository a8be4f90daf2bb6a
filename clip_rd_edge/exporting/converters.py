"""One converter per format: checks a request before anything long, and writes the bundle. See `bundle.formats`."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from clip_rd_edge.bundle.formats import FORMATS, Format, import_named
from clip_rd_edge.bundle.manifest import Manifest, write_manifest
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.conversion import ConvertedBundle
from clip_rd_edge.exporting.formats.coreml import require_coremltools, write_coreml
from clip_rd_edge.exporting.formats.executorch import EXECUTORCH_TOOLS, executorch_backend, require_executorch
from clip_rd_edge.exporting.formats.litert import LITERT_BACKEND, LITERT_TOOLS, require_litert_torch, write_litert_fp16
from clip_rd_edge.exporting.formats.onnx import write_fp16
from clip_rd_edge.exporting.formats.openvino import write_openvino
from clip_rd_edge.exporting.formats.tensorrt import write_engines
from clip_rd_edge.exporting.formats.torch_tensorrt import engine_builder, require_torch_tensorrt
from clip_rd_edge.exporting.int8.candidates import Backend
from clip_rd_edge.exporting.int8.search import write_int8
from clip_rd_edge.exporting.parity import NodeByNode
from clip_rd_edge.exporting.plan import RTX_TARGETS, RTX_WITHOUT_INT8, ExportRequest, require_target
from clip_rd_edge.exporting.towers import Toolchain, write_towers
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.executorch import ExecuTorchEncoder
from clip_rd_edge.runtime.backends.litert import LiteRtEncoder
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.utils.reporting import Reporter


@dataclass(frozen=True)
class Conversion:
    """What a converter needs.

    Attributes:
        clip: the model.
        source: its float32 bundle, in ONNX.
        folder: where the files are written.
        request: precision and the other parameters.
        calibration: samples for INT8, or None for other precisions.
        reporter: shows progress.
    """

    clip: ClipModel
    source: Path
    folder: Path
    request: ExportRequest
    calibration: CalibrationSet | None
    reporter: Reporter

    @property
    def samples(self) -> CalibrationSet:
        """The calibration set of a request for INT8, which `export_bundle` has checked to be there."""
        if self.calibration is None:
            raise ValueError("INT8 without a calibration set")
        return self.calibration


class Converter(ABC):
    """Converts a model's float32 bundle to a format."""

    def check(self, request: ExportRequest) -> None:
        """Raise a ClipRdEdgeError if the request cannot be met here: a package is missing, or options do not apply."""
        return None

    @abstractmethod
    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the towers and the tokenizer; return the manifest, not yet written, and the INT8 trials."""

    def reference(self, folder: Path, manifest: Manifest) -> BundleEncoder:
        """Return an encoder that computes a bundle's reference answers, as the same on every processor as can be."""
        return NodeByNode(folder, manifest)

    def runnable(self, folder: Path, source: Path) -> Path:
        """Return the bundle that embeds labels and reference inputs here: its own folder, or its float32 source."""
        return folder


def converter_for(format: Format) -> Converter:
    """Return the converter of a format, imported by its name."""
    converter: Converter = import_named(FORMATS[format].converter)()
    return converter


class OnnxConverter(Converter):
    """ONNX for ONNX Runtime, in FP16 or INT8; float32 is the source itself."""

    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the bundle."""
        if job.request.precision == "int8":
            return _write_int8(job)
        return ConvertedBundle(write_fp16(job.source, job.folder, job.request, reporter=job.reporter))


class OpenVinoConverter(Converter):
    """ONNX for OpenVINO."""

    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the bundle."""
        if job.request.precision == "int8":
            return _write_int8(job)
        return ConvertedBundle(write_openvino(job.source, job.folder, job.request, reporter=job.reporter))


def _write_int8(job: Conversion, backend: Backend | None = None) -> ConvertedBundle:
    samples = job.samples
    return write_int8(job.source, job.folder, job.request, calibration=samples, backend=backend, reporter=job.reporter)


def _write_towers(job: Conversion, folder: Path, tools: Toolchain) -> Manifest:
    return write_towers(job.clip, job.source, folder, job.request, tools=tools, reporter=job.reporter)


def _write_source(job: Conversion, folder: Path, tools: Toolchain) -> Conversion:
    """Write both towers in float32 as a bundle to convert; return the job that starts from it."""
    complete = replace(job, request=msgspec.structs.replace(job.request, text_tower=True))
    write_manifest(folder, _write_towers(complete, folder, tools))
    return replace(job, source=folder)


def _require_images_of_one_size(request: ExportRequest, runtime: str) -> None:
    """Raise UsageError if a graph is to take images of any size."""
    if request.preprocess_in_graph:
        raise UsageError(f"{{preprocess_in_graph}} does not work with {runtime}, whose files take images of one size.")


class LiteRtConverter(Converter):
    """LiteRT files, converted from PyTorch."""

    def check(self, request: ExportRequest) -> None:
        """Raise if the converter is missing, or preprocessing is to be in the graph."""
        _require_images_of_one_size(request, "LiteRT")
        require_litert_torch()

    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the bundle; float16 and INT8 are made from LiteRT's own float32."""
        if job.request.precision == "fp32":
            return ConvertedBundle(_write_towers(job, job.folder, LITERT_TOOLS))
        with tempfile.TemporaryDirectory() as scratch:
            job = _write_source(job, Path(scratch), LITERT_TOOLS)
            if job.request.precision == "int8":
                return _write_int8(job, LITERT_BACKEND)
            return ConvertedBundle(write_litert_fp16(job.source, job.folder, job.request, reporter=job.reporter))

    def reference(self, folder: Path, manifest: Manifest) -> BundleEncoder:
        """Return an encoder without XNNPACK, whose kernels differ by processor."""
        return LiteRtEncoder(folder, manifest, xnnpack=False)


class ExecuTorchConverter(Converter):
    """ExecuTorch files, converted from PyTorch."""

    def check(self, request: ExportRequest) -> None:
        """Raise if the converter is missing, or preprocessing is to be in the graph."""
        _require_images_of_one_size(request, "ExecuTorch")
        require_executorch()

    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the bundle; INT8 is compared with ExecuTorch's own float32."""
        if job.request.precision == "fp32":
            return ConvertedBundle(_write_towers(job, job.folder, EXECUTORCH_TOOLS))
        with tempfile.TemporaryDirectory() as scratch:
            job = _write_source(job, Path(scratch), EXECUTORCH_TOOLS)
            return _write_int8(job, executorch_backend(job.clip))

    def reference(self, folder: Path, manifest: Manifest) -> BundleEncoder:
        """Return ExecuTorch's encoder: it has no kernels beside those that compute the bundle."""
        return ExecuTorchEncoder(folder, manifest)


class CoreMlConverter(Converter):
    """Core ML packages, converted from PyTorch; nothing but a Mac runs them."""

    def check(self, request: ExportRequest) -> None:
        """Raise if the converter is missing, or preprocessing is to be in the graph."""
        _require_images_of_one_size(request, "Core ML")
        require_coremltools()

    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the bundle."""
        return ConvertedBundle(write_coreml(job.clip, job.source, job.folder, job.request, reporter=job.reporter))

    def runnable(self, folder: Path, source: Path) -> Path:
        """Return the float32 bundle in ONNX, whose answers the packages are to give on a Mac."""
        return source


class TensorRtConverter(Converter):
    """ONNX with engines beside it, built from it or by torch-tensorrt."""

    def check(self, request: ExportRequest) -> None:
        """Raise if engines cannot be built for the target as requested."""
        if request.precision == "int8" and request.target in RTX_WITHOUT_INT8:
            card = RTX_TARGETS[request.target]
            raise UsageError(
                f"TensorRT for RTX does not compute the towers in INT8 on {request.target} ({card}).",
                hint="use {precision} fp16",
            )
        require_target(request.target)
        if request.preprocess_in_graph:
            raise UsageError(
                "{preprocess_in_graph} does not work with TensorRT, which supports neither uint8 images nor images of "
                "any size."
            )
        if request.via == "torch-tensorrt":
            require_torch_tensorrt(request.target)

    def convert(self, job: Conversion) -> ConvertedBundle:
        """Write the bundle."""
        build = None
        if job.request.via == "torch-tensorrt":
            build = engine_builder(require_torch_tensorrt(job.request.target), job.clip, job.source)
        return ConvertedBundle(
            write_engines(
                job.source, job.folder, job.request, calibration=job.calibration, build=build, reporter=job.reporter
            )
        )
