from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.benchmarking.latency import REFERENCE_MODEL, measure_latencies, percentiles, reference_call
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.errors import InputError


def test_each_tower_and_end_to_end_latency(make_encoder: Callable[..., Any], squares: dict[str, Path]) -> None:
    slow, fast = make_encoder(), make_encoder()
    plain, layouts = slow.encode_pixels, []

    def encode_slowly(pixels: np.ndarray) -> np.ndarray:
        layouts.append((pixels.shape, pixels.strides))
        time.sleep(0.02)
        return plain(pixels)

    slow.encode_pixels = encode_slowly
    measured = measure_latencies({"slow": slow, "fast": fast}, squares["red"], threads=1, rounds=6).rows
    stacked = np.stack([preprocess(open_image(squares["red"]), slow.describe().preprocessing)])
    assert set(layouts) == {((1, 3, 8, 8), stacked.strides)}
    assert measured["slow"].image.p50 >= 20 > measured["fast"].image.p50
    assert measured["slow"].end_to_end.p50 >= 20
    assert measured["slow"].text.p50 < 20
    assert measured["slow"].image.p95 >= measured["slow"].image.p50
    assert (measured["fast"].rounds, measured["fast"].threads) == (6, 1)


def test_the_interval_of_a_quantile_covers_the_differences_between_timing_blocks() -> None:
    """The calls of a block resemble each other: ten blocks of alike calls say no more than ten calls."""
    rng = np.random.default_rng(0)
    levels = 10 + np.arange(10)  # ms: the machine was slower from block to block
    alike = percentiles([level + rng.normal(0, 0.01, 50) for level in levels])
    mixed = percentiles(np.split(rng.permutation(np.repeat(levels, 50)) + rng.normal(0, 0.01, 500), 10))
    assert alike.p50 == pytest.approx(mixed.p50, abs=0.6)
    assert alike.p50_interval is not None
    assert mixed.p50_interval is not None
    assert alike.p50_interval.high - alike.p50_interval.low > 3
    assert mixed.p50_interval.high - mixed.p50_interval.low < 2


def test_intervals_cover_the_true_median_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_rd_edge.benchmarking.latency.RESAMPLES", 200)
    rng, trials, covered = np.random.default_rng(0), 500, 0
    for _ in range(trials):
        interval = percentiles([np.array([latency]) for latency in rng.exponential(size=60)]).p50_interval
        assert interval is not None
        covered += interval.low <= np.log(2) <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("slow", [[100.0, 100.0, 200.0], [100.0, 100.0, 100.0]])
def test_an_interval_covers_its_quantile_where_one_block_is_shorter(slow: list[float]) -> None:
    """Blocks end with their time: the last calls of longer ones count for the quantile and for its interval."""
    measured = percentiles([*(np.array(slow) for _ in range(9)), np.array([100.0, 100.0])])
    for name in ("p50", "p95", "p99"):
        interval = getattr(measured, f"{name}_interval")
        assert interval.low <= getattr(measured, name) <= interval.high
    assert measured.p99_interval is not None
    assert measured.p99_interval.high == max(slow)


def test_a_missing_image_is_an_error(make_encoder: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the file does not exist"):
        measure_latencies({"a": make_encoder()}, tmp_path / "none.png")


def test_the_embedded_reference_model_is_one_matrix_product() -> None:
    import onnx
    from onnx import TensorProto, helper

    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", "K"]), ("w", ["K", "M"]), ("y", ["N", "M"]))
    }
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "reference", [tensors["x"], tensors["w"]], [tensors["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
    assert onnx.load_from_string(REFERENCE_MODEL) == model


def test_the_reference_workload_runs() -> None:
    (product,) = reference_call(threads=1)()  # type: ignore[misc]
    assert product.shape == (64, 2048)
