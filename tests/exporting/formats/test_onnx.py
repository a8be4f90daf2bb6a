from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support import onnx_model

from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats.onnx import FP16_MAX, fp16_tower, nodes_out_of_range, to_fp16
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.runtime.backends.onnxruntime import open_session


def _types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    described = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    return {**described, **{t.name: t.data_type for t in inferred.initializer}}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_layers_are_in_float16_and_nodes_prone_to_overflow_in_float32(
    tower: str, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    path = fp32_bundle / f"{tower}.onnx"
    model = to_fp16(onnx.load(prepare_for_quantization(path, tmp_path)))
    onnx.checker.check_model(model)
    types = _types(model)
    kinds: dict[str, set[int]] = {}
    for node in model.graph.node:
        kinds.setdefault(node.op_type, set()).add(types[node.output[0]])
    layers, sums = {
        "image": (("Conv", "Gemm"), ("Pow", "ReduceSum", "Sqrt", "Clip")),
        "text": (("MatMul", "Gemm"), ("LayerNormalization", "Softmax", "Pow", "ReduceSum", "Sqrt", "Clip")),
    }[tower]
    for expected, names in ((TensorProto.FLOAT16, layers), (TensorProto.FLOAT, sums)):
        assert {kind: kinds[kind] for kind in names} == {kind: {expected} for kind in names}
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    inputs = calibration.held_out.pixels if tower == "image" else calibration.held_out.ids
    reference = embed(open_session(str(path)), inputs)
    assert agreement(reference, embed(open_session(model.SerializeToString()), inputs)).centred_cosine > 0.9999


def _tower_with_large_values(scale: float) -> onnx.ModelProto:
    """Return pixels (N, 3, 4, 4) -> embedding (N, 2), normalised; the pixels are multiplied and divided by `scale`."""
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "scale"], ["large"], name="grow"),
        node("Div", ["large", "scale"], ["small"], name="shrink"),
        node("GlobalAveragePool", ["small"], ["mean"], name="pool"),
        node("Flatten", ["mean"], ["features"], name="flatten"),
        node("Gemm", ["features", "weight"], ["embedding"], name="project"),
        node("LpNormalization", ["embedding"], ["y"], name="norm"),
    ]
    constants = {"weight": np.asarray([[1, 0], [0, 1], [1, 1]], dtype=np.float32), "scale": np.float32(scale)}
    return onnx_model(nodes, {"x": ["N", 3, 4, 4]}, {"y": ["N", 2]}, constants)


def test_nodes_that_overflow_float16_stay_in_float32(tmp_path: Path) -> None:
    model = _tower_with_large_values(1e5)
    pixels = np.random.default_rng(0).uniform(-1, 1, (8, 3, 4, 4)).astype(np.float32)
    reference = embed(open_session(model.SerializeToString()), pixels)
    assert nodes_out_of_range(model, pixels) == ["grow", "shrink"]
    path = tmp_path / "tower.onnx"
    onnx.save(model, path)
    tower = fp16_tower(path, pixels)
    assert tower.model is not None
    types = _types(onnx.load_from_string(tower.model))
    assert types["large"] == types["small"] == TensorProto.FLOAT
    assert types["embedding"] == TensorProto.FLOAT16
    assert agreement(reference, embed(open_session(tower.model), pixels)).centred_cosine > 0.9999
    assert nodes_out_of_range(_tower_with_large_values(10), pixels) == []


def _tower_with_rms_norm(epsilon: float) -> onnx.ModelProto:
    """Return activations (N, 8) -> embedding (N, 4), which divides them by the root of their mean square."""
    node, rng = helper.make_node, np.random.default_rng(0)
    nodes = [
        node("Mul", ["x", "x"], ["squares"], name="square"),
        node("ReduceMean", ["squares", "axis"], ["mean"], name="mean"),
        node("Add", ["mean", "epsilon"], ["sum"], name="add"),
        node("Sqrt", ["sum"], ["rms"], name="root"),
        node("Div", ["x", "rms"], ["normed"], name="divide"),
        node("MatMul", ["normed", "w"], ["product"], name="project"),
        node("LpNormalization", ["product"], ["y"], name="norm"),
    ]
    values = {"epsilon": np.float32(epsilon), "axis": np.array([-1]), "w": rng.normal(size=(8, 4)).astype(np.float32)}
    return onnx_model(nodes, {"x": ["N", 8]}, {"y": ["N", 4]}, values)


@pytest.mark.parametrize(
    ("size", "epsilon", "expected"),
    [
        (1.0, 1e-6, []),
        (1e-4, 1e-8, ["square", "mean", "add", "root"]),  # squares of at most 6e-8 become 0, too
    ],
)
def test_what_becomes_0_in_float16_stays_in_float32(size: float, epsilon: float, expected: list[str]) -> None:
    model = _tower_with_rms_norm(epsilon)
    inputs = size * np.random.default_rng(1).uniform(0.5, 1, (8, 8)).astype(np.float32)
    assert nodes_out_of_range(model, inputs) == expected


def test_a_norm_of_small_activations_is_right_where_float16_is_computed_in_float16() -> None:
    model = _tower_with_rms_norm(1e-8)
    inputs = 2e-4 * np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    expected, embeddings = (
        ReferenceEvaluator(tower).run(None, {"x": inputs})[0]
        for tower in (model, to_fp16(model, keep_float32=nodes_out_of_range(model, inputs)))
    )
    np.testing.assert_allclose(embeddings, expected, atol=0.02)


def test_a_finite_mask_stays_finite() -> None:
    model = _tower_with_large_values(-3.4e38)
    constants = {t.name: numpy_helper.to_array(t) for t in to_fp16(model).graph.initializer}
    assert constants["scale/fp16"] == -FP16_MAX
