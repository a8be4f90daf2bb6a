"""The folder that builds its own engines, such as a Jetson's, by its scripts against a stand-in for TensorRT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clip_rd_edge.contract.bundle import read_manifest
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.verify import verify_bundle

# Knows trtexec's flags, and takes only an ONNX file that is there; what it was asked is the engine that it writes.
_TRTEXEC = """#!/usr/bin/env python3
import sys, pathlib
known = {"onnx", "saveEngine", "stronglyTyped", "skipInference", "minShapes", "optShapes", "maxShapes",
         "timingCacheFile", "profilingVerbosity"}
given = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
if set(given) - known or not pathlib.Path(given["onnx"]).is_file():
    sys.exit("unknown option or no such model")
pathlib.Path(given["saveEngine"]).write_text("\\n".join(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What is copied to the device."""
    made = tmp_path_factory.mktemp("jetson") / "bundle"
    export_bundle(
        student,
        made,
        ExportRequest(precision="int8", format="trt", target="jetson-orin"),
        source=fp32_bundle,
        calibration=calibration,
    )
    return made


def _build(folder: Path, trtexec: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRTEXEC": str(trtexec)}
    return subprocess.run([folder / "build.sh"], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def trtexec(tmp_path: Path) -> Path:
    """The stand-in, executable."""
    path = tmp_path / "trtexec"
    path.write_text(_TRTEXEC)
    path.chmod(0o755)
    return path


def test_the_folder_is_whole(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.target == "tensorrt jetson-orin"
    assert {"build.sh", "build.py", "SHA256SUMS", "image.onnx", "text.onnx", "tokenizer.json"} == set(manifest.files)
    assert all(check.passed for check in verify_bundle(folder))


def test_a_graphics_card_gets_the_same_in_half_precision(
    student: ClipModel, fp32_bundle: Path, trtexec: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    export_bundle(student, made, ExportRequest(precision="fp16", format="trt", target="nvidia-gpu"), source=fp32_bundle)
    assert read_manifest(made).target == "tensorrt nvidia-gpu"
    assert "NVIDIA GPU with TensorRT 10 or 11" in (made / "build.sh").read_text()
    done = _build(made, trtexec)
    assert done.returncode == 0, done.stderr
    assert (made / "image.engine").is_file()
    assert (made / "text.engine").is_file()


def test_build_sh_asks_trtexec_for_both_engines(folder: Path, trtexec: Path) -> None:
    done = _build(folder, trtexec)
    assert done.returncode == 0, done.stderr
    asked = {name: (folder / f"{name}.engine").read_text().splitlines() for name in ("image", "text")}
    for name, given, shape in (("image", "pixel_values", "3x32x32"), ("text", "input_ids", "16")):
        assert set(asked[name]) == {
            f"--onnx={name}.onnx",
            f"--saveEngine={name}.engine.part",
            "--stronglyTyped",
            "--skipInference",
            f"--minShapes={given}:1x{shape}",
            f"--optShapes={given}:1x{shape}",
            f"--maxShapes={given}:8x{shape}",
            "--timingCacheFile=timing.cache",
            "--profilingVerbosity=detailed",
        }
    assert not list(folder.glob("*.part"))
    for name in asked:
        (folder / f"{name}.engine").unlink()


def test_the_onnx_files_are_what_tensorrt_takes(folder: Path) -> None:
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
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damaged = bytearray((copy / "text.onnx").read_bytes())
    damaged[1000] ^= 1
    (copy / "text.onnx").write_bytes(damaged)
    done = _build(copy, trtexec)
    assert done.returncode != 0
    assert "text.onnx" in done.stdout + done.stderr
    assert not (copy / "image.engine").exists()
    done = _build(folder, tmp_path / "none")
    assert (done.returncode, "hint: sudo apt install tensorrt" in done.stderr) == (2, True)


@pytest.mark.tensorrt
def test_build_py_builds_both_engines(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'clip-rd-edge[rtx]'")
    # TensorRT for RTX stands in for TensorRT; without a GPU it has to be told what it builds for.
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
    done = subprocess.run(
        [sys.executable, folder / "build.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("image", "text"):
        assert (folder / f"{name}.engine").stat().st_size > 100_000
        (folder / f"{name}.engine").unlink()
