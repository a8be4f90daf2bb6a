from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.methods import quantize_dynamically, scales_per_batch
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load


def test_a_tower_with_scales_of_the_batch_runs_one_at_a_time(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))
    source = prepare_for_quantization(bundle / "text.onnx", tmp_path)
    content = quantize_dynamically(source, matrix_products=True, token_embeddings=True, per_token=False)
    assert scales_per_batch(content)
    quantized = onnx.load_from_string(content)
    onnx.checker.check_model(quantized, full_check=True)
    assert [opset.domain for opset in quantized.opset_import] == [""]
    assert not scales_per_batch(source.read_bytes())
    (bundle / "text.onnx").write_bytes(content)
    manifest = read_manifest(bundle)
    embeddings = {}
    for one_at_a_time in (False, True):
        text = msgspec.structs.replace(manifest.text, one_at_a_time=one_at_a_time)
        write_manifest(bundle, msgspec.structs.replace(manifest, text=text))
        encoder = load(bundle)
        embeddings[one_at_a_time] = encoder.encode_texts(["a red cat", "under a tree", "", "dog " * 20])
    single = load(bundle).encode_texts(["a red cat"])
    np.testing.assert_array_equal(embeddings[True][:1], single)
    assert np.abs(embeddings[False][:1] - single).max() > 1e-6  # the reason for one_at_a_time


def test_with_scales_per_token_an_embedding_does_not_depend_on_the_batch(
    fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    source = prepare_for_quantization(fp32_bundle / "text.onnx", tmp_path)
    content = quantize_dynamically(source, matrix_products=True, token_embeddings=True, per_token=True)
    quantized = onnx.load_from_string(content)
    onnx.checker.check_model(quantized, full_check=True)
    assert [opset.domain for opset in quantized.opset_import] == [""]
    assert not scales_per_batch(content)
    session, ids = open_session(content), calibration.held_out.ids
    embeddings = embed(session, ids)
    np.testing.assert_allclose(embeddings, embed(session, ids, batch_size=1), atol=1e-6)
    assert agreement(embed(open_session(str(source)), ids), embeddings).centred_cosine > 0.998


def test_a_token_with_large_values_costs_others_nothing(tmp_path: Path) -> None:
    """Products of rank 3 with one input for two of them, then a Gemm of rank 2 with its bias."""
    generator = np.random.default_rng(0)
    constants = {"query": (32, 48), "key": (32, 48), "weights": (8, 48), "bias": (8,), "shape": None}
    values = {
        name: generator.standard_normal(shape).astype(np.float32) if shape else np.array([-1, 48])
        for name, shape in constants.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "query"], ["q"], "q"),
        helper.make_node("MatMul", ["x", "key"], ["k"], "k"),
        helper.make_node("Add", ["q", "k"], ["sum"], "sum"),
        helper.make_node("Reshape", ["sum", "shape"], ["rows"], "rows"),
        helper.make_node("Gemm", ["rows", "weights", "bias"], ["y"], "y", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    source = tmp_path / "products.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), source)
    x = generator.standard_normal((3, 5, 32)).astype(np.float32)
    x[0, 0] *= 1000
    x[1, 2] = 0
    prepared = prepare_for_quantization(source, tmp_path)
    expected = embed(open_session(str(prepared)), x)

    def errors(per_token: bool, optimise: bool) -> np.ndarray:
        content = quantize_dynamically(prepared, matrix_products=True, token_embeddings=False, per_token=per_token)
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return np.abs(embed(session, x) - expected).max(axis=1) / np.abs(expected).max(axis=1)

    for optimise in (True, False):
        assert errors(True, optimise).max() < 0.05
        assert np.median(errors(False, optimise)) > 0.5
    np.testing.assert_allclose(errors(True, True), errors(True, False), atol=1e-5)
    assert errors(True, True)[7] < 1e-6  # the row of zeros: the bias alone
