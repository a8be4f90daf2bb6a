from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.candidates import CandidateRequest, _robust_layers, group_errors
from clip_rd_edge.exporting.int8.methods import StaticQuantizer
from clip_rd_edge.exporting.int8.search import TowerSamples, quantize_tower
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.exporting.plan import Budget
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.reporting import SILENT
from clip_rd_edge.utils.timing import Milliseconds

Calls = Mapping[str, Callable[[], object]]


def _timer(**latency_ms: float) -> Callable[[Calls], Mapping[str, Milliseconds]]:
    """Return a timer: candidates take 1 ms, float32 the given time, `token embeddings only` 10 % longer than that."""
    slower = {"token embeddings only": 1.1 * latency_ms["float32"]}
    return lambda calls: {name: np.full(5, {**latency_ms, **slower}.get(name, 1.0)) for name in calls}


def test_a_quantised_image_tower_is_smaller_and_agrees(fp32_bundle: Path, calibration: CalibrationSet) -> None:
    model = fp32_bundle / "image.onnx"
    pixels = calibration.held_out.pixels
    quantized = quantize_tower(
        model,
        TowerSamples("image", calibration.calibrate.pixels, pixels),
        budget=Budget(image=0.97),
        timer=_timer(float32=3.0),
    )
    assert quantized.model is not None
    assert quantized.precision.startswith("int8 static")
    assert len(quantized.model) <= 0.35 * model.stat().st_size
    assert quantized.measured.speedup == pytest.approx(3)
    parity = agreement(embed(open_session(str(model)), pixels), embed(open_session(quantized.model), pixels))
    assert parity.centred_cosine == pytest.approx(quantized.measured.centred_cosine, abs=1e-6)
    assert parity.centred_cosine >= 0.97
    assert [trial.verdict for trial in quantized.trials].count("shipped") == 1
    assert all(np.isnan(trial.loss_points) for trial in quantized.trials)  # there are no pairs


def test_a_text_tower_shrinks_with_its_token_embeddings_and_keeps_the_mask_in_float(
    fp32_bundle: Path, calibration: CalibrationSet
) -> None:
    model = fp32_bundle / "text.onnx"
    quantized = quantize_tower(
        model,
        TowerSamples("text", calibration.calibrate.ids, calibration.held_out.ids),
        timer=_timer(float32=3.0),
    )
    assert quantized.model is not None
    assert len(quantized.model) <= 0.3 * model.stat().st_size
    assert quantized.measured.centred_cosine >= 0.995
    nodes = onnx.load_from_string(quantized.model).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    kinds = Counter(node.op_type for node in nodes if not dequantized.intersection(node.input))
    assert kinds["Softmax"] == 3
    assert kinds["MatMul"] == 6  # attention in 3 layers: queries with keys, and weights with values, stay in float
    assert kinds["QLinearAdd"] == kinds["QLinearSoftmax"] == 0


def test_a_tower_that_int8_makes_slower_stays_float32(fp32_bundle: Path, calibration: CalibrationSet) -> None:
    quantized = quantize_tower(
        fp32_bundle / "text.onnx",
        TowerSamples("text", calibration.calibrate.ids, calibration.held_out.ids),
        timer=_timer(float32=0.8),
    )
    assert quantized.model is None
    assert quantized.precision == "fp32"
    assert (
        "the nearest (token embeddings only: slower than float32) took 1.10 times as long, with a centred cosine of 0.9"
        in quantized.note
    )
    assert quantized.measured.centred_cosine == pytest.approx(1)
    assert quantized.measured.speedup == 1


@pytest.mark.parametrize(
    ("by_float32", "by_candidates", "points"),
    [
        (range(24), range(0), 100),
        (range(12), range(6, 24), -25),  # of 24, 6 are lost and 12 are gained
    ],
)
def test_answers_that_a_candidate_loses_and_gains_are_counted(
    by_float32: range, by_candidates: range, points: float, fp32_bundle: Path, calibration: CalibrationSet
) -> None:
    asked: list[range] = []

    def correct(embeddings: Embeddings) -> np.ndarray:
        asked.append(by_candidates if asked else by_float32)  # float32 is asked first
        return np.isin(np.arange(len(embeddings)), asked[-1])

    samples = TowerSamples("text", calibration.calibrate.ids, calibration.held_out.ids, correct=correct)
    quantized = quantize_tower(fp32_bundle / "text.onnx", samples, timer=_timer(float32=3.0))
    assert {trial.loss_points for trial in quantized.trials} == {points}
    assert (quantized.model is None) == (points > 0)
    if points > 0:
        assert "loses 100.0 points" in {trial.verdict for trial in quantized.trials}


def test_a_candidate_that_depends_on_the_batch_is_left_out_for_clients_that_send_batches(
    fp32_bundle: Path, calibration: CalibrationSet
) -> None:
    samples = TowerSamples("text", calibration.calibrate.ids, calibration.held_out.ids, in_batches=True)
    fastest = "dynamic with token embeddings, per-tensor"
    quantized = quantize_tower(fp32_bundle / "text.onnx", samples, timer=_timer(float32=3.0, **{fastest: 0.1}))
    assert not quantized.one_at_a_time
    assert quantized.model is not None
    (trial,) = (trial for trial in quantized.trials if trial.name == fastest)
    assert (trial.verdict, trial.measured) == ("depends on the batch", False)


def test_dynamic_int8_is_judged_on_one_input_at_a_time_as_a_device_runs_it(tmp_path: Path) -> None:
    """One input of the held-out ones is 1,000 times as large as the others, which its scale would make 0 in a batch."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((32, 32)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["features"], "first"),
        helper.make_node("MatMul", ["features", "second"], ["product"], "second"),
        helper.make_node("Flatten", ["product"], ["flat"], "flatten"),
        helper.make_node("LpNormalization", ["flat"], ["y"], "norm"),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 1, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = tmp_path / "tower.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    inputs = rng.standard_normal((48, 1, 1, 32)).astype(np.float32)
    inputs[::8] *= 1000
    samples = TowerSamples("image", inputs[:24], inputs[24:])
    quantized = quantize_tower(path, samples, timer=_timer(float32=3.0, **{"dynamic, per-tensor": 0.1}))
    assert quantized.precision == "int8 dynamic, per-tensor"
    assert quantized.model is not None
    session = open_session(quantized.model)
    answers = np.concatenate([session.run(None, {"x": row[None]})[0] for row in samples.held_out])
    expected = samples.held_out[:, 0, 0] @ weights["first"] @ weights["second"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    pairs = zip(answers - answers.mean(axis=0), expected - expected.mean(axis=0), strict=True)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    assert quantized.measured.centred_cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert quantized.measured.centred_cosine > 0.99


def test_softmax_normalisation_and_attention_products_stay_in_float(
    image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path
) -> None:
    model = prepare_for_quantization(image_tower("mobilevit_xxs")[1], tmp_path)
    samples = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    quantizer = StaticQuantizer(model, samples)
    kinds = Counter(node.op_type for node in onnx.load(model).graph.node if node.name in quantizer.layers)
    assert kinds == {"Conv": 35, "MatMul": 36, "Gemm": 1}
    nodes = onnx.load_from_string(quantizer.quantize("min-max", quantizer.layers)).graph.node
    producers = {output: node for node in nodes for output in node.output}

    def comes_from_int8(name: str) -> bool:
        return name in producers and producers[name].op_type == "DequantizeLinear"

    by_kind = {kind: [n for n in nodes if n.op_type == kind] for kind in ("Softmax", "MatMul", "Sigmoid")}
    assert not any(comes_from_int8(node.input[0]) for node in by_kind["Softmax"])
    assert sum(not comes_from_int8(node.input[1]) for node in by_kind["MatMul"]) == 18  # two per attention block
    # SiLU follows its convolution; in the 9 attention blocks it follows a matrix product.
    assert all(comes_from_int8(node.input[0]) for node in by_kind["Sigmoid"])


def test_only_nodes_after_an_int8_layer_are_quantised(
    image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path
) -> None:
    model = prepare_for_quantization(image_tower("mobilevit_xxs")[1], tmp_path)
    samples = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    quantizer = StaticQuantizer(model, samples)
    nodes = onnx.load_from_string(quantizer.quantize("percentile", quantizer.layers[:1])).graph.node
    producers = {output: node for node in nodes for output in node.output}
    quantized = Counter(
        node.op_type
        for node in nodes
        if node.op_type not in ("QuantizeLinear", "Shape")
        and any(name in producers and producers[name].op_type == "DequantizeLinear" for name in node.input[:1])
    )
    assert quantized == {"Conv": 2, "Sigmoid": 1, "Mul": 1}  # the next convolution reads the SiLU's output


def test_the_range_of_a_layer_replaces_its_relu(fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path) -> None:
    model = prepare_for_quantization(fp32_bundle / "image.onnx", tmp_path)
    quantizer = StaticQuantizer(model, calibration.calibrate.pixels)
    content = quantizer.quantize("min-max", quantizer.layers)
    before, after = (
        Counter(node.op_type for node in m.graph.node) for m in (onnx.load(model), onnx.load_from_string(content))
    )
    assert (before["Relu"], after["Relu"]) == (11, 0)
    quantized = onnx.load_from_string(content)
    onnx.checker.check_model(quantized, full_check=True)
    assert [opset.domain for opset in quantized.opset_import] == [""]  # ONNX Runtime imports nine
    pixels = calibration.held_out.pixels
    parity = agreement(embed(open_session(str(model)), pixels), embed(open_session(content), pixels))
    assert parity.centred_cosine > 0.99


@pytest.mark.parametrize(("kind", "attributes"), [("Conv", {}), ("Gemm", {"transB": 1}), ("Gemm", {})])
def test_a_layer_in_float_between_int8_layers_is_computed_in_float(
    kind: str, attributes: dict[str, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("first", "second", "third")}
    # ONNX Runtime would give the second layer one scale for all weights: those that count would become 0.
    weights["first"][0], weights["second"][0, 0] = 0, 1_000
    if kind == "Conv":
        weights = {name: value[..., None, None] for name, value in weights.items()}
    elif not attributes:
        weights = {name: value.T for name, value in weights.items()}
    size: list[str | int] = ["batch", 8, 1, 1] if kind == "Conv" else ["batch", 8]
    tensors = ["x", "a", "b", "y"]
    graph = helper.make_graph(
        [
            helper.make_node(kind, [tensors[i], name], [tensors[i + 1]], name, **attributes)
            for i, name in enumerate(weights)
        ],
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, size)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "tower.onnx")
    samples = rng.uniform(0, 1, (16, 8, *size[2:])).astype(np.float32)
    content = StaticQuantizer(tmp_path / "tower.onnx", samples).quantize("min-max", ["first", "third"])
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    as_written, computed = (
        open_session(content, optimize=optimize).run(None, {"x": samples})[0] for optimize in (False, True)
    )
    assert np.abs(computed - as_written).max() <= 0.02 * np.ptp(as_written)


def test_sensitivity_finds_the_layer_that_loses_most_in_int8() -> None:
    reference = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)

    def embed_with(layers: Sequence[str]) -> Embeddings | None:
        if "unknown" in layers:
            return None
        noise = np.random.default_rng(1).standard_normal(reference.shape).astype(np.float32)
        return reference + noise * (0.5 if "fragile" in layers else 0.01)

    errors = group_errors(("robust", "fragile", "unknown"), embed_with, reference, max_seconds=60)
    assert [error.layers for error in errors] == [("robust",), ("fragile",), ("unknown",)]
    assert errors[0].error < 0.01 < errors[1].error < errors[2].error == float("inf")


def test_a_layer_that_the_library_cannot_quantise_stays_in_float(
    fp32_bundle: Path, calibration: CalibrationSet
) -> None:
    request = CandidateRequest(
        model=fp32_bundle / "image.onnx", samples=calibration.calibrate.pixels[:4], max_error=0.01, weight_bits=7,
        threads=1, reporter=SILENT,
    )  # fmt: skip

    class Quantizer:
        layers = ("known", "unknown")

        def quantize(self, method: str, layers: Sequence[str]) -> bytes:
            if "unknown" in layers:
                raise NotImplementedError("no such operator")
            return request.model.read_bytes()

    assert _robust_layers(Quantizer(), request) == [("known",)]


def test_an_error_in_trying_layers_is_not_taken_for_layers_that_lose_much() -> None:
    with pytest.raises(KeyError, match="range"):
        group_errors(("a", "b"), lambda layers: {}["range"], np.eye(4, dtype=np.float32), max_seconds=60)


def test_sensitivity_measures_groups_if_single_layers_take_too_long() -> None:
    reference = np.eye(4, dtype=np.float32)

    def slow(_: object) -> Embeddings:
        started = time.process_time()
        while time.process_time() < started + 0.02:
            pass
        return reference

    errors = group_errors(tuple("abcdefgh"), slow, reference, max_seconds=0.05)
    assert len(errors) < 8
    assert [layer for error in errors for layer in error.layers] == list("abcdefgh")

    def waiting(_: object) -> Embeddings:
        time.sleep(0.02)
        return reference

    # What other programs of a busy machine take does not count.
    assert len(group_errors(tuple("abcdefgh"), waiting, reference, max_seconds=0.05)) == 8
