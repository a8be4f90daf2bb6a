from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.exporting.int8.methods import StaticQuantizer, entropy_ranges, measure_ranges, subsample


def test_a_range_excludes_outliers_and_values_that_are_not_finite() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((4, 5_000)).astype(np.float32) for _ in range(2)]
    batches[0][0, 0], batches[1][0, :2] = 8.0, (-np.inf, np.finfo(np.float32).min)  # the last two of masks
    low, high = entropy_ranges({"x": batch} for batch in batches)["x"]
    assert -8 < low < -2
    assert 3 < high < 8


def test_a_range_is_never_wider_than_the_values() -> None:
    positive = np.abs(np.random.default_rng(0).standard_normal((1, 9, 9))).astype(np.float32)
    ranges = entropy_ranges([{"relu": positive, "constant": np.full((2, 3), 0.5, dtype=np.float32)}])
    assert ranges["relu"][0] >= positive.min()
    assert ranges["relu"][1] <= positive.max()
    assert ranges["constant"] == (0.5, 0.5)


def test_a_subset_has_values_of_every_channel() -> None:
    values = np.tile(np.arange(512), (1, 150, 1))  # channels last; half of them have odd numbers, and a step is 2
    assert len(np.unique(subsample(values))) == 512
    assert subsample(np.arange(10)).tolist() == list(range(10))


def test_a_mask_of_the_most_negative_number_is_measured_without_a_warning() -> None:
    lowest = np.finfo(np.float32).min
    mask = numpy_helper.from_array(np.array([[0, lowest]], np.float32), "mask")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "mask"], ["masked"])],
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("masked", TensorProto.FLOAT, ["N", 2])],
        [mask],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranges = measure_ranges(model, ["masked"], np.zeros((64, 2), np.float32))
    assert ranges.min_max["masked"] == (lowest, 0)
    assert ranges.percentile["masked"][0] < lowest / 2


def test_no_pixel_lies_between_two_levels_where_mean_and_standard_deviation_are_one_half(tmp_path: Path) -> None:
    """There, the last bit of a sum, which differs by processor, would decide how each pixel is rounded."""
    weights = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weights"], ["y"], name="stem")],
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 16, 16])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "tower.onnx")
    pixels = np.arange(256) / 255 * 2 - 1
    samples = np.broadcast_to(pixels.reshape(16, 16), (8, 3, 16, 16)).astype(np.float32)
    content = StaticQuantizer(tmp_path / "tower.onnx", samples).quantize("percentile", ["stem"])
    quantized = onnx.load_from_string(content)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    node = next(node for node in quantized.graph.node if node.input[0] == "x")
    scale, zero_point = (constants[name].item() for name in node.input[1:])

    def levels(pixels: np.ndarray) -> np.ndarray:
        return (np.rint(pixels / scale) + zero_point).clip(0, 255)

    np.testing.assert_array_equal(levels(pixels * (1 + 1e-6)), levels(pixels * (1 - 1e-6)))
    assert np.abs((levels(pixels) - zero_point) * scale - pixels).max() <= scale / 2
