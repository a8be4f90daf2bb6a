"""The scripts of a bundle that is built on the device, such as a Jetson, tested against a stand-in for TensorRT."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clip_rd_edge.bundle.manifest import read_manifest, require_current_engine
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats.tensorrt import write_build_files
from clip_rd_edge.exporting.plan import ExportRequest
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
        ExportRequest(precision="int8", format="trt", target="jetson-orin"),
        source=fp32_bundle,
        calibration=calibration,
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
    files = {"build.sh", "build.py", "SHA256SUMS", "image.onnx", "text.onnx", "tokenizer.json", "reference.npz"}
    assert files == set(manifest.files)
    compile((folder / "build.py").read_text(), "build.py", "exec")  # raises if it is not Python
    assert all(check.passed for check in verify_bundle(folder, device="cpu"))


def test_a_bundle_for_a_graphics_card_builds_in_half_precision(
    student: ClipModel, fp32_bundle: Path, trtexec: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    request = ExportRequest(precision="fp16", format="trt", target="nvidia-gpu")
    export_bundle(student, bundle, request, source=fp32_bundle)
    assert read_manifest(bundle).target == "tensorrt nvidia-gpu"
    assert "NVIDIA GPU with TensorRT 10 or 11" in (bundle / "build.sh").read_text()
    process = _build(bundle, trtexec)
    assert process.returncode == 0, process.stderr
    assert (bundle / "image.engine").is_file()
    assert (bundle / "text.engine").is_file()


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


def test_a_damaged_copy_is_not_built(folder: Path, trtexec: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damaged = bytearray((copy / "text.onnx").read_bytes())
    damaged[1000] ^= 1
    (copy / "text.onnx").write_bytes(damaged)
    process = _build(copy, trtexec)
    assert process.returncode != 0
    assert "text.onnx" in process.stdout + process.stderr
    assert not (copy / "image.engine").exists()
    process = _build(folder, tmp_path / "none")
    assert (process.returncode, "hint: sudo apt install tensorrt" in process.stderr) == (2, True)


@pytest.mark.parametrize("name", ["a\ntouch injected #", "a\rb", "run\\N", 'say """hi"""', "encoding=none"])
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
