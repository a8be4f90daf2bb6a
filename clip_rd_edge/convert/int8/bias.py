"""Bias correction: rounding weights moves the mean of every channel, and a bias can take that back.

Where few values are added, as in depthwise convolutions, the roundings of one channel do not average out, and the shift
is most of INT8's error. It is measured with the inputs that the layer has in float32. Measured in the quantised tower,
it would include the shifts of the layers before, which their own biases take back. (Nagel et al. 2019, Data-Free
Quantization Through Weight Equalization and Bias Correction, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.convert.int8.ranges import activation_batches
from clip_rd_edge.convert.parity import Inputs
from clip_rd_edge.runtime.backends.onnxruntime import open_session

_MAX_SAMPLES = 64  # means need fewer samples than ranges
Floats = npt.NDArray[np.float32]


def mean_shifts(model: onnx.ModelProto, quantized: onnx.ModelProto, samples: Inputs) -> dict[str, Floats]:
    """Return by how much rounded weights move the mean of each output channel, by the name of the convolution.

    Convolutions in float or without a constant bias are left out.

    Args:
        model: the float32 model.
        quantized: the same with Q/DQ, biases of the same names, in some or all convolutions.
        samples: inputs (N, …); the first ones are used.
    """
    constants = {tensor.name: tensor for tensor in (*model.graph.initializer, *quantized.graph.initializer)}
    dequantizers = {node.output[0]: node for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    weights = {
        node.name: dequantizers[node.input[1]].input
        for node in quantized.graph.node
        if node.op_type == "Conv" and node.input[1] in dequantizers
    }
    layers = [node for node in model.graph.node if node.name in weights and _bias(node) in constants]
    if not layers:
        return {}
    means = _mean_inputs(model, [node.input[0] for node in layers], samples[:_MAX_SAMPLES])
    shifts = {}
    for node in layers:
        levels, scale = (numpy_helper.to_array(constants[name]) for name in weights[node.name][:2])
        rounded = levels * scale.reshape(-1, *[1] * (levels.ndim - 1))  # per output channel
        error = rounded - numpy_helper.to_array(constants[node.input[1]])
        shifts[node.name] = _mean_product(means[node.input[0]], error, node)
    return shifts


def correct_biases(model: onnx.ModelProto, shifts: Mapping[str, Floats], layers: Sequence[str]) -> None:
    """Subtract the shifts from the biases of the named convolutions, in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.name in layers and node.name in shifts:
            bias = numpy_helper.to_array(constants[node.input[2]]) - shifts[node.name]
            node.input[2] = f"{node.name}/corrected_bias"  # another layer may share the old one
            model.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), node.input[2]))


def _bias(node: onnx.NodeProto) -> str:
    return node.input[2] if len(node.input) > 2 else ""


def _mean_inputs(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> dict[str, Floats]:
    """Return the means over the samples, (C, H, W) or (C, W), of a model's activations."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for batch in activation_batches(model, list(dict.fromkeys(tensors)), samples):
        for name, values in batch.items():
            sums[name] = sums.get(name, np.zeros(1)) + values.sum(axis=0)
    return {name: (values / len(samples)).astype(np.float32) for name, values in sums.items()}


def _mean_product(mean: Floats, weights: Floats, node: onnx.NodeProto) -> Floats:
    """Return the mean (O,) over all positions of a convolution of `mean` (C, H, W) with `weights` (O, C / group, …)."""
    convolution = onnx.NodeProto()
    convolution.CopyFrom(node)
    convolution.input[:] = ["mean", "weights"]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in convolution.input]
    outputs = [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph([convolution], "product", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = open_session(model.SerializeToString(), threads=1)
    (product,) = session.run(None, {"mean": mean[None], "weights": weights})
    shift: Floats = product.mean(axis=(0, *range(2, product.ndim)))
    return shift
