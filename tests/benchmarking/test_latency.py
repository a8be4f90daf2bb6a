from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.benchmarking.latency import MODEL, measure_latencies, reference_call
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.errors import InputError


def test_each_tower_and_the_whole_way(make_encoder: Callable[..., Any], pictures: dict[str, Path]) -> None:
    slow, quick = make_encoder(), make_encoder()
    plain, layouts = slow.encode_pixels, []

    def encode_slowly(pixels: np.ndarray) -> np.ndarray:
        layouts.append((pixels.shape, pixels.strides))
        time.sleep(0.004)
        return plain(pixels)

    slow.encode_pixels = encode_slowly
    measured = measure_latencies({"slow": slow, "quick": quick}, pictures["red"], threads=1, rounds=6).rows
    as_encoded = np.stack([preprocess(open_image(pictures["red"]), slow.describe().preprocessing)])
    assert set(layouts) == {((1, 3, 8, 8), as_encoded.strides)}
    assert measured["slow"].image.p50 >= 4 > measured["quick"].image.p50
    assert measured["slow"].end_to_end.p50 >= 4
    assert measured["slow"].text.p50 < 4
    assert measured["slow"].image.p95 >= measured["slow"].image.p50
    assert (measured["quick"].rounds, measured["quick"].threads) == (6, 1)


def test_a_missing_picture(make_encoder: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        measure_latencies({"a": make_encoder()}, tmp_path / "none.png")


def test_the_model_is_what_it_is_said_to_be() -> None:
    import onnx
    from onnx import TensorProto, helper

    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", "K"]), ("w", ["K", "M"]), ("y", ["N", "M"]))
    }
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "reference", [tensors["x"], tensors["w"]], [tensors["y"]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
    assert onnx.load_from_string(MODEL) == made


def test_it_runs_on_the_threads_asked_for() -> None:
    (product,) = reference_call(threads=1)()  # type: ignore[misc]
    assert product.shape == (64, 2048)
