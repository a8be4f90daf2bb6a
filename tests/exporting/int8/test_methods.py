"""The ways of writing a tower in INT8: static, dynamic, symmetric; and the ranges that they need."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
from onnx import helper, numpy_helper
from support import onnx_model, rewrite

from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.methods import (
    StaticQuantizer,
    measure_ranges,
    quantize_dynamically,
    scales_per_batch,
)
from clip_rd_edge.exporting.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.exporting.towers import export_image_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load


@pytest.fixture(scope="module")
def mobilevit(make_student: Callable[..., ClipModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileViT of two blocks, the second with two layers of attention, as candidates are made from it."""
    folder, configs = tmp_path_factory.mktemp("mobilevit"), timm.models.mobilevit.model_cfgs
    whole = configs["mobilevit_xxs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs, "mobilevit_xxs", dataclasses.replace(whole, blocks=whole.blocks[:3:2]))
        clip = make_student("mobilevit_xxs", image_size=64)
    return prepare_for_quantization(export_image_tower(clip, folder), folder)


def test_softmax_normalisation_and_attention_products_stay_in_float(mobilevit: Path) -> None:
    samples = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    quantizer = StaticQuantizer(mobilevit, samples)
    kinds = Counter(node.op_type for node in onnx.load(mobilevit).graph.node if node.name in quantizer.layers)
    assert kinds == {"Conv": 12, "MatMul": 8, "Gemm": 1}
    nodes = onnx.load_from_string(quantizer.quantize("min-max", quantizer.layers)).graph.node
    producers = {output: node for node in nodes for output in node.output}

    def comes_from_int8(name: str) -> bool:
        return name in producers and producers[name].op_type == "DequantizeLinear"

    by_kind = {kind: [n for n in nodes if n.op_type == kind] for kind in ("Softmax", "MatMul", "Sigmoid")}
    assert not any(comes_from_int8(node.input[0]) for node in by_kind["Softmax"])
    assert sum(not comes_from_int8(node.input[1]) for node in by_kind["MatMul"]) == 4  # two per layer of attention
    # SiLU follows its convolution; in layers of attention it follows a matrix product.
    assert all(comes_from_int8(node.input[0]) for node in by_kind["Sigmoid"])


def test_the_range_of_a_layer_replaces_its_relu(prepared: dict[str, Path], calibration: CalibrationSet) -> None:
    model = prepared["image"]
    quantizer = StaticQuantizer(model, calibration.calibrate.pixels)
    content = quantizer.quantize("min-max", quantizer.layers)
    before, after = (
        Counter(node.op_type for node in m.graph.node) for m in (onnx.load(model), onnx.load_from_string(content))
    )
    assert (before["Relu"], after["Relu"]) == (11, 0)
    quantized = onnx.load_from_string(content)
    onnx.checker.check_model(quantized, full_check=True)
    assert [opset.domain for opset in quantized.opset_import] == [""]  # ONNX Runtime imports nine
    pixels = calibration.held_out.pixels
    parity = agreement(embed(open_session(str(model)), pixels), embed(open_session(content), pixels))
    assert parity.centred_cosine > 0.99


@pytest.mark.parametrize(("kind", "attributes"), [("Conv", {}), ("Gemm", {"transB": 1}), ("Gemm", {})])
def test_a_layer_in_float_between_int8_layers_is_computed_in_float(
    kind: str, attributes: dict[str, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("first", "second", "third")}
    # ONNX Runtime would give the second layer one scale for all weights: those that count would become 0.
    weights["first"][0], weights["second"][0, 0] = 0, 1_000
    if kind == "Conv":
        weights = {name: value[..., None, None] for name, value in weights.items()}
    elif not attributes:
        weights = {name: value.T for name, value in weights.items()}
    size: list[str | int] = ["batch", 8, 1, 1] if kind == "Conv" else ["batch", 8]
    tensors = ["x", "a", "b", "y"]
    onnx.save(
        onnx_model(
            [
                helper.make_node(kind, [tensors[i], name], [tensors[i + 1]], name, **attributes)
                for i, name in enumerate(weights)
            ],
            {"x": size},
            {"y": size},
            weights,
        ),
        tmp_path / "tower.onnx",
    )
    samples = rng.uniform(0, 1, (16, 8, *size[2:])).astype(np.float32)
    content = StaticQuantizer(tmp_path / "tower.onnx", samples).quantize("min-max", ["first", "third"])
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    as_written, computed = (
        open_session(content, optimize=optimize).run(None, {"x": samples})[0] for optimize in (False, True)
    )
    assert np.abs(computed - as_written).max() <= 0.02 * np.ptp(as_written)


def test_a_tower_with_scales_of_the_batch_runs_one_at_a_time(
    fp32_bundle: Path, prepared: dict[str, Path], tmp_path: Path
) -> None:
    bundle, source = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle")), prepared["text"]
    content = quantize_dynamically(source, matrix_products=True, token_embeddings=True, per_token=False)
    assert scales_per_batch(content)
    quantized = onnx.load_from_string(content)
    onnx.checker.check_model(quantized, full_check=True)
    assert [opset.domain for opset in quantized.opset_import] == [""]
    assert not scales_per_batch(source.read_bytes())
    (bundle / "text.onnx").write_bytes(content)
    embeddings = {}
    for one_at_a_time in (False, True):
        rewrite(bundle, text={"one_at_a_time": one_at_a_time})
        encoder = load(bundle)
        embeddings[one_at_a_time] = encoder.encode_texts(["a red cat", "under a tree", "", "dog " * 20])
    single = load(bundle).encode_texts(["a red cat"])
    np.testing.assert_array_equal(embeddings[True][:1], single)
    assert np.abs(embeddings[False][:1] - single).max() > 1e-6  # the reason for one_at_a_time


def test_with_scales_per_token_an_embedding_does_not_depend_on_the_batch(
    prepared: dict[str, Path], calibration: CalibrationSet
) -> None:
    source = prepared["text"]
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
    source = tmp_path / "products.onnx"
    onnx.save(onnx_model(nodes, {"x": ["batch", 5, 32]}, {"y": [None, 8]}, values), source)
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
        return np.abs(embed(session, x, batch_size=3) - expected).max(axis=1) / np.abs(expected).max(axis=1)

    for optimise in (True, False):
        assert errors(True, optimise).max() < 0.05
        assert np.median(errors(False, optimise)) > 0.5
    np.testing.assert_allclose(errors(True, True), errors(True, False), atol=1e-5)
    assert errors(True, True)[7] < 1e-6  # the row of zeros: the bias alone


def test_q_and_dq_meet_tensorrts_requirements(mobilevit: Path) -> None:
    rng, model = np.random.default_rng(0), onnx.load(mobilevit)
    noise = rng.uniform(-1, 1, (16, 3, 1, 1)) + 0.5 * rng.standard_normal((16, 3, 64, 64))
    pixels = noise.astype(np.float32)
    ranges = measure_ranges(model, quantized_inputs(model), pixels)["percentile"]
    quantized = quantize_symmetrically(model, ranges)
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
    reference = embed(open_session(str(mobilevit)), pixels)
    assert agreement(reference, embed(open_session(quantized.SerializeToString()), pixels)).centred_cosine > 0.9
