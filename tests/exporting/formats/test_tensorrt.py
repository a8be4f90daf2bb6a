"""TensorRT: typed ONNX, engines built without a GPU, and the scripts that build them on the device, by a stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from support import NOT_ADAPTED, float32_tower

from clip_rd_edge.bundle.manifest import read_manifest, require_current_engine
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import tensorrt
from clip_rd_edge.exporting.formats.onnx import fp16_tower, to_fp16
from clip_rd_edge.exporting.formats.tensorrt import (
    build_engine,
    int8_tower,
    layer_types,
    mistyped_layers,
    write_build_files,
)
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.methods import measure_ranges
from clip_rd_edge.exporting.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.parity import hard_pixels
from clip_rd_edge.exporting.plan import Budget, Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.verify import verify_bundle

# Accepts trtexec's options and an existing ONNX file; the engine that it writes contains its arguments.
_TRTEXEC = """#!/usr/bin/env python3
import sys, pathlib
known = {"onnx", "saveEngine", "stronglyTyped", "skipInference", "minShapes", "optShapes", "maxShapes",
         "timingCacheFile", "profilingVerbosity"}
options = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
if set(options) - known or not pathlib.Path(options["onnx"]).is_file():
    sys.exit("unknown option or no such model")
pathlib.Path(options["saveEngine"]).write_text("\\n".join(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that is copied to the device."""
    bundle = tmp_path_factory.mktemp("jetson") / "bundle"
    export_bundle(
        student,
        bundle,
        Plan(precision="int8", format="trt", target="jetson-orin", provenance=NOT_ADAPTED),
        source=fp32_bundle,
        samples=calibration,
    )
    return bundle


def _build(folder: Path, trtexec: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRTEXEC": str(trtexec)}
    return subprocess.run([folder / "build.sh"], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def trtexec(tmp_path: Path) -> Path:
    """An executable stand-in for trtexec."""
    path = tmp_path / "trtexec"
    path.write_text(_TRTEXEC)
    path.chmod(0o755)
    return path


def test_the_folder_is_complete(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.target == "tensorrt jetson-orin"
    built = {"build.sh", "build.py", "SHA256SUMS"}
    assert set(manifest.files) == built | {
        "image.onnx", "text.onnx", "tokenizer.json", "reference.npz", "background.npz"
    }  # fmt: skip
    compile((folder / "build.py").read_text(), "build.py", "exec")  # raises if it is not Python
    assert all(check.passed for check in verify_bundle(folder, device="cpu"))


def test_build_sh_calls_trtexec_for_both_engines(folder: Path, trtexec: Path) -> None:
    process = _build(folder, trtexec)
    assert process.returncode == 0, process.stderr
    arguments = {name: (folder / f"{name}.engine").read_text().splitlines() for name in ("image", "text")}
    for name, input_name, shape in (("image", "pixel_values", "3x32x32"), ("text", "input_ids", "16")):
        assert set(arguments[name]) == {
            f"--onnx={name}.onnx",
            f"--saveEngine={name}.engine.part",
            "--stronglyTyped",
            "--skipInference",
            f"--minShapes={input_name}:1x{shape}",
            f"--optShapes={input_name}:1x{shape}",
            f"--maxShapes={input_name}:8x{shape}",
            "--timingCacheFile=timing.cache",
            "--profilingVerbosity=detailed",
        }
    assert not list(folder.glob("*.part"))
    _require_current_engines(folder)
    for name in arguments:
        (folder / f"{name}.engine").unlink()


def _require_current_engines(folder: Path) -> None:
    manifest = read_manifest(folder)
    for name, tower in manifest.towers.items():
        require_current_engine(folder, manifest, tower, f"{name}.engine")  # raises if the stamp does not fit
        stamp = (folder / f"{name}.engine.sha256").read_text().splitlines()
        assert [line.split("  ")[1] for line in stamp] == [f"{name}.onnx", f"{name}.engine"]


def test_the_onnx_files_meet_tensorrts_requirements(folder: Path) -> None:
    for name in ("image", "text"):
        model = onnx.load(folder / f"{name}.onnx")
        assert 17 <= model.opset_import[0].version <= 20  # TensorRT 10.3 parses up to 20
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
        assert len(pairs) > 10
        for node in pairs:
            assert constants[node.input[1]].dtype == np.float16
            assert constants[node.input[2]].dtype == np.int8
            assert not constants[node.input[2]].any()
        weights = [node for node in pairs if node.input[0] in constants]
        assert weights
        assert all(constants[node.input[1]].ndim == 1 for node in weights)


@pytest.mark.parametrize("name", ["a\ntouch injected #\rb", 'run\\N, say """hi""", encoding=none'])
def test_nothing_in_a_models_name_is_run_on_the_device(
    fp32_bundle: Path, trtexec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bundle = shutil.copytree(fp32_bundle, tmp_path / "bundle")
    write_build_files(bundle, msgspec.structs.replace(read_manifest(bundle), name=name), title="a device")
    monkeypatch.chdir(tmp_path)
    process = _build(bundle, trtexec)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "injected").exists()
    compile((bundle / "build.py").read_bytes(), "build.py", "exec")  # raises if it is not Python


@pytest.mark.tensorrt
def test_build_py_builds_both_engines(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'clip-rd-edge[rtx]'")
    # TensorRT for RTX stands in for TensorRT; without a GPU, its compute capability has to be set.
    (tmp_path / "tensorrt.py").write_text(
        "from tensorrt_rtx_bindings import *\n"
        "from tensorrt_rtx_bindings import __version__, Builder as _Builder, ComputeCapability\n"
        "class Builder(_Builder):\n"
        "    def create_builder_config(self):\n"
        "        config = super().create_builder_config()\n"
        "        config.num_compute_capabilities = 1\n"
        "        config.set_compute_capability(ComputeCapability.SM86, 0)\n"
        "        return config\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, folder / "build.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    for name in ("image", "text"):
        assert (folder / f"{name}.engine").stat().st_size > 100_000
    _require_current_engines(folder)
    for name in ("image", "text"):
        (folder / f"{name}.engine").unlink()


# The types that layers compute in.


def test_a_tower_that_float16_spoils_beside_int8_is_not_shipped(
    fp32_bundle: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
        typed = to_fp16(model, **options)
        for tensor in typed.graph.initializer:
            if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1:
                flipped = np.ascontiguousarray(numpy_helper.to_array(tensor)[::-1])
                tensor.CopyFrom(numpy_helper.from_array(flipped, tensor.name))
        return typed

    monkeypatch.setattr(tensorrt, "to_fp16", spoiled)
    monkeypatch.setattr(tensorrt, "robust_layers", lambda layers, *_, **__: [layers[1:]])
    plan = Plan(budget=Budget(image=0.9), provenance=NOT_ADAPTED)
    tower = float32_tower(fp32_bundle, "image", calibration, plan=plan, calibrate=calibration.calibrate.pixels[:8])
    assert int8_tower(tower, tower.calibrate).precision == "fp16"


def test_layers_that_no_kernel_computes_in_their_type_are_found_in_the_log() -> None:
    kernel = "Name: {0}, LayerType: {1}, Inputs: [{{Datatype: {2}}}], Constants: [], Metadata: [ONNX Layer: {0}]"
    log = "\n".join(
        kernel.format(*of) for of in (("a", "gemm", "Int8"), ("b", "reformat", "Half"), ("b", "gemm", "Float"))
    )
    assert mistyped_layers(log, {"a": "Int8", "b": "Half", "c": "Half"}) == ["b", "c"]


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra rtx")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("trunk", "target"), [("resnet10t", "sm86"), ("mobilevit_xxs", "sm89")])
def test_an_image_engine_computes_in_the_requested_type(
    trunk: str, target: str, image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path
) -> None:
    clip, path = image_tower(trunk)
    prepared = onnx.load(prepare_for_quantization(path, tmp_path))
    pixels = hard_pixels(clip.preprocessing)
    tower = fp16_tower(path, pixels)
    assert tower.model is not None
    products = [node.name for node in prepared.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    engine = build_engine(tower.model, target=target)
    assert layer_types(tower.model) == dict.fromkeys(products, "Half")
    assert mistyped_layers(engine.log, layer_types(tower.model)) == []
    # In float32, the same check reports every layer, which shows that it can fail.
    layers = [node.name for node in weighted_layers(prepared)]
    fp32 = build_engine(path.read_bytes(), target=target)
    assert len(mistyped_layers(fp32.log, dict.fromkeys(layers, "Half"))) == len(layers)
    assert len(engine.content) < 0.9 * len(fp32.content)
    ranges = measure_ranges(prepared, quantized_inputs(prepared), pixels)["percentile"]
    quantized = to_fp16(quantize_symmetrically(prepared, ranges))
    int8 = build_engine(quantized.SerializeToString(), target=target)
    assert mistyped_layers(int8.log, dict.fromkeys(layers, "Int8")) == []


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_a_bundle_holds_engines_and_their_onnx_files(
    target: str, student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    bundle = tmp_path / "engines"
    manifest = export_bundle(
        student,
        bundle,
        Plan(precision="int8", format="trt", target=target, labels=("cat",)),
        source=fp32_bundle,
        samples=calibration,
    ).manifest
    assert manifest.target == f"tensorrt-rtx {target}"
    types = layer_types((bundle / "text.onnx").read_bytes())  # which the export has found in the engine, too
    assert list(types.values()).count("Int8") == 13
    assert (manifest.image.engine, manifest.text.engine) == ("image.engine", "text.engine")
    assert {"image.onnx", "image.engine", "text.onnx", "text.engine"} < set(manifest.files)
    assert manifest.image.precision.startswith("int8 symmetric")
    assert manifest.image.measured is None  # this machine's latency would not be the GPU's
    assert "Its centred cosine with float32 is 0.9" in manifest.image.note
    assert all(check.passed for check in verify_bundle(bundle, device="cpu"))
