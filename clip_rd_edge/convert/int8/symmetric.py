"""Static INT8 as TensorRT takes it: symmetric S8 Q/DQ around Conv, MatMul and Gemm. Never imports torch.

TensorRT's parser wants signed bytes with a zero point of 0, weights by output channel, activations by tensor, and
biases in float; LayerNorm, Softmax, SiLU and GELU stay outside, and so do products of two activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.convert.fp16 import OPSET
from clip_rd_edge.convert.int8.ranges import Ranges
from clip_rd_edge.convert.int8.static import layers_of

_MOST = 127  # -128 is not used: a symmetric range has no place for it
_SMALLEST = np.finfo(np.float16).smallest_subnormal
_ZERO_POINT = "symmetric/zero_point"
Floats = npt.NDArray[np.float32]


def quantized_inputs(model: onnx.ModelProto) -> list[str]:
    """Names of the activations that get Q/DQ, so that their ranges can be measured."""
    layers = layers_of(model)
    return list(dict.fromkeys([*(node.input[0] for node in layers), *_residuals(model, layers).values()]))


def quantize_symmetrically(
    model: onnx.ModelProto, ranges: Ranges, *, layers: Sequence[str] | None = None
) -> onnx.ModelProto:
    """A copy of a float32 model with Q/DQ on activations and weights of its layers.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        ranges: of the tensors that `quantized_inputs` names.
        layers: names of the Conv, MatMul and Gemm nodes to quantise; None takes all with constant weights.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    chosen = [node for node in layers_of(copy) if layers is None or node.name in layers]
    writer = _Writer(copy.graph, ranges)
    for node in chosen:
        node.input[0] = writer.activation(node.input[0])
        node.input[1] = writer.weight(node)
    nodes = {node.name: node for node in copy.graph.node}
    for name, tensor in _residuals(model, chosen).items():
        add = nodes[name]
        add.input[list(add.input).index(tensor)] = writer.activation(tensor)
    writer.finish()
    for opset in copy.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)
    return copy


def _residuals(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """For each Add that sums a quantised convolution and another branch: its name, and that branch's tensor.

    TensorRT then computes the sum in the convolution's own kernel.
    """
    convolutions = {node.output[0] for node in layers if node.op_type == "Conv"}
    constants = {tensor.name for tensor in model.graph.initializer}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    found = {}
    for node in model.graph.node:
        if node.op_type == "Add" and not constants.intersection(node.input):
            fused = [name for name in node.input if name in convolutions and uses[name] == 1]
            if fused:
                found[node.name] = next(name for name in node.input if name != fused[0])
    return found


class _Writer:
    """Adds Q/DQ pairs to a graph, one a tensor however many layers read it."""

    def __init__(self, graph: onnx.GraphProto, ranges: Ranges) -> None:
        self._graph = graph
        self._ranges = ranges.percentile
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._pairs: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
        self._dequantized: dict[str, onnx.NodeProto] = {}

    def activation(self, name: str) -> str:
        """The activation `name` after its Q/DQ."""
        if name not in self._pairs:
            scale = self._constant(f"{name}/scale", _scale(max(map(abs, self._ranges[name]))))
            q = helper.make_node("QuantizeLinear", [name, scale, _ZERO_POINT], [f"{name}/q"], name=f"quantize {name}")
            dq = helper.make_node(
                "DequantizeLinear", [f"{name}/q", scale, _ZERO_POINT], [f"{name}/dq"], name=f"dequantize {name}"
            )
            self._pairs[name] = (q, dq)
        return f"{name}/dq"

    def weight(self, node: onnx.NodeProto) -> str:
        """The layer's weights in S8 by output channel, after their DQ."""
        name, axis = node.input[1], _output_axis(node)
        new = f"{name}/dq{axis}"
        if new not in self._dequantized:
            values = numpy_helper.to_array(self._weights[name])
            axis %= values.ndim
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = _scale(np.abs(values).max(axis=others))
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            quantized = np.clip(np.rint(values / scale.reshape(shape)), -_MOST, _MOST).astype(np.int8)
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
        """Put every new node behind what it reads, and drop the float weights that nothing reads any more."""
        self._constant(_ZERO_POINT, np.zeros((), np.int8))
        nodes = list(self._dequantized.values())
        for value in self._graph.input:
            nodes.extend(self._pairs.get(value.name, ()))
        for node in self._graph.node:
            nodes.append(node)
            nodes.extend(made for name in node.output for made in self._pairs.get(name, ()))
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _constant(self, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int8]) -> str:
        self._graph.initializer.append(numpy_helper.from_array(values, name))
        return name


def _output_axis(node: onnx.NodeProto) -> int:
    if node.op_type == "Conv":
        return 0
    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else -1


def _scale(largest: npt.ArrayLike) -> Floats:
    """The step that reaches `largest`: of those that float16 has, the next greater, so that nothing shifts in FP16."""
    wanted = np.maximum(np.asarray(largest, dtype=np.float32) / _MOST, np.float32(_SMALLEST))
    rounded = wanted.astype(np.float16)
    below = rounded.astype(np.float32) < wanted
    scale: Floats = np.where(below, np.nextafter(rounded, np.float16(np.inf)), rounded).astype(np.float32)
    return scale
