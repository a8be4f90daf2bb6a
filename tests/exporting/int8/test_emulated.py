"""Bundles on emulated processors; needs `apt-get install qemu-user-static`, and for Arm `debootstrap`, too."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_model

from benchmarks.devices.emulate import ARM_CACHE, environment_of, interpreter
from clip_rd_edge.bundle.formats import Precision
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.methods import StaticQuantizer
from clip_rd_edge.exporting.parity import NodeByNode, add_reference, hard_pixels
from clip_rd_edge.exporting.plan import Plan, WeightBits
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import processor_saturates

x86 = pytest.mark.skipif(not shutil.which("qemu-x86_64-static"), reason="qemu-user-static is not installed")
arm = pytest.mark.skipif(
    not shutil.which("qemu-aarch64-static") or not (shutil.which("debootstrap") or (ARM_CACHE / "complete").is_file()),
    reason="qemu-user-static or debootstrap is not installed",
)


@x86
@pytest.mark.slow
@pytest.mark.parametrize("bits", [7, 8])
def test_verify_finds_out_that_8_bits_saturate_on_an_x86_processor_without_vnni(
    bits: WeightBits, fp32_bundle: Path, tmp_path: Path
) -> None:
    bundle = _int8_bundle(fp32_bundle, bits, tmp_path)
    assert _agreement_on("native", bundle)[0] > 0.995 or processor_saturates()
    agreement, passed = _agreement_on("Haswell", bundle)
    assert passed == (bits == 7)
    assert agreement > 0.995 if bits == 7 else agreement < 0.9, agreement  # the limit is 0.99


@arm
@pytest.mark.slow
@pytest.mark.parametrize("processor", ["cortex-a53", "cortex-a76"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_bundles_give_the_exporters_answers_on_arm(
    precision: Precision, processor: str, student: ClipModel, fp32_bundle: Path, tmp_path: Path
) -> None:
    if precision == "int8":
        bundle = _int8_bundle(fp32_bundle, 7, tmp_path)
    else:
        bundle = tmp_path / "bundle"
        export_bundle(student, bundle, Plan(precision=precision), source=fp32_bundle)
    agreement, passed = _agreement_on(processor, bundle)
    assert passed
    # The A76 computes in FP16, 0.9996 with ONNX Runtime 1.32; the A53 converts to float32.
    assert agreement > {"fp16": 0.999, "int8": 0.995}[precision], agreement


def _int8_bundle(fp32: Path, bits: WeightBits, folder: Path) -> Path:
    """A copy of a bundle whose image tower is one convolution in INT8."""
    bundle = Path(shutil.copytree(fp32, folder / "bundle"))
    manifest = read_manifest(bundle)
    quantizer = StaticQuantizer(
        prepare_for_quantization(_tower_of_signs(folder), folder),
        hard_pixels(manifest.preprocessing),
        weight_bits=bits,
    )
    (bundle / "image.onnx").write_bytes(quantizer.quantize("min-max", quantizer.layers))
    image = msgspec.structs.replace(manifest.image, input_name="x", output_name="y", precision="int8")
    manifest = msgspec.structs.replace(manifest, image=image, files={})
    add_reference(bundle, NodeByNode(bundle, manifest))
    write_manifest(bundle, manifest)
    return bundle


def _agreement_on(processor: str, bundle: Path) -> tuple[float, bool]:
    """The lowest agreement of a tower that `verify` finds on a processor, and whether all checks pass."""
    done = subprocess.run(
        [*interpreter(processor), "-m", "clip_rd_edge", "verify", str(bundle), "--json"],
        env=environment_of(processor),
        check=False,
        timeout=1200,
        capture_output=True,
        text=True,
    )
    checks = json.loads(done.stdout)
    assert done.returncode == any(not check["passed"] for check in checks), done.stderr
    return min(check["agreement"] for check in checks if check["agreement"] is not None), done.returncode == 0


def _tower_of_signs(folder: Path) -> Path:
    """A convolution whose weights are all 1 or -1, so that many neighbouring products are large and of one sign."""
    weights = np.random.default_rng(1).choice(np.float32([-1, 1]), (32, 3, 3, 3))
    nodes = [
        helper.make_node("Conv", ["x", "weights"], ["features"], name="conv"),
        helper.make_node("GlobalAveragePool", ["features"], ["means"], name="pool"),
        helper.make_node("Flatten", ["means"], ["flat"], name="flatten"),
        helper.make_node("LpNormalization", ["flat"], ["y"], name="normalise"),
    ]
    path = folder / "signs.onnx"
    onnx.save(onnx_model(nodes, {"x": ["N", 3, "H", "W"]}, {"y": ["N", 32]}, {"weights": weights}), path)
    return path
