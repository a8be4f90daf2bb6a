"""INT8 weights that no processor saturates, and the instruction sets that the manifest names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.contract.bundle import INSTRUCTION_SETS
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.graph import prepare_for_quantization
from clip_rd_edge.convert.int8.candidates import OPENVINO, ORT, Backend, Candidate, CandidateRequest, nncf_is_installed
from clip_rd_edge.convert.int8.saturation import MAX_WEIGHT, instruction_sets, max_weight
from clip_rd_edge.convert.options import WeightBits
from clip_rd_edge.utils.reporting import SILENT


def _candidates(
    backend: Backend, bundle: Path, calibration: CalibrationSet, tower: str, folder: Path, bits: WeightBits
) -> list[Candidate]:
    samples = calibration.calibrate.pixels if tower == "image" else calibration.calibrate.ids
    prepared = prepare_for_quantization(bundle / f"{tower}.onnx", folder)
    request = CandidateRequest(
        model=prepared, samples=samples, max_error=0.01, weight_bits=bits, threads=1, reporter=SILENT
    )
    return list(backend.candidates(request))


def test_two_neighbouring_products_of_7_bit_weights_fit_16_bits() -> None:
    assert 2 * 255 * MAX_WEIGHT[7] <= np.iinfo(np.int16).max < 2 * 255 * MAX_WEIGHT[8]


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("backend", [ORT, OPENVINO], ids=lambda backend: backend.name)
def test_no_candidate_for_unknown_processors_can_saturate(
    backend: Backend, tower: str, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    names = []
    for candidate in _candidates(backend, fp32_bundle, calibration, tower, tmp_path, 7):
        content = candidate.make()
        largest = max_weight(onnx.load_from_string(content))
        # The largest weight of a channel is on the last level, or nothing was quantised.
        assert largest in ((None, 64) if candidate.name == "token embeddings only" else (64,)), candidate.name
        assert instruction_sets(content) == (INSTRUCTION_SETS if largest else ())
        names.append(candidate.name)
    assert len(names) >= 3
    assert (backend is OPENVINO and nncf_is_installed()) == any(name.startswith("NNCF") for name in names)
    assert (tower == "text") == any("token embeddings" in name for name in names)


def test_token_embeddings_for_openvino_have_one_byte_per_number_but_in_one_candidate(
    fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    in_float = []
    for candidate in _candidates(OPENVINO, fp32_bundle, calibration, "text", tmp_path, 7):
        graph = onnx.load_from_string(candidate.make()).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        tables = {kinds[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in kinds}
        if TensorProto.FLOAT in tables:
            in_float.append(candidate.name)
    assert in_float == ["symmetric, percentile, token embeddings in float"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_8_bit_weights_hold_with_vnni_and_on_arm_alone(
    tower: str, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    (first, *_) = _candidates(ORT, fp32_bundle, calibration, tower, tmp_path, 8)
    content = first.make()
    assert max_weight(onnx.load_from_string(content)) in (127, 128)
    assert instruction_sets(content) == ("x86-64-vnni", "aarch64")


def test_constants_that_are_added_or_multiplied_one_by_one_keep_8_bits(tmp_path: Path) -> None:
    from clip_rd_edge.convert.int8.static import StaticQuantizer

    rng = np.random.default_rng(0)
    constants = {"kernel": (4, 3, 1, 1), "scale": (4, 1, 1)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "kernel"], ["features"], name="conv"),
            helper.make_node("Sigmoid", ["features"], ["gate"], name="sigmoid"),  # so that `mul` is not folded
            helper.make_node("Mul", ["gate", "scale"], ["y"], name="mul"),
        ],
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 2, 2])],
        [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), n) for n, shape in constants.items()],
    )
    path = tmp_path / "tower.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    model = prepare_for_quantization(path, tmp_path)
    quantizer = StaticQuantizer(model, rng.standard_normal((8, 3, 2, 2)).astype(np.float32))
    quantized = onnx.load_from_string(quantizer.quantize("min-max", quantizer.layers))
    largest = {
        tensor.name.removesuffix("_quantized"): int(np.abs(numpy_helper.to_array(tensor).astype(int)).max())
        for tensor in quantized.graph.initializer
        if tensor.name.endswith("_quantized")
    }
    assert largest["kernel"] == 64
    assert largest["scale"] > 127  # U8, like an activation


def test_weights_that_the_graph_itself_quantises_are_seen() -> None:
    values = np.array([[0.5, -1.0], [0.25, 0.125]], dtype=np.float32)  # NNCF leaves weights in float before Q/DQ
    for scale, expected in ((1 / 127, 127), (1 / 64, 64)):
        graph = helper.make_graph(
            [
                helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                helper.make_node("MatMul", ["x", "d"], ["y"]),
            ],
            "tower",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
            [
                numpy_helper.from_array(values, "w"),
                numpy_helper.from_array(np.float32(scale).reshape(()), "s"),
                numpy_helper.from_array(np.int8(0).reshape(()), "z"),
            ],
        )
        assert max_weight(helper.make_model(graph)) == expected
