"""Static INT8 for TensorRT: symmetric S8 Q/DQ around Conv, MatMul and Gemm.

TensorRT's parser requires signed bytes with a zero point of 0, weights quantised per output channel, activations per
tensor, and biases in float; LayerNorm, Softmax, SiLU and GELU stay in float, and so do matrix products of two
activations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.exporting.graph import drop_unused_constants, output_axis, replace_nodes, weighted_layers
from clip_rd_edge.exporting.int8.methods import Bounds
from clip_rd_edge.exporting.int8.rounding import RoundedLayers, weight_scale

MAX_LEVEL = 127  # a symmetric range does not use -128
_ZERO_POINT = "symmetric/zero_point"


def quantized_inputs(model: onnx.ModelProto) -> list[str]:
    """Return the names of the activations that get Q/DQ, whichever layers are quantised, to measure their ranges."""
    layers = weighted_layers(model)
    # Of two convolutions that are added, the other is the branch where one alone is quantised.
    branches = [name for layer in layers for name in _residual_branches(model, [layer]).values()]
    return list(dict.fromkeys([*(node.input[0] for node in layers), *branches]))


def quantize_symmetrically(
    model: onnx.ModelProto,
    ranges: Bounds,
    *,
    layers: Sequence[str] | None = None,
    max_weight: int = MAX_LEVEL,
    rounded: RoundedLayers | None = None,
) -> onnx.ModelProto:
    """Return a copy of a float32 model with Q/DQ on the activations and weights of its layers.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        ranges: of the tensors that `quantized_inputs` names.
        layers: names of the Conv, MatMul and Gemm nodes to quantise; None means all with constant weights.
        max_weight: largest level of a weight.
        rounded: the layers rounded to it already; None rounds each weight to the nearest level.
    """
    quantized = copy.deepcopy(model)
    if layers is None:
        layers = [node.name for node in weighted_layers(model)]
    if rounded:
        rounded.replace(quantized, layers)
    selected = [node for node in weighted_layers(quantized) if node.name in layers]
    writer = _QdqWriter(quantized.graph, ranges, max_weight=max_weight)
    for node in selected:
        node.input[0] = writer.activation(node.input[0])
        node.input[1] = writer.weight(node)
    nodes = {node.name: node for node in quantized.graph.node}
    for name, tensor in _residual_branches(model, selected).items():
        add = nodes[name]
        add.input[list(add.input).index(tensor)] = writer.activation(tensor)
    writer.finish()
    return quantized


def _residual_branches(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """Map the name of each Add of a quantised convolution and another branch to that branch's tensor.

    With Q/DQ on the branch, TensorRT computes the sum in the convolution's kernel.
    """
    convolutions = {node.output[0] for node in layers if node.op_type == "Conv"}
    constants = {tensor.name for tensor in model.graph.initializer}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    branches = {}
    for node in model.graph.node:
        if node.op_type == "Add" and not constants.intersection(node.input):
            fused = [name for name in node.input if name in convolutions and uses[name] == 1]
            if fused:
                branches[node.name] = next(name for name in node.input if name != fused[0])
    return branches


class _QdqWriter:
    """Adds Q/DQ pairs to a graph, one per tensor however many layers read it."""

    def __init__(self, graph: onnx.GraphProto, ranges: Bounds, *, max_weight: int) -> None:
        self._graph = graph
        self._max_weight = max_weight
        self._ranges = ranges
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._pairs: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
        self._dequantized: dict[str, onnx.NodeProto] = {}

    def activation(self, name: str) -> str:
        """Return the name of the activation after its Q/DQ."""
        if name not in self._pairs:
            scale = self._constant(f"{name}/scale", weight_scale(max(map(abs, self._ranges[name])), MAX_LEVEL))
            q = helper.make_node("QuantizeLinear", [name, scale, _ZERO_POINT], [f"{name}/q"], name=f"quantize {name}")
            dq = helper.make_node(
                "DequantizeLinear", [f"{name}/q", scale, _ZERO_POINT], [f"{name}/dq"], name=f"dequantize {name}"
            )
            self._pairs[name] = (q, dq)
        return f"{name}/dq"

    def weight(self, node: onnx.NodeProto) -> str:
        """Return the name of the layer's weights, in S8 per output channel, after their DQ."""
        name, axis = node.input[1], output_axis(node)
        new = f"{name}/dq{axis}"
        if new not in self._dequantized:
            values = numpy_helper.to_array(self._weights[name])
            axis %= values.ndim
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = weight_scale(np.abs(values).max(axis=others), self._max_weight)
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            levels = np.rint(values / scale.reshape(shape))
            quantized = np.clip(levels, -self._max_weight, self._max_weight).astype(np.int8)
            inputs = [
                self._constant(f"{new}/s8", quantized),
                self._constant(f"{new}/scale", scale),
                self._constant(f"{new}/zero_point", np.zeros(scale.shape, np.int8)),
            ]
            self._dequantized[new] = helper.make_node(
                "DequantizeLinear", inputs, [new], name=f"dequantize {new}", axis=axis
            )
        return new

    def finish(self) -> None:
        """Insert every new node after the nodes it reads, and drop the float weights that are no longer used."""
        self._constant(_ZERO_POINT, np.zeros((), np.int8))
        nodes = list(self._dequantized.values())
        for value in self._graph.input:
            nodes.extend(self._pairs.get(value.name, ()))
        for node in self._graph.node:
            nodes.append(node)
            nodes.extend(new for name in node.output for new in self._pairs.get(name, ()))
        replace_nodes(self._graph, nodes)
        drop_unused_constants(self._graph)

    def _constant(self, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int8]) -> str:
        self._graph.initializer.append(numpy_helper.from_array(values, name))
        return name
