"""The Q/DQ for TensorRT, tested without TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats.tensorrt import symmetric_tower
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.methods import Ranges, measure_ranges, quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.int8.search import TowerSamples
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session


@pytest.fixture
def pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """16 noise images of different brightness, 64 × 64."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (16, 3, 1, 1)) + 0.5 * rng.standard_normal((16, 3, 64, 64))
    return noise.astype(np.float32)


@pytest.mark.parametrize("trunk", ["resnet10t", "mobilevit_xxs"])
def test_q_and_dq_meet_tensorrts_requirements(
    trunk: str, image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path, pixels: np.ndarray
) -> None:
    source = image_tower(trunk)[1]
    model = onnx.load(prepare_for_quantization(source, tmp_path))
    quantized = quantize_symmetrically(model, measure_ranges(model, quantized_inputs(model), pixels))
    onnx.checker.check_model(quantized, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    producers = {name: node for node in quantized.graph.node for name in node.output}
    layers = {node.name: node for node in weighted_layers(model)}
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (constants[name] for name in node.input[1:])
            assert zero.dtype == np.int8
            assert not zero.any()
            assert (scale.astype(np.float16) == scale).all()  # the scale stays exact when the graph is cast to float16
        elif node.name in layers:
            activation, weight = (producers[name] for name in node.input[:2])
            assert constants[activation.input[1]].ndim == 0
            original = next(t for t in model.graph.initializer if t.name == layers[node.name].input[1])
            axis = next(a.i for a in weight.attribute if a.name == "axis")
            assert constants[weight.input[1]].shape == (original.dims[axis],)
            assert len(node.input) < 3 or node.input[2] == layers[node.name].input[2]  # the bias is unchanged
        elif node.op_type in ("Softmax", "LayerNormalization", "Sigmoid"):
            assert all(producers[name].op_type != "DequantizeLinear" for name in node.input[:1])
    size_ratio = len(quantized.SerializeToString()) / source.stat().st_size
    assert size_ratio < 0.3
    reference = embed(open_session(str(source)), pixels)
    assert agreement(reference, embed(open_session(quantized.SerializeToString()), pixels)).centred_cosine > 0.9


@pytest.mark.parametrize("bounds", [(-10.0, 1.0), (-1.0, 10.0)])
def test_a_scale_covers_the_larger_of_both_bounds(bounds: tuple[float, float]) -> None:
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")], "one", values[:1], values[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    quantized = quantize_symmetrically(model, Ranges(min_max={}, percentile={"x": bounds}))
    (scale,) = (numpy_helper.to_array(t) for t in quantized.graph.initializer if t.name == "x/scale")
    assert 10 <= 127 * scale < 10.01


def test_the_residual_branch_of_a_convolution_is_quantised(
    image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path, pixels: np.ndarray
) -> None:
    model = onnx.load(prepare_for_quantization(image_tower("resnet10t")[1], tmp_path))
    quantized = quantize_symmetrically(model, measure_ranges(model, quantized_inputs(model), pixels))
    producers = {name: node.op_type for node in quantized.graph.node for name in node.output}
    sums = [sorted(producers[name] for name in node.input) for node in quantized.graph.node if node.op_type == "Add"]
    assert sums == [["Conv", "DequantizeLinear"]] * 4


def test_each_layer_can_be_quantised_alone(
    image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path, pixels: np.ndarray
) -> None:
    model = onnx.load(prepare_for_quantization(image_tower("resnet10t")[1], tmp_path))
    ranges = measure_ranges(model, quantized_inputs(model), pixels)
    fused = 0
    for layer in weighted_layers(model):
        graph = quantize_symmetrically(model, ranges, layers=[layer.name]).graph
        branches = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        sums = [node for node in graph.node if node.op_type == "Add" and branches.intersection(node.input)]
        assert all(layer.output[0] in node.input for node in sums)
        fused += len(sums)
    assert fused == 7  # of four blocks, three have a convolution in the shortcut, too


def test_layers_that_lose_most_stay_in_float(fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path) -> None:
    prepared = prepare_for_quantization(fp32_bundle / "image.onnx", tmp_path)

    def quantize(min_agreement: float) -> tuple[int, int, float] | None:
        tower = symmetric_tower(
            prepared,
            TowerSamples("image", calibration.calibrate.pixels[:8], calibration.held_out.pixels[:8]),
            min_agreement=min_agreement,
        )
        return tower and (len(tower.int8_layers), len(tower.float_layers), tower.agreement.centred_cosine)

    full = quantize(0.9)
    assert full is not None
    assert full[:2] == (15, 0)
    min_agreement = (1 + full[2]) / 2
    partial = quantize(min_agreement)
    assert partial is not None
    assert 0 < partial[0] < 15
    assert partial[2] >= min_agreement
    assert quantize(1.1) is None  # no tower can reach this
