"""What an INT8 export says beyond its choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clip_rd_edge.bundle.manifest import Tower, read_manifest
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import Job
from clip_rd_edge.exporting.int8 import trials as remarks
from clip_rd_edge.exporting.int8.search import ORT
from clip_rd_edge.exporting.int8.trials import QuantizedTower, Trial
from clip_rd_edge.exporting.plan import Budget, Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends import openvino
from clip_rd_edge.runtime.backends.onnxruntime import open_session


def outcome(*trials: tuple[str, float, float, str]) -> QuantizedTower:
    entry = Tower(file="image.onnx", input_name="x", output_name="y", precision="fp32")
    made = [
        Trial(tower="image", name=name, latency_ratio=ratio, centred_cosine=cosine, size_ratio=0.3, verdict=verdict)
        for name, ratio, cosine, verdict in trials
    ]
    return QuantizedTower(None, entry, tuple(made))


@pytest.fixture
def job(student: ClipModel, calibration: CalibrationSet, fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """An export on a processor that computes BF16, without OpenVINO."""
    monkeypatch.setattr(remarks, "instruction_sets", lambda: ("AVX-512 BF16",))
    monkeypatch.setattr(remarks, "find_spec", lambda name: None)
    fp32 = read_manifest(fp32_bundle)
    return Job(plan=Plan(), clip=student, source=fp32_bundle, fp32=fp32, folder=fp32_bundle, samples=calibration)


def test_an_accurate_candidate_that_takes_little_longer_is_named_with_the_limit_that_ships_it(job: Job) -> None:
    found = outcome(("a", 0.50, 0.9937, "shipped"), ("b", 0.54, 0.9999, ""), ("c", 0.8, 0.99999, ""))
    (remark,) = remarks.remarks(job, {"image": found}, ORT)
    limit = float(remark.partition("--min-agreement ")[2].partition(",")[0])
    assert remark.startswith("image tower: b ")
    assert 0.9937 < limit < 0.9999
    others = outcome(("a", 0.50, 0.9990, "shipped"), ("b", 0.54, 0.9992, ""), ("c", 0.8, 0.99999, ""))
    assert not list(remarks.remarks(job, {"image": others}, ORT))


@pytest.mark.parametrize(("bf16", "min_agreement", "command"), [
    (4.0, 0.9, "--format openvino --precision bf16"), (9.5, 0.9, "--format openvino"), (9.5, 0.999999, None)
])  # fmt: skip
def test_the_fastest_way_in_openvino_that_is_accurate_enough_is_named(
    job: Job, bf16: float, min_agreement: float, command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms = {"": 10.0, "BF16": bf16, "INT8 of its own": 5.0}
    monkeypatch.setattr(remarks, "find_spec", lambda name: name == "openvino")
    monkeypatch.setattr(remarks, "latencies", lambda sessions, *_, **__: {way: [ms[way]] for way in sessions})
    monkeypatch.setattr(openvino, "open_openvino", lambda model, *, threads, bf16=False: open_session(model))
    job = replace(job, plan=Plan(budget=Budget(image=min_agreement)))
    found = {"image": outcome(("a", 0.9, 0.999, "shipped"))}
    said = [remark.rpartition(": ")[2] for remark in remarks.remarks(job, found, ORT)]
    assert said == ([command] if command else [])
