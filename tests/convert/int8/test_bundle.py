"""What becomes of towers that INT8 makes no better, by what the user allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.contract.bundle import Manifest, Measurement
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.int8.search import QuantizedTower, TowerSamples
from clip_rd_edge.convert.int8.select import Trial
from clip_rd_edge.convert.options import ExportRequest, Fallback
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.models.clip import ClipModel

MEASURED = Measurement(
    latency_ms_p50=1, latency_ms_p95=1, speedup=1, max_difference=0, cosine=1, centred_cosine=1, samples=24,
    threads=1, machine="any",
)  # fmt: skip


class Export:
    """Exports the tiny student in INT8, as if only the towers `better` were better in it."""

    def __init__(
        self,
        student: ClipModel,
        source: Path,
        calibration: CalibrationSet,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.student, self.source, self.calibration, self.output = student, source, calibration, output
        self.better: tuple[str, ...] = ()
        monkeypatch.setattr("clip_rd_edge.convert.int8.bundle.quantize_tower", self.quantize)

    def quantize(self, model: Path, samples: TowerSamples, **_: object) -> QuantizedTower:
        tower = samples.tower
        trial = Trial(
            tower=tower,
            name="static",
            latency_ratio=0.6,
            centred_cosine=0.987,
            size_ratio=0.3,
            loss_points=0.0,
            verdict="",
        )
        if tower in self.better:
            return QuantizedTower(model.read_bytes(), "int8 static", "", MEASURED, (trial,))
        return QuantizedTower(None, "fp32", f"float32: {tower} is no better.", MEASURED, (trial,))

    def __call__(self, fallback: Fallback | None = None) -> Manifest:
        return export_bundle(
            self.student,
            self.output,
            ExportRequest(precision="int8", fallback=fallback),
            calibration=self.calibration,
            source=self.source,
        ).manifest


@pytest.fixture
def export(
    student: ClipModel,
    fp32_bundle: Path,
    calibration: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Export:
    return Export(student, fp32_bundle, calibration, tmp_path / "bundle", monkeypatch)


def test_where_no_tower_is_better_nothing_is_written_and_the_alternatives_are_named(export: Export) -> None:
    with pytest.raises(ClipRdEdgeError, match=r"not worth shipping .* image is no better\. text .* no better") as error:
        export()
    assert error.value.exit_code == 1
    assert error.value.hint.startswith("--fallback fp32 ships float32")
    assert error.value.hint.endswith("--min-agreement 0.98 what came nearest")
    assert not export.output.exists()


def test_one_tower_of_two_may_stay_float32_unless_that_is_refused(export: Export) -> None:
    export.better = ("text",)
    made = export()
    assert (made.precision, made.image.precision, made.text.precision) == ("fp32 + int8", "fp32", "int8 static")
    assert made.image.note == "float32: image is no better."
    export.output = export.output.with_name("none")
    with pytest.raises(ClipRdEdgeError, match="on this machine: image tower: image is no better") as error:
        export("none")
    assert "text" not in str(error.value)


@pytest.mark.parametrize("fallback", ["fp32", "fp16"])
def test_with_a_fallback_both_towers_take_it(export: Export, fallback: Fallback) -> None:
    made = export(fallback)
    assert made.precision == made.image.precision == made.text.precision == fallback
    assert "text is no better" in made.text.note
    shrunk = (export.output / "text.onnx").stat().st_size / (export.source / "text.onnx").stat().st_size
    assert shrunk == pytest.approx(1 if fallback == "fp32" else 0.5, abs=0.05)
