from __future__ import annotations

import warnings

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.convert.int8.ranges import entropy_ranges, measure_ranges, subsample


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
