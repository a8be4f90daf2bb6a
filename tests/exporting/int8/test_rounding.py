"""Rounding of INT8 weights by what layers see: their outputs and the means of these stay near float32's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import onnx_model

from clip_rd_edge.exporting.graph import activation_batches
from clip_rd_edge.exporting.int8.methods import StaticQuantizer, measure_ranges
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.symmetric import quantize_symmetrically, quantized_inputs

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
    model = onnx_model(
        nodes,
        {"x": ["batch", 8, 13, 13]},
        {"y": ["batch", 8]},
        {name: value.astype(np.float32) for name, value in constants.items()},
    )
    path = tmp_path / "tower.onnx"
    onnx.save(model, path)
    return path


def _rounded(tower: Path, samples: np.ndarray = SAMPLES, max_level: int = 64) -> RoundedLayers:
    return RoundedLayers(onnx.load(tower), samples, max_level=max_level)


def _outputs(model: onnx.ModelProto, tensor: str, samples: np.ndarray = SAMPLES) -> np.ndarray:
    """Return what a layer writes: (N, …)."""
    batches = activation_batches(model, [tensor], samples, batch_size=4)
    return np.concatenate([batch[tensor] for batch in batches])


def _weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the constants of the layers by node and input, in float or dequantised."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            levels, scale, zero_point = (constants[name] for name in node.input)
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            shape = [-1 if i == axis % max(levels.ndim, 1) else 1 for i in range(levels.ndim)] if scale.ndim else ()
            constants[node.output[0]] = (levels.astype(np.float32) - zero_point.reshape(shape)) * scale.reshape(shape)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return {node.name: constants[node.input[1]] for node in layers if node.input[1] in constants}


def test_the_means_of_channels_stay_and_their_errors_shrink(tower: Path) -> None:
    rounded, nearest = onnx.load(tower), onnx.load(tower)
    _rounded(tower).replace(rounded, ["first", "second"])
    for tensor in nearest.graph.initializer:
        if tensor.name.endswith("wise"):
            weights = numpy_helper.to_array(tensor)
            scale = np.abs(weights).max(axis=(1, 2, 3), keepdims=True) / 64
            tensor.CopyFrom(numpy_helper.from_array(np.rint(weights / scale) * scale, tensor.name))
    for tensor in ("d", "p"):
        expected = _outputs(onnx.load(tower), tensor)
        errors = [_outputs(model, tensor) - expected for model in (rounded, nearest)]
        shifts = [np.abs(error.mean(axis=(0, 2, 3))).max() for error in errors]
        assert shifts[0] < 0.1 * shifts[1]
        assert (errors[0] ** 2).mean() < 0.5 * (errors[1] ** 2).mean()


@pytest.mark.parametrize("max_level", [64, 127])
def test_every_quantizer_finds_the_rounded_weights(tower: Path, max_level: int) -> None:
    rounded = _rounded(tower, max_level=max_level)
    expected = onnx.load(tower)
    rounded.replace(expected, ["first", "second"])
    static = StaticQuantizer(tower, SAMPLES, weight_bits=7 if max_level == 64 else 8, rounded=rounded)
    model = onnx.load(tower)
    ranges = measure_ranges(model, quantized_inputs(model), SAMPLES)["percentile"]
    for quantized in (
        onnx.load_from_string(static.quantize("min-max", static.layers)),
        quantize_symmetrically(model, ranges, max_weight=max_level, rounded=rounded),
    ):
        weights = _weights(quantized)
        for name, values in _weights(expected).items():
            np.testing.assert_allclose(weights[name], values, rtol=2e-3, atol=1e-9)


def _product(weights: np.ndarray, path: Path, *, kind: str = "MatMul") -> Path:
    """Write a model of the product with weights (K, O)."""
    attributes = {"transB": 1} if "transposed" in kind else {}
    node = helper.make_node(kind.split(",")[0], ["x", "weights"], ["y"], "product", **attributes)
    stored = np.ascontiguousarray(weights.T if attributes else weights, dtype=np.float32)
    onnx.save(
        onnx_model([node], {"x": ["batch", weights.shape[0]]}, {"y": ["batch", weights.shape[1]]}, {"weights": stored}),
        path,
    )
    return path


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm, transposed"])
def test_matrix_products_are_rounded(kind: str, tmp_path: Path) -> None:
    """Inputs that vary together, as those of layers do, make up for each other's roundings."""
    generator = np.random.default_rng(0)
    samples = (generator.standard_normal((256, 6)) @ generator.standard_normal((6, 160))).astype(np.float32)
    weights = generator.standard_normal((160, 16)).astype(np.float32)
    weights[:, 3] = 0  # an output that is always 0 has no scale
    path = _product(weights, tmp_path / "product.onnx", kind=kind)
    model = onnx.load(path)
    _rounded(path, samples).replace(model, ["product"])
    expected, scale = samples @ weights, np.maximum(np.abs(weights).max(axis=0), 1e-9) / 64
    errors = [_outputs(model, "y", samples) - expected, samples @ (np.rint(weights / scale) * scale) - expected]
    assert (errors[0] ** 2).mean() < 0.1 * (errors[1] ** 2).mean()


def test_the_largest_weight_of_a_channel_stays_the_largest_level(tmp_path: Path) -> None:
    """Made up for by an input that is ten times smaller, a rounding by 0.16 levels is one by 1.6."""
    small = np.random.default_rng(0).standard_normal((64, 1)).astype(np.float32)
    path = _product(np.array([[0.31], [1.0]]), tmp_path / "product.onnx")
    model = onnx.load(path)
    _rounded(path, np.hstack([10 * small, small])).replace(model, ["product"])
    np.testing.assert_allclose(_weights(model)["product"], [[20 / 64], [1]], rtol=1e-3)
