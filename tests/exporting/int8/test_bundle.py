"""Fallbacks for towers that INT8 does not improve, depending on what the user allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Watch

from clip_rd_edge.api.exporting import _request
from clip_rd_edge.bundle.formats import FORMATS
from clip_rd_edge.bundle.manifest import Manifest, Measurement
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.int8.search import QuantizedTower, TowerSamples, Trial
from clip_rd_edge.exporting.plan import Budget, ExportRequest, Fallback, plan_exports
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.reporting import SILENT, Reporter

MEASURED = Measurement(
    latency_ms_p50=1, latency_ms_p95=1, speedup=1, max_difference=0, cosine=1, centred_cosine=1, samples=24,
    threads=1, machine="any",
)  # fmt: skip


class Export:
    """Exports the tiny student as if INT8 improved only the towers named in `improved`."""

    def __init__(
        self,
        student: ClipModel,
        source: Path,
        calibration: CalibrationSet,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.student, self.source, self.calibration, self.output = student, source, calibration, output
        self.improved: tuple[str, ...] = ()
        self.adapted, self.judged = dict[str, bool](), dict[str, bool]()
        self.trial = {"latency_ratio": 0.6, "centred_cosine": 0.987, "size_ratio": 0.3, "loss_points": 0.0}
        self.samples, self.options = dict[str, TowerSamples](), dict[str, object]()
        monkeypatch.setattr("clip_rd_edge.exporting.int8.search.quantize_tower", self.quantize)

    def quantize(self, model: Path, samples: TowerSamples, **options: object) -> QuantizedTower:
        tower = samples.tower
        self.adapted[tower], self.judged[tower] = samples.adapt, samples.correct is not None
        self.samples[tower], self.options = samples, options
        trial = Trial(tower=tower, name="static", verdict="", **self.trial)
        if tower in self.improved:
            return QuantizedTower(model.read_bytes(), "int8 static", "", MEASURED, (trial,), True, ("aarch64",))
        return QuantizedTower(None, "fp32", f"float32: {tower} is not improved.", MEASURED, (trial,))

    def __call__(
        self,
        fallback: Fallback | None = None,
        *,
        provenance: dict[str, str] | None = None,
        reporter: Reporter = SILENT,
        **options: Any,
    ) -> Manifest:
        return export_bundle(
            self.student,
            self.output,
            ExportRequest(precision="int8", fallback=fallback, provenance=provenance or {}, **options),
            calibration=self.calibration,
            source=self.source,
            reporter=reporter,
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


def test_if_no_tower_is_improved_nothing_is_written_and_alternatives_are_named(export: Export) -> None:
    with pytest.raises(
        ClipRdEdgeError, match=r"not worth shipping .* image is not improved\. text .* not improved"
    ) as error:
        export()
    assert error.value.exit_code == 1
    assert error.value.hint.startswith("fallback fp32 ships float32")
    assert error.value.hint.endswith("min_agreement 0.98 ships the nearest INT8 candidate")
    assert not export.output.exists()


@pytest.mark.parametrize(
    ("trial", "hint"),
    [
        ({"centred_cosine": 0.999, "loss_points": 10.41}, "max_loss 10.5 ships the nearest INT8 candidate"),
        ({"loss_points": 3.0}, "min_agreement 0.98 max_loss 3.0 ships the nearest INT8 candidate"),
        ({"centred_cosine": -0.2}, "fallback fp16 ships half its size"),  # no limit accepts it
        ({"latency_ratio": 0.98, "size_ratio": 0.9}, "fallback fp16 ships half its size"),
    ],
)
def test_the_hint_names_the_limits_that_would_ship_a_candidate(
    export: Export, trial: dict[str, float], hint: str
) -> None:
    export.trial |= trial
    with pytest.raises(ClipRdEdgeError) as error:
        export()
    assert error.value.hint.split(", ")[-1] == hint


def test_the_hint_names_no_fallback_that_the_format_lacks(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], precisions=("fp32", "int8")))
    with pytest.raises(ClipRdEdgeError) as error:
        export()
    assert "fp16" not in error.value.hint


def test_no_limit_is_named_that_would_ship_only_one_of_two_towers_where_both_are_wanted(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(model: Path, samples: TowerSamples, **_: object) -> QuantizedTower:
        export.trial["latency_ratio"] = 0.5 if samples.tower == "image" else 2.0
        return export.quantize(model, samples)

    monkeypatch.setattr("clip_rd_edge.exporting.int8.search.quantize_tower", quantize)
    hints = []
    for fallback in (None, "none"):
        with pytest.raises(ClipRdEdgeError) as error:
            export(fallback)
        hints.append("min_agreement 0.98" in error.value.hint)
    assert hints == [True, False]


def test_one_of_two_towers_may_stay_float32_unless_that_is_refused(export: Export) -> None:
    export.improved = ("text",)
    manifest = export()
    assert manifest.precision == "fp32 + int8"
    assert (manifest.image.precision, manifest.text.precision) == ("fp32", "int8 static")
    assert manifest.image.note == "float32: image is not improved."
    assert (manifest.text.one_at_a_time, manifest.text.instruction_sets) == (True, ("aarch64",))
    assert (manifest.image.one_at_a_time, manifest.image.instruction_sets) == (False, ())
    export.output = export.output.with_name("none")
    with pytest.raises(ClipRdEdgeError, match="on this machine: image tower: image is not improved") as error:
        export("none")
    assert "text" not in str(error.value)


@pytest.mark.parametrize("fallback", ["fp32", "fp16"])
def test_both_towers_use_the_fallback(export: Export, fallback: Fallback) -> None:
    manifest = export(fallback)
    assert manifest.precision == manifest.image.precision == manifest.text.precision == fallback
    assert "text is not improved" in manifest.text.note
    size_ratio = (export.output / "text.onnx").stat().st_size / (export.source / "text.onnx").stat().st_size
    assert size_ratio == pytest.approx(1 if fallback == "fp32" else 0.5, abs=0.05)


@pytest.mark.parametrize("quantize", ["int8", None])
def test_an_image_tower_that_was_trained_under_the_rounding_is_not_adapted(
    export: Export, tmp_path: Path, quantize: str | None
) -> None:
    save_clip(tmp_path / "student", export.student, provenance={"configuration": {"quantize": quantize}})
    (plan,) = plan_exports({"precision": "int8"})
    provenance = _request(plan, export.student, str(tmp_path / "student"), None).provenance
    export("fp32", provenance=provenance)
    assert export.adapted == {"image": quantize is None, "text": True}


@pytest.mark.parametrize(("matches", "said"), [(0, True), (20, False)])
def test_a_loss_of_a_model_that_answers_hardly_any_pair_is_said_to_mean_nothing(
    export: Export, monkeypatch: pytest.MonkeyPatch, matches: int, said: bool
) -> None:
    correct = lambda images, captions: np.arange(len(images)) < matches  # noqa: E731
    monkeypatch.setattr("clip_rd_edge.exporting.int8.search.top1_matches", correct)
    reporter = Watch()
    export("fp32", reporter=reporter)
    assert any(line.startswith("float32 answers 0.0% of the held-out pairs") for line in reporter.said) == said


@pytest.mark.parametrize("paired", [True, False])
def test_without_pairs_no_answer_is_taken_for_right_and_that_is_said_once(export: Export, paired: bool) -> None:
    export.calibration = dataclasses.replace(export.calibration, paired=paired)
    reporter = Watch()
    export("fp32", reporter=reporter)
    assert export.judged == {"image": paired, "text": paired}
    assert sum("agreement with float32 alone" in line for line in reporter.said) == (not paired)


def test_the_search_gets_what_was_asked_for(export: Export) -> None:
    budget = Budget(image=0.9, text=0.8, max_loss=3)
    export("fp32", budget=budget, weight_bits=8, threads=3)
    assert {name: export.options[name] for name in ("budget", "weight_bits", "threads")} == {
        "budget": budget, "weight_bits": 8, "threads": 3
    }  # fmt: skip


def test_right_answers_are_those_of_images_among_all_captions(export: Export) -> None:
    """Whichever of the two towers is quantised, with the other one's embeddings in float32."""
    export("fp32")
    image, text = (export.samples[name] for name in ("image", "text"))
    others = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    assert image.reference is not None
    assert text.reference is not None
    assert image.correct is not None
    assert text.correct is not None
    for correct, images, captions in (
        (image.correct, others, text.reference), (text.correct, image.reference, others)
    ):  # fmt: skip
        similarities = images @ captions.T
        expected = [similarities[i, i] >= similarities[i].max() - 1e-6 for i in range(24)]
        assert correct(others).tolist() == expected
        assert expected != [similarities[i, i] >= similarities[:, i].max() - 1e-6 for i in range(24)]


def test_an_export_where_onnx_runtime_is_wrong_says_so_before_the_search(
    export: Export, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "ONNX Runtime 1.23.0 gets sums of INT8 wrong on this processor: install another"
    monkeypatch.setattr("clip_rd_edge.exporting.int8.search.wrong_sums", lambda: wrong)
    monkeypatch.setattr("clip_rd_edge.exporting.int8.search.quantize_tower", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(pytest.fail.Exception, match="searched"):
        export("fp32")
    (message,) = caplog.messages
    assert message.startswith(f"{wrong}. ")
