"""The search for INT8: candidates are measured, the best is shipped, and a tower falls back if none is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper
from support import NOT_ADAPTED, Watch, float32_tower, onnx_model

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import Manifest, Measurement, Tower
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.int8.candidates import (
    Float32Tower,
    onnx_candidates,
    static_candidates,
    with_fewest_in_float,
)
from clip_rd_edge.exporting.int8.search import ORT, Choice, MeasuredCandidate, choose, quantize_tower
from clip_rd_edge.exporting.int8.trials import QuantizedTower, outcome_key
from clip_rd_edge.exporting.parity import Agreement, agreement, embed
from clip_rd_edge.exporting.plan import Budget, Fallback, Plan, plan_exports
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.timing import Clock

Timed = Callable[..., None]
ENTRY = Tower(file="tower.onnx", input_name="x", output_name="y", precision="fp32")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """Return a function that sets latencies: of `float32` and others in ms, 1 ms for the rest."""

    def set_times(**latency_ms: float) -> None:
        slower = {"token embeddings only": 1.1 * latency_ms["float32"]}
        monkeypatch.setattr(
            "clip_rd_edge.exporting.parity.time_in_turn",
            lambda calls, **_: {name: np.full(5, {**latency_ms, **slower}.get(name, 1.0)) for name in calls},
        )

    return set_times


# The search for one tower.


def test_a_quantised_image_tower_is_smaller_and_agrees(
    fp32_bundle: Path, calibration: CalibrationSet, timed: Timed
) -> None:
    plan = Plan(budget=Budget(image=0.97), provenance=NOT_ADAPTED)
    tower = float32_tower(fp32_bundle, "image", calibration, plan=plan)
    model, pixels = tower.model, tower.held_out
    timed(float32=3.0)
    quantized = quantize_tower(tower, ENTRY)
    assert quantized.model is not None
    assert quantized.tower.precision.startswith("int8 static")
    assert len(quantized.model) <= 0.35 * model.stat().st_size
    assert quantized.tower.measured.speedup == pytest.approx(3)
    parity = agreement(embed(open_session(str(model)), pixels), embed(open_session(quantized.model), pixels))
    assert parity.centred_cosine == pytest.approx(quantized.tower.measured.centred_cosine, abs=1e-6)
    assert parity.centred_cosine >= 0.97
    assert [trial.verdict for trial in quantized.trials].count("shipped") == 1
    assert all(np.isnan(trial.loss_points) for trial in quantized.trials)  # there are no pairs


def test_a_text_tower_shrinks_with_its_token_embeddings_and_keeps_the_mask_in_float(
    fp32_bundle: Path, calibration: CalibrationSet, timed: Timed
) -> None:
    asked: list[range] = []

    def correct(embeddings: Embeddings) -> np.ndarray:
        asked.append(range(6, 24) if len(asked) % 2 else range(12))  # float32 is asked before each
        return np.isin(np.arange(len(embeddings)), asked[-1])

    tower = float32_tower(fp32_bundle, "text", calibration, correct=correct)
    timed(float32=3.0)
    quantized = quantize_tower(dataclasses.replace(tower, held_out=np.tile(tower.held_out, (3, 1))), ENTRY)
    # The best of all candidates on a few samples is evaluated on all: of 72, 6 are lost and 12 are gained.
    assert Counter((trial.verdict == "shipped", trial.samples) for trial in quantized.trials) == {
        (True, 72): 1, (False, 24): len(quantized.trials) - 1,
    }  # fmt: skip
    (shipped,) = (trial for trial in quantized.trials if trial.verdict == "shipped")
    assert shipped.loss_points == pytest.approx(-100 / 12)
    assert quantized.model is not None
    assert len(quantized.model) <= 0.3 * tower.model.stat().st_size
    assert quantized.tower.measured.samples == 72
    assert quantized.tower.measured.centred_cosine >= 0.995
    nodes = onnx.load_from_string(quantized.model).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    kinds = Counter(node.op_type for node in nodes if not dequantized.intersection(node.input))
    assert kinds["Softmax"] == 3
    assert kinds["MatMul"] == 6  # attention in 3 layers: queries with keys, and weights with values, stay in float
    assert kinds["QLinearAdd"] == kinds["QLinearSoftmax"] == 0


def test_a_limited_time_ships_the_best_of_those_tried_by_then(
    fp32_bundle: Path, calibration: CalibrationSet, timed: Timed
) -> None:
    timed(float32=3.0)
    reporter = Watch()
    for name, tried in (("text", "dynamic with token embeddings, per-token"), ("image", "static, percentile")):
        plan = Plan(budget=Budget(0.9, 0.9), provenance=NOT_ADAPTED)
        tower = float32_tower(fp32_bundle, name, calibration, plan=plan, reporter=reporter)
        quantized = quantize_tower(dataclasses.replace(tower, clock=Clock(0)), ENTRY)
        assert [(trial.name, trial.verdict) for trial in quantized.trials] == [(tried, "shipped")]
    assert len(reporter.noted) == 2


def test_a_candidate_that_depends_on_the_batch_is_left_out_for_clients_that_send_batches(
    fp32_bundle: Path, calibration: CalibrationSet, timed: Timed
) -> None:
    tower = float32_tower(fp32_bundle, "text", calibration, plan=Plan(layout="huggingface"))
    fastest = "dynamic with token embeddings, per-tensor"
    timed(float32=3.0, **{fastest: 0.1})
    two = dataclasses.replace(ORT, candidates=lambda tower: islice(onnx_candidates(tower), 2))
    quantized = quantize_tower(tower, ENTRY, two)
    assert not quantized.tower.one_at_a_time
    assert quantized.model is not None
    (trial,) = (trial for trial in quantized.trials if trial.name == fastest)
    assert (trial.verdict, trial.measured) == ("depends on the batch", False)


def test_dynamic_int8_is_judged_on_one_input_at_a_time_as_a_device_runs_it(tmp_path: Path, timed: Timed) -> None:
    """One input of the held-out ones is 1,000 times as large as the others, which its scale would make 0 in a batch."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((32, 32)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["features"], "first"),
        helper.make_node("MatMul", ["features", "second"], ["product"], "second"),
        helper.make_node("Flatten", ["product"], ["flat"], "flatten"),
        helper.make_node("LpNormalization", ["flat"], ["y"], "norm"),
    ]
    path = tmp_path / "tower.onnx"
    onnx.save(onnx_model(nodes, {"x": ["N", 1, 1, 32]}, {"y": ["N", 32]}, weights), path)
    inputs = rng.standard_normal((48, 1, 1, 32)).astype(np.float32)
    inputs[::8] *= 1000
    samples = Float32Tower(name="image", model=path, calibrate=inputs[:24], held_out=inputs[24:])
    timed(float32=3.0, **{"dynamic, per-tensor": 0.1})
    quantized = quantize_tower(samples, ENTRY)
    assert quantized.tower.precision == "int8 dynamic, per-tensor"
    assert quantized.model is not None
    session = open_session(quantized.model)
    answers = np.concatenate([session.run(None, {"x": row[None]})[0] for row in samples.held_out])
    expected = samples.held_out[:, 0, 0] @ weights["first"] @ weights["second"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    pairs = zip(answers - answers.mean(axis=0), expected - expected.mean(axis=0), strict=True)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    assert quantized.tower.measured.centred_cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert quantized.tower.measured.centred_cosine > 0.99


# What a tower ships.


def _measured(name: str, latency_ms: float, cosine: float = 1.0, size: int = 100, **answers: int) -> MeasuredCandidate:
    return MeasuredCandidate(name, np.full(9, latency_ms), Agreement(0.0, 1.0, cosine, 200), size, **answers)


def _choose(*tried: MeasuredCandidate) -> Choice:
    return choose("image", _measured("float32", 10, size=400), tried, budget=Budget())


def test_the_fastest_accurate_candidate_is_shipped_and_among_equally_fast_ones_the_smaller() -> None:
    fast, good, slow = _measured("fast and wrong", 1, 0.5), _measured("good", 3, 0.992), _measured("slow", 8, 0.999)
    assert _choose(fast, good, slow).name == "good"
    assert choose("text", _measured("float32", 10, size=400), [good], budget=Budget()).name is None  # stricter
    assert np.isnan(_choose(good).trials[0].loss_points)  # without pairs
    assert _choose(_measured("a", 3.0, 0.992), _measured("b", 3.1, 0.998)).name == "b"
    assert _choose(_measured("a", 3.0, 0.998, size=380), _measured("b", 3.1, 0.992, size=100)).name == "b"
    tried = _measured("a", 3.0, 0.9992), _measured("b", 3.6, 0.9998)
    assert _choose(*tried).name == "a"
    # A text is embedded once, so its tower may take longer for accuracy.
    assert choose("text", _measured("float32", 10, size=400), tried, budget=Budget()).name == "b"


def test_a_slower_candidate_is_shipped_only_if_it_is_much_smaller() -> None:
    assert _choose().name is None
    assert _choose(_measured("slower", 10.5, 0.999), _measured("much slower", 20, 0.9999)).name is None
    small = _measured("token embeddings only", 10.1, 0.9999, size=200)
    assert _choose(small).name == "token embeddings only"
    assert _choose(small, _measured("good", 5, 0.995, size=150)).name == "good"
    assert _choose(_measured("no smaller", 10.1, 0.9999, size=390)).name is None
    assert _choose(_measured("slower", 10.4, 0.9999, size=200)).name is None


def test_a_loss_of_zero_shot_accuracy_counts_unless_chance_explains_it() -> None:
    assert _choose(_measured("three of three", 3, 0.995, lost=3)).name == "three of three"
    assert _choose(_measured("even", 3, 0.995, lost=12, gained=10)).name == "even"
    choice = _choose(_measured("four of four", 3, 0.995, lost=4))
    assert (choice.name, choice.trials[0].verdict) == (None, "loses 2.0 points")
    assert _choose(_measured("twelve of sixteen", 3, 0.995, lost=12, gained=4)).trials[0].loss_points == 4
    assert _choose(_measured("twelve of sixteen", 3, 0.995, lost=12, gained=4)).name is None
    tolerant = choose("image", _measured("float32", 10), [_measured("a", 3, lost=4)], budget=Budget(max_loss=5))
    assert tolerant.name == "a"


# Layers that stay in float.


@pytest.mark.parametrize("max_seconds", [60, 0])
def test_the_fewest_layers_stay_in_float_with_which_the_measured_error_is_small_enough(max_seconds: float) -> None:
    errors = [((name,), error) for name, error in (("a", 0.001), ("b", 0.02), ("c", 0.002), ("d", 0.01))]
    # Together, the errors are others than their sums: `c` without `d` does more harm than both.
    true, tried = {"abcd": 0.05, "acd": 0.02, "ac": 0.004, "a": 0.0005}, list[str]()

    def error_of(layers: Sequence[str]) -> float:
        tried.append("".join(layers))
        return true[tried[-1]]

    limits = [0.03, 0.0045, 0.001]
    found = with_fewest_in_float(errors, error_of, limits, max_seconds=max_seconds)
    assert found == [("a", "c", "d"), ("a", "c"), ("a",)]
    assert tried == (["abcd", "acd", "ac", "a"] if max_seconds else ["abcd"])  # without time, the sums decide


def test_a_layer_that_the_library_cannot_quantise_stays_in_float(
    fp32_bundle: Path, calibration: CalibrationSet
) -> None:
    tower = float32_tower(fp32_bundle, "image", calibration, count=4)

    class Quantizer:
        layers = ("known", "unknown")

        def quantize(self, method: str, layers: Sequence[str]) -> bytes:
            if "unknown" in layers:
                raise NotImplementedError("no such operator")
            return tower.model.read_bytes()

    names = [candidate.name for candidate in static_candidates(Quantizer(), tower)]  # type: ignore[arg-type]
    assert names[1:] == ["static, percentile, 1 of 2 layers in float", "static, min-max"]


# Both towers, and what they fall back to.

MEASURED = Measurement(
    latency_ms_p50=1, latency_ms_p95=1, speedup=1, max_difference=0, cosine=1, centred_cosine=1, samples=24,
    threads=1, machine="any",
)  # fmt: skip


class Exporter:
    """Exports the tiny student as if INT8 improved only the towers named in `improved`."""

    def __init__(self, student: ClipModel, source: Path, calibration: CalibrationSet, output: Path) -> None:
        self.student, self.source, self.calibration, self.output = student, source, calibration, output
        self.improved: tuple[str, ...] = ()
        self.towers = dict[str, Float32Tower]()

    def quantize(self, tower: Float32Tower, entry: Tower, backend: object) -> QuantizedTower:
        self.towers[tower.name] = tower
        if tower.name not in self.improved:
            note = f"float32: {tower.name} is not improved."
            return QuantizedTower(None, msgspec.structs.replace(entry, note=note, measured=MEASURED), ())
        written = msgspec.structs.replace(
            entry, precision="int8 static", measured=MEASURED, one_at_a_time=True, instruction_sets=("aarch64",)
        )
        return QuantizedTower(tower.model.read_bytes(), written, ())

    def __call__(self, fallback: Fallback | None = None, **options: Any) -> Manifest:
        plan = Plan(precision="int8", fallback=fallback, **options)
        return export_bundle(self.student, self.output, plan, samples=self.calibration, source=self.source).manifest


@pytest.fixture
def export(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Exporter:
    exporter = Exporter(student, fp32_bundle, calibration, tmp_path / "bundle")
    monkeypatch.setattr("clip_rd_edge.exporting.int8.search.quantize_tower", exporter.quantize)
    monkeypatch.setattr("clip_rd_edge.exporting.parity._ROUNDINGS", 1)  # which no test here looks at
    return exporter


def test_if_no_tower_is_improved_nothing_is_written_and_alternatives_are_named(export: Exporter) -> None:
    with pytest.raises(ClipRdEdgeError) as error:
        export()
    assert error.value.exit_code == 1
    assert not export.output.exists()


def test_one_of_two_towers_may_stay_float32_unless_that_is_refused(export: Exporter) -> None:
    export.improved = ("text",)
    manifest = export()
    assert manifest.precision == "fp32 + int8"
    assert (manifest.image.precision, manifest.text.precision) == ("fp32", "int8 static")
    assert manifest.image.note == "float32: image is not improved."
    assert (manifest.text.one_at_a_time, manifest.text.instruction_sets) == (True, ("aarch64",))
    assert (manifest.image.one_at_a_time, manifest.image.instruction_sets) == (False, ())
    export.output = export.output.with_name("none")
    with pytest.raises(ClipRdEdgeError) as error:
        export("none")
    assert "text" not in str(error.value)


def test_both_towers_use_the_fallback(export: Exporter) -> None:
    manifest = export("fp16")
    assert manifest.precision == manifest.image.precision == manifest.text.precision == "fp16"
    assert "text is not improved" in manifest.text.note
    size_ratio = (export.output / "text.onnx").stat().st_size / (export.source / "text.onnx").stat().st_size
    assert size_ratio == pytest.approx(0.5, abs=0.05)


def test_without_pairs_no_answer_is_taken_for_right(export: Exporter) -> None:
    export.calibration = dataclasses.replace(export.calibration, paired=False)
    export("fp32")
    assert [tower.correct for tower in export.towers.values()] == [None] * 2


def test_a_search_is_remembered_for_the_same_tower_samples_and_limits(export: Exporter) -> None:
    export.improved = ("image", "text")
    first = export()
    towers, export.towers = export.towers, {}
    export.output = export.output.with_name("again")
    assert export().towers == first.towers
    assert not export.towers
    tower = towers["image"]
    stricter = dataclasses.replace(tower, plan=dataclasses.replace(tower.plan, budget=Budget(image=0.999)))
    others = dataclasses.replace(tower, held_out=tower.held_out[::-1])
    assert len({outcome_key(each, ORT) for each in (tower, stricter, others)}) == 3


@pytest.mark.parametrize("quantize", ["int8", None])
def test_an_image_tower_that_was_trained_under_the_rounding_is_not_adapted(
    student: ClipModel, tmp_path: Path, quantize: str | None
) -> None:
    save_clip(tmp_path / "student", student, provenance={"configuration": {"quantize": quantize}})
    (plan,) = plan_exports(Export(tmp_path / "student", tmp_path / "bundle", precision="int8"))
    assert (plan.adapts("image"), plan.adapts("text")) == (quantize is None, True)


def test_right_answers_are_those_of_images_among_all_captions(export: Exporter) -> None:
    """Whichever of the two towers is quantised, with the other one's embeddings in float32."""
    export("fp32")
    image, text = (export.towers[name] for name in ("image", "text"))
    others = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    for tower, images, captions in ((image, others, text.reference), (text, image.reference, others)):
        assert images is not None
        assert captions is not None
        assert tower.correct is not None
        similarities = images @ captions.T
        expected = [similarities[i, i] >= similarities[i].max() - 1e-6 for i in range(24)]
        assert tower.correct(others).tolist() == expected
        assert expected != [similarities[i, i] >= similarities[:, i].max() - 1e-6 for i in range(24)]
