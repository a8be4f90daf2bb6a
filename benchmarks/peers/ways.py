"""Implementations of one student's image tower: what a user would write with each peer, following its documentation.

Each implementation is a function of a `Setup` that returns a `PeerTower`. All of them use the text embeddings of the
float32 student, so that only the image tower differs.
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

Pixels = npt.NDArray[np.float32]
Embeddings = npt.NDArray[np.float32]
Embed = Callable[[Pixels], Embeddings]


@dataclass(frozen=True)
class PeerTower:
    """An image tower in one implementation.

    Attributes:
        embed: pixels, (N, 3, H, W) float32, to L2-normalised embeddings, (N, D).
        size_bytes: size of the files that it needs.
    """

    embed: Embed
    size_bytes: int


@dataclass(frozen=True)
class Setup:
    """The inputs of all implementations.

    Attributes:
        run: folder of the student's run.
        student: the student as an open_clip folder.
        calibration: pixels for calibration, (N, 3, H, W).
        work: folder for files.
    """

    run: Path
    student: Path
    calibration: Pixels
    work: Path

    @property
    def plain_onnx(self) -> Path:
        """The image tower as `torch.onnx.export` writes it with default options."""
        path = self.work / "plain.onnx"
        if not path.is_file():
            model = open_clip_model(self)
            program = torch.onnx.export(
                model.visual,
                (torch.from_numpy(self.calibration[:2]),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                input_names=["pixels"],
                verbose=False,
            )
            program.save(str(path), external_data=False)
        return path


class Calibration:
    """ONNX Runtime's calibration data reader."""

    def __init__(self, pixels: Pixels) -> None:
        self._samples: Iterator[Pixels] = (sample[None] for sample in pixels)

    def get_next(self) -> dict[str, Pixels] | None:
        sample = next(self._samples, None)
        return None if sample is None else {"pixels": sample}


def open_clip_model(setup: Setup) -> torch.nn.Module:
    import open_clip

    model: torch.nn.Module = open_clip.create_model(f"local-dir:{setup.student}").eval()
    return model


def normalise(rows: Embeddings) -> Embeddings:
    normalised: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalised


def with_onnxruntime(path: Path) -> PeerTower:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return PeerTower(lambda pixels: normalise(session.run(None, {name: pixels})[0]), path.stat().st_size)


def eager(setup: Setup) -> PeerTower:
    return _open_clip(setup, compiled=False)


def compiled(setup: Setup) -> PeerTower:
    return _open_clip(setup, compiled=True)


def _open_clip(setup: Setup, *, compiled: bool) -> PeerTower:
    model = open_clip_model(setup)
    if compiled:
        model.visual = torch.compile(model.visual)

    @torch.inference_mode()
    def embed(pixels: Pixels) -> Embeddings:
        rows: Embeddings = model.encode_image(torch.from_numpy(pixels), normalize=True).numpy()  # type: ignore[operator]
        return rows

    return PeerTower(embed, (setup.student / "open_clip_model.safetensors").stat().st_size)


def plain_export(setup: Setup) -> PeerTower:
    return with_onnxruntime(setup.plain_onnx)


def ort_dynamic(setup: Setup) -> PeerTower:
    from onnxruntime.quantization import quantize_dynamic

    path = setup.work / "ort-dynamic.onnx"
    quantize_dynamic(str(setup.plain_onnx), str(path))
    return with_onnxruntime(path)


def ort_static(setup: Setup) -> PeerTower:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = setup.work / "prepared.onnx", setup.work / "ort-static.onnx"
    quant_pre_process(str(setup.plain_onnx), str(prepared))
    quantize_static(str(prepared), str(path), Calibration(setup.calibration))
    return with_onnxruntime(path)


def optimum_dynamic(setup: Setup) -> PeerTower:
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    return _optimum(setup, AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True), "optimum-dynamic")


def optimum_static(setup: Setup) -> PeerTower:
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    return _optimum(setup, AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True), "optimum-static")


def _optimum(setup: Setup, config: object, name: str) -> PeerTower:
    from datasets import Dataset
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig

    quantizer = ORTQuantizer(setup.plain_onnx)
    ranges = None
    if config.is_static:  # type: ignore[attr-defined]
        # A custom transform: the numpy format needs a video reader that torchvision no longer has.
        data = Dataset.from_dict({"pixels": setup.calibration.tolist()}).with_transform(
            lambda rows: {"pixels": [np.asarray(sample, dtype=np.float32) for sample in rows["pixels"]]}
        )
        ranges = quantizer.fit(
            data,
            AutoCalibrationConfig.minmax(data),
            # By default, this file is written to the current directory.
            onnx_augmented_model_name=str(setup.work / "augmented.onnx"),
            operators_to_quantize=config.operators_to_quantize,  # type: ignore[attr-defined]
        )
    quantizer.quantize(config, setup.work / name, calibration_tensors_range=ranges)
    return with_onnxruntime(setup.work / name / "plain_quantized.onnx")


def openvino_float(setup: Setup) -> PeerTower:
    return _openvino(setup)


def openvino_nncf(setup: Setup) -> PeerTower:
    return _openvino(setup, quantize="default")


def openvino_nncf_transformer(setup: Setup) -> PeerTower:
    return _openvino(setup, quantize="transformer")


def _openvino(setup: Setup, *, quantize: str = "") -> PeerTower:
    import openvino

    model = openvino.convert_model(open_clip_model(setup).visual, example_input=torch.from_numpy(setup.calibration[:1]))
    if quantize:
        import nncf

        kind = nncf.ModelType.TRANSFORMER if quantize == "transformer" else None
        model = nncf.quantize(model, nncf.Dataset([sample[None] for sample in setup.calibration]), model_type=kind)
    path = setup.work / f"openvino-{quantize or 'float'}.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    network = openvino.Core().compile_model(path, "CPU", settings)
    return PeerTower(lambda pixels: normalise(network(pixels)[0]), path.with_suffix(".bin").stat().st_size)


def ours_fp32(setup: Setup) -> PeerTower:
    return _ours(setup, "onnx", "fp32")


def ours_int8(setup: Setup) -> PeerTower:
    return _ours(setup, "onnx", "int8")


def ours_int8_openvino(setup: Setup) -> PeerTower:
    return _ours(setup, "openvino", "int8")


def _ours(setup: Setup, format: str, precision: str) -> PeerTower:
    from clip_rd_edge.bundle.manifest import read_manifest
    from clip_rd_edge.runtime.load import load

    bundle = setup.work / f"ours-{format}-{precision}"
    options = ["--format", format, "--precision", precision, "--threads", "1", "--force", "-o", str(bundle)]
    subprocess.run([sys.executable, "-m", "clip_rd_edge", "export", str(setup.run), *options], check=True)
    size_bytes = (bundle / read_manifest(bundle).image.file).stat().st_size
    return PeerTower(load(bundle, threads=1).encode_pixels, size_bytes)


IMPLEMENTATIONS: dict[str, Callable[[Setup], PeerTower]] = {
    "open_clip, torch eager": eager,
    "open_clip, torch.compile": compiled,
    "torch.onnx.export, ONNX Runtime": plain_export,
    "ONNX Runtime's quantize_dynamic": ort_dynamic,
    "ONNX Runtime's quantize_static": ort_static,
    "Optimum-ONNX, avx512_vnni, dynamic": optimum_dynamic,
    "Optimum-ONNX, avx512_vnni, static": optimum_static,
    "OpenVINO's converter, FP32": openvino_float,
    "OpenVINO's converter, NNCF INT8": openvino_nncf,
    "the same, for transformers": openvino_nncf_transformer,
    "clip-rd-edge, FP32": ours_fp32,
    "clip-rd-edge, INT8": ours_int8,
    "clip-rd-edge, INT8 for OpenVINO": ours_int8_openvino,
}
