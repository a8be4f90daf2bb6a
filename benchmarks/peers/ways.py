"""Ways to run one student's image tower: what a user would write with each peer by its own documentation.

Each way is a function of the student's folder, calibration pixels and a folder to write to; it returns how to embed
pixels, (N, 3, H, W) float32 to (N, D) L2-normalised, and the bytes that it needs on disk. Text embeddings are
everywhere those of the float32 student, so that what differs is the image tower.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

Rows = npt.NDArray[np.float32]
Embed = Callable[[Rows], Rows]
Made = tuple[Embed, int]


@dataclass(frozen=True)
class Given:
    """What every way starts from: the student's run, an open_clip folder, pixels (N, 3, H, W) and where to write."""

    run: Path
    student: Path
    calibrate: Rows
    work: Path

    @property
    def plain_onnx(self) -> Path:
        """The image tower as `torch.onnx.export` writes it when nothing else is asked for."""
        path = self.work / "plain.onnx"
        if not path.is_file():
            model = open_clip_model(self)
            program = torch.onnx.export(
                model.visual,
                (torch.from_numpy(self.calibrate[:2]),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                input_names=["pixels"],
                verbose=False,
            )
            program.save(str(path), external_data=False)
        return path


class Calibration:
    """ONNX Runtime's calibration data reader, and what NNCF and Optimum iterate over."""

    def __init__(self, pixels: Rows) -> None:
        self._left: Iterator[Rows] = (sample[None] for sample in pixels)

    def get_next(self) -> dict[str, Rows] | None:
        sample = next(self._left, None)
        return None if sample is None else {"pixels": sample}


def open_clip_model(given: Given) -> torch.nn.Module:
    import open_clip

    model: torch.nn.Module = open_clip.create_model(f"local-dir:{given.student}").eval()
    return model


def normalised(rows: Rows) -> Rows:
    scaled: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def with_onnxruntime(path: Path) -> Made:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return (lambda pixels: normalised(session.run(None, {name: pixels})[0])), path.stat().st_size


def eager(given: Given) -> Made:
    return _open_clip(given, compiled=False)


def compiled(given: Given) -> Made:
    return _open_clip(given, compiled=True)


def _open_clip(given: Given, *, compiled: bool) -> Made:
    model = open_clip_model(given)
    if compiled:
        model.visual = torch.compile(model.visual)

    @torch.inference_mode()
    def embed(pixels: Rows) -> Rows:
        rows: Rows = model.encode_image(torch.from_numpy(pixels), normalize=True).numpy()  # type: ignore[operator]
        return rows

    return embed, (given.student / "open_clip_model.safetensors").stat().st_size


def plain_export(given: Given) -> Made:
    return with_onnxruntime(given.plain_onnx)


def ort_dynamic(given: Given) -> Made:
    from onnxruntime.quantization import quantize_dynamic

    path = given.work / "ort-dynamic.onnx"
    quantize_dynamic(str(given.plain_onnx), str(path))
    return with_onnxruntime(path)


def ort_static(given: Given) -> Made:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = given.work / "prepared.onnx", given.work / "ort-static.onnx"
    quant_pre_process(str(given.plain_onnx), str(prepared))
    quantize_static(str(prepared), str(path), Calibration(given.calibrate))
    return with_onnxruntime(path)


def optimum_dynamic(given: Given) -> Made:
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    return _optimum(given, AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True), "optimum-dynamic")


def optimum_static(given: Given) -> Made:
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    return _optimum(given, AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True), "optimum-static")


def _optimum(given: Given, how: object, name: str) -> Made:
    from datasets import Dataset
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig

    quantizer = ORTQuantizer(given.plain_onnx)
    ranges = None
    if how.is_static:  # type: ignore[attr-defined]
        # A transform of its own: the numpy format asks torchvision for a video reader that it no longer has.
        data = Dataset.from_dict({"pixels": given.calibrate.tolist()}).with_transform(
            lambda rows: {"pixels": [np.asarray(sample, dtype=np.float32) for sample in rows["pixels"]]}
        )
        ranges = quantizer.fit(
            data,
            AutoCalibrationConfig.minmax(data),
            onnx_augmented_model_name=str(given.work / "augmented.onnx"),  # else it lands where the command runs
            operators_to_quantize=how.operators_to_quantize,  # type: ignore[attr-defined]
        )
    quantizer.quantize(how, given.work / name, calibration_tensors_range=ranges)
    return with_onnxruntime(given.work / name / "plain_quantized.onnx")


def openvino_float(given: Given) -> Made:
    return _openvino(given, quantise=False)


def openvino_nncf(given: Given) -> Made:
    return _openvino(given, quantise=True)


def _openvino(given: Given, *, quantise: bool) -> Made:
    import openvino

    model = openvino.convert_model(open_clip_model(given).visual, example_input=torch.from_numpy(given.calibrate[:1]))
    if quantise:
        import nncf

        model = nncf.quantize(model, nncf.Dataset([sample[None] for sample in given.calibrate]))
    path = given.work / f"openvino-{'nncf' if quantise else 'float'}.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    network = openvino.Core().compile_model(path, "CPU", settings)
    return (lambda pixels: normalised(network(pixels)[0])), path.with_suffix(".bin").stat().st_size


def ours_fp32(given: Given) -> Made:
    return _ours(given, "onnx", "fp32")


def ours_int8(given: Given) -> Made:
    return _ours(given, "onnx", "int8")


def ours_int8_openvino(given: Given) -> Made:
    return _ours(given, "openvino", "int8")


def _ours(given: Given, format: str, precision: str) -> Made:
    from clip_rd_edge.contract.bundle import read_manifest
    from clip_rd_edge.runtime.load import load

    bundle = given.work / f"ours-{format}-{precision}"
    how = ["--format", format, "--precision", precision, "--threads", "1", "--force", "-o", str(bundle)]
    subprocess.run([sys.executable, "-m", "clip_rd_edge", "export", str(given.run), *how], check=True)
    return load(bundle, threads=1).encode_pixels, (bundle / read_manifest(bundle).image.file).stat().st_size


WAYS: dict[str, Callable[[Given], Made]] = {
    "open_clip, torch eager": eager,
    "open_clip, torch.compile": compiled,
    "torch.onnx.export, ONNX Runtime": plain_export,
    "ONNX Runtime's quantize_dynamic": ort_dynamic,
    "ONNX Runtime's quantize_static": ort_static,
    "Optimum-ONNX, avx512_vnni, dynamic": optimum_dynamic,
    "Optimum-ONNX, avx512_vnni, static": optimum_static,
    "OpenVINO's converter, FP32": openvino_float,
    "OpenVINO's converter, NNCF INT8": openvino_nncf,
    "clip-rd-edge, FP32": ours_fp32,
    "clip-rd-edge, INT8": ours_int8,
    "clip-rd-edge, INT8 for OpenVINO": ours_int8_openvino,
}
