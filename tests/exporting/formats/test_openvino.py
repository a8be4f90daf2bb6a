from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import Job
from clip_rd_edge.exporting.formats.openvino import nncf_is_installed, quantize_by_nncf
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.parity import embed
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")


def test_a_bundle_for_openvino_runs_and_is_measured_in_openvino(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    manifest = export_bundle(
        student, bundle, Plan(precision="fp32", format="openvino", labels=("cat",)), source=fp32_bundle
    ).manifest
    assert (manifest.target, manifest.precision) == ("openvino", "fp32")
    assert manifest.image.measured is not None
    assert 0 < manifest.image.measured.max_difference < 1e-5  # another runtime rounds differently
    assert load(bundle).describe().runtime == "openvino"
    assert load(bundle, runtime="onnxruntime").describe().runtime == "onnxruntime"
    assert all(check.passed for check in verify_bundle(bundle))


def test_bfloat16_is_a_hint_in_the_manifest(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"converted": np.full(5, 3.0), "fp32": np.full(5, 2.0)}
    monkeypatch.setattr("clip_rd_edge.exporting.parity.time_in_turn", lambda _: slow)
    plan = Plan(precision="bf16", format="openvino")
    job = Job(plan=plan, clip=student, source=fp32_bundle, fp32=read_manifest(fp32_bundle), folder=tmp_path)
    manifest = plan.converter.convert(job).manifest
    assert manifest.image.precision == manifest.text.precision == "bf16"
    assert (tmp_path / "image.onnx").read_bytes() == (fp32_bundle / "image.onnx").read_bytes()
    assert "OpenVINO takes 1.50 times as long" in manifest.image.note
    assert manifest.image.measured is not None
    assert manifest.image.measured.centred_cosine > 0.99


@pytest.mark.slow
def test_int8_candidates_are_tried_in_openvino(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    converted = export_bundle(
        student,
        tmp_path / "bundle",
        Plan(precision="int8", format="openvino", fallback="fp32"),
        source=fp32_bundle,
        samples=calibration,
    )
    manifest, trials = converted.manifest, {f"{trial.tower} {trial.name}" for trial in converted.trials}
    assert manifest.target == "openvino"
    embeddings = ", and token embeddings"
    assert {"image symmetric, percentile", f"text symmetric, percentile{embeddings}"} <= trials
    assert {"image static, min-max", f"text static, min-max{embeddings}"} <= trials
    assert ("image NNCF" in trials) == nncf_is_installed()
    assert not any("dynamic" in trial for trial in trials)


@pytest.mark.skipif(not nncf_is_installed(), reason="needs nncf")
def test_embeddings_are_normalised_where_nncf_quantises_a_cnn(
    fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    prepared = prepare_for_quantization(fp32_bundle / "image.onnx", tmp_path)
    content = quantize_by_nncf(prepared, calibration.calibrate.pixels, 7)
    embeddings = embed(open_session(content), 3 * calibration.held_out.pixels)  # norms beyond those it has seen
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
