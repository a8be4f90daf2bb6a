"""What is written for TensorRT, without TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.ranges import measure_ranges
from clip_rd_edge.convert.int8.static import layers_of
from clip_rd_edge.convert.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.convert.parity import agreement, embed
from clip_rd_edge.convert.tensorrt.strongly_typed import symmetric_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session


@pytest.fixture
def pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Noise pictures of different brightness, 16 of 64 × 64."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (16, 3, 1, 1)) + 0.5 * rng.standard_normal((16, 3, 64, 64))
    return noise.astype(np.float32)


@pytest.mark.parametrize("trunk", ["resnet10t", "mobilevit_xxs"])
def test_q_and_dq_are_what_tensorrt_takes(
    trunk: str, image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path, pixels: np.ndarray
) -> None:
    source = image_tower(trunk)[1]
    model = onnx.load(preprocessed(source, tmp_path))
    quantized = quantize_symmetrically(model, measure_ranges(model, quantized_inputs(model), pixels))
    onnx.checker.check_model(quantized, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    made_by = {name: node for node in quantized.graph.node for name in node.output}
    layers = {node.name: node for node in layers_of(model)}
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (constants[name] for name in node.input[1:])
            assert zero.dtype == np.int8
            assert not zero.any()
            assert (scale.astype(np.float16) == scale).all()  # nothing shifts when the graph is cast to float16
        elif node.name in layers:
            activation, weight = (made_by[name] for name in node.input[:2])
            assert constants[activation.input[1]].ndim == 0
            original = next(t for t in model.graph.initializer if t.name == layers[node.name].input[1])
            axis = next(a.i for a in weight.attribute if a.name == "axis")
            assert constants[weight.input[1]].shape == (original.dims[axis],)
            assert len(node.input) < 3 or node.input[2] == layers[node.name].input[2]  # the bias stays as it was
        elif node.op_type in ("Softmax", "LayerNormalization", "Sigmoid"):
            assert all(made_by[name].op_type != "DequantizeLinear" for name in node.input[:1])
    size = len(quantized.SerializeToString()) / source.stat().st_size
    assert size < 0.3
    reference = embed(open_session(str(source)), pixels)
    assert agreement(reference, embed(open_session(quantized.SerializeToString()), pixels)).centred_cosine > 0.9


def test_the_branch_beside_a_convolution_is_quantised_too(
    image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path, pixels: np.ndarray
) -> None:
    model = onnx.load(preprocessed(image_tower("resnet10t")[1], tmp_path))
    quantized = quantize_symmetrically(model, measure_ranges(model, quantized_inputs(model), pixels))
    made_by = {name: node.op_type for node in quantized.graph.node for name in node.output}
    sums = [sorted(made_by[name] for name in node.input) for node in quantized.graph.node if node.op_type == "Add"]
    assert sums == [["Conv", "DequantizeLinear"]] * 4


def test_layers_that_int8_hurts_are_left_in_float(
    fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    prepared = preprocessed(fp32_bundle / "image.onnx", tmp_path)

    def quantized(min_agreement: float) -> tuple[int, int, float] | None:
        found = symmetric_tower(
            prepared,
            calibrate=calibration.calibrate.pixels[:8],
            judge=calibration.judge.pixels[:8],
            min_agreement=min_agreement,
        )
        return found and (len(found.layers), len(found.in_float), found.of.centred_cosine)

    whole = quantized(0.9)
    assert whole is not None
    assert whole[:2] == (15, 0)
    partly = quantized((1 + whole[2]) / 2)
    assert partly is not None
    assert 0 < partly[0] < 15
    assert partly[2] >= (1 + whole[2]) / 2
    assert quantized(1.1) is None  # nothing agrees better than perfectly
