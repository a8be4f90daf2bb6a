from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from clip_rd_edge.exporters.quiet import silently
from clip_rd_edge.exporters.slim import forget_sources, regroup_gelu


def test_gelu_becomes_one_kernel_and_keeps_its_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, fused = tmp_path / "gelu.onnx", tmp_path / "fused.onnx"
    with silently():
        torch.onnx.export(nn.Sequential(nn.Linear(8, 8), nn.GELU()), (torch.zeros(2, 8),), str(path), dynamo=True)
    model = onnx.load(path)
    before = values(model)
    forget_sources(model.graph)
    assert b".py" not in model.SerializeToString()
    regroup_gelu(model.graph)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(values(model), before)
    values(model, written=fused)
    kinds = {node.op_type for node in onnx.load(fused).graph.node}
    assert "Erf" not in kinds
    assert kinds & {"Gelu", "BiasGelu"}


def values(model: onnx.ModelProto, written: Path | None = None) -> np.ndarray:
    """What it gives for some inputs; as it stands, or as ONNX Runtime rewrites it, which then is `written`."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if written is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(written)
    session = ort.InferenceSession(model.SerializeToString(), options)
    inputs = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])
