"""Bias correction: the channels of an INT8 tower have float32's means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.convert.int8.bias import correct_biases, mean_shifts
from clip_rd_edge.convert.int8.static import StaticQuantizer
from clip_rd_edge.convert.parity import embed
from clip_rd_edge.runtime.backends.onnxruntime import open_session

SAMPLES = np.random.default_rng(1).uniform(0.2, 1, (32, 8, 13, 13)).astype(np.float32)


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A depthwise convolution with stride and padding, ReLU, and a pointwise one that shares its bias."""
    generator = np.random.default_rng(0)
    constants = {
        "depthwise": generator.standard_normal((8, 1, 3, 3)),
        "pointwise": generator.standard_normal((8, 8, 1, 1)),
        "bias": generator.standard_normal(8),
    }
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "group": 8}
    nodes = [
        helper.make_node("Conv", ["x", "depthwise", "bias"], ["d"], "first", **attributes),
        helper.make_node("Relu", ["d"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "pointwise", "bias"], ["p"], "second"),
        helper.make_node("GlobalAveragePool", ["p"], ["m"], "mean"),
        helper.make_node("Flatten", ["m"], ["y"], "flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 13, 13])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "tower.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def _means(content: bytes) -> np.ndarray:
    return embed(open_session(content), SAMPLES).mean(axis=0)


def test_channels_keep_the_means_of_float32(tower: Path) -> None:
    float32 = _means(tower.read_bytes())
    quantizer = StaticQuantizer(tower, SAMPLES)
    corrected = _means(quantizer.quantize("min-max", quantizer.layers))
    shifted = _means(StaticQuantizer(tower, SAMPLES, biases=False).quantize("min-max", quantizer.layers))
    assert np.abs(corrected - float32).mean() < 0.4 * np.abs(shifted - float32).mean()


def test_the_shift_is_that_of_the_rounded_weights(tower: Path) -> None:
    model = onnx.load(tower)
    quantizer = StaticQuantizer(tower, SAMPLES)
    rounded = onnx.load(tower)
    for tensor in rounded.graph.initializer:
        if tensor.name.endswith("wise"):
            weights = numpy_helper.to_array(tensor)
            scale = np.abs(weights).max(axis=(1, 2, 3), keepdims=True) / 64  # 7 bits
            tensor.CopyFrom(numpy_helper.from_array(np.rint(weights / scale) * scale, tensor.name))
    del rounded.graph.node[1:], model.graph.node[1:]
    for graph in (rounded.graph, model.graph):
        graph.output[0].CopyFrom(helper.make_tensor_value_info("d", TensorProto.FLOAT, None))
    outputs = [embed(open_session(m.SerializeToString()), SAMPLES) for m in (rounded, model)]
    expected = (outputs[0] - outputs[1]).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(quantizer._shifts["first"], expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_layers_in_float_keep_their_biases(tower: Path) -> None:
    model = onnx.load(tower)
    shifts = {"first": np.full(8, 0.5, np.float32), "second": np.full(8, 0.25, np.float32)}
    correct_biases(model, shifts, ["first"])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    first, second = (node.input[2] for node in model.graph.node if node.op_type == "Conv")
    assert second == "bias"
    np.testing.assert_allclose(constants[first], constants["bias"] - 0.5)


def test_convolutions_without_bias_or_in_float_have_no_shift(tower: Path) -> None:
    model = onnx.load(tower)
    assert mean_shifts(model, model, SAMPLES) == {}
    del model.graph.node[0].input[2]
    onnx.save(model, tower)
    assert StaticQuantizer(tower, SAMPLES)._shifts.keys() == {"second"}
