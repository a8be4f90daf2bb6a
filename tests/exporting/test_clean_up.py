"""Exported graphs hold what most programs read, and each pass over them keeps the values."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import open_clip
import pytest
import torch
from onnx import TensorProto, helper, version_converter
from support import onnx_model, tiny_clip
from text_towers import bert_clip

from clip_rd_edge.exporting import clean_up as passes
from clip_rd_edge.exporting.towers import export_image_tower, export_text_tower

TOWERS = ("ViT", "text", "BERT")
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def exported(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """Towers by name, as torch exports them."""
    folder = tmp_path_factory.mktemp("exported")
    tiny, bert = tiny_clip(), bert_clip(folder / "bert", layers=1)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    torch.manual_seed(0)
    vit = replace(tiny, model=open_clip.CustomTextCLIP(32, vision, tiny.model_cfg["text_cfg"]).eval())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_rd_edge.exporting.towers.clean_up", lambda model: None)
        return {
            "ViT": onnx.load(export_image_tower(vit, folder)),
            "text": onnx.load(fp32_bundle / "text.onnx"),  # which is clean already
            "BERT": onnx.load(export_text_tower(bert, folder)),
        }


def _inputs(model: onnx.ModelProto, count: int) -> Array:
    """Pixels, or ids of texts of different lengths, padded with 0."""
    rng, tensor = np.random.default_rng(0), model.graph.input[0].type.tensor_type
    shape = (count, *(dim.dim_value for dim in tensor.shape.dim[1:]))
    if tensor.elem_type == TensorProto.FLOAT:
        return rng.standard_normal(shape).astype(np.float32)
    ids = rng.integers(3, 30, shape)
    for row, length in zip(ids, range(2, 2 + count), strict=True):
        row[length:] = 0
    return ids


def _run(model: onnx.ModelProto, inputs: Array, *, optimized_file: Path | None = None) -> Array:
    """Run a model; if `optimized_file` is given, with graph optimisations, and write the optimised graph there."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_file is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized_file)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])


def _kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_keeps_its_values_and_has_nothing_that_says_nothing(
    tower: str, exported: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    before, after = exported[tower], copy.deepcopy(exported[tower])
    passes.clean_up(after)
    onnx.checker.check_model(after, full_check=True)
    for count in (1, 3):
        inputs = _inputs(before, count)
        np.testing.assert_allclose(_run(after, inputs), _run(before, inputs), rtol=0, atol=3e-7)
    assert after.ByteSize() <= before.ByteSize()
    assert b".py" not in after.SerializeToString()
    constants = {tensor.name for tensor in after.graph.initializer}
    assert [node.name for node in after.graph.node if constants.issuperset(node.input)] == []
    attributes = {(node.op_type, attribute.name) for node in after.graph.node for attribute in node.attribute}
    assert {name for _, name in attributes}.isdisjoint(("noop_with_empty_axes", "allowzero", "select_last_index"))
    assert ("GatherND", "batch_dims") not in attributes
    assert not any(node.op_type in ("ReduceL2", "IsNaN") for node in after.graph.node)
    older = version_converter.convert_version(after, 17)
    np.testing.assert_allclose(_run(older, inputs), _run(after, inputs), rtol=0, atol=1e-6)
    _run(after, inputs, optimized_file=tmp_path / "fused.onnx")
    assert "Erf" not in _kinds(onnx.load(tmp_path / "fused.onnx"))  # each GELU is one kernel


def test_a_norm_is_taken_by_row_and_is_safe_at_0() -> None:
    nodes = [
        helper.make_node("ReduceL2", ["x", "axes"], ["norm"], "norm", keepdims=1, noop_with_empty_axes=0),
        helper.make_node("Clip", ["norm", "tiny"], ["safe"], "clip"),
        helper.make_node("Div", ["x", "safe"], ["y"], "divide"),
    ]
    model = onnx_model(nodes, {"x": ["N", 3]}, {"y": ["N", 3]}, {"axes": [-1], "tiny": np.float32(1e-12)})
    passes.clean_up(model)
    assert _kinds(model) == {"Pow": 1, "ReduceSum": 1, "Sqrt": 1, "Clip": 1, "Div": 1}
    rows = np.asarray([[3, 0, 4], [0, 0, 0], [-1e15, 0, 0]], np.float32)
    np.testing.assert_allclose(_run(model, rows), [[0.6, 0, 0.8], [0, 0, 0], [-1, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(("start", "kept"), [(0, ["end"]), (1, ["end", "start"])])
def test_an_attribute_with_another_value_than_its_default_stays(start: int, kept: list[str]) -> None:
    graph = helper.make_graph([helper.make_node("Shape", ["x"], ["y"], start=start, end=2)], "shape", [], [])
    passes.drop_redundant_attributes(graph)
    assert sorted(attribute.name for attribute in graph.node[0].attribute) == kept
