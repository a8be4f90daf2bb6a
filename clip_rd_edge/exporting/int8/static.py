"""Static INT8: activation ranges are measured in advance and stored in the graph as Q/DQ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.exporting.graph import (
    LAYERS,
    activation_batches,
    file_content,
    float_tensors,
    output_axis,
    silently,
    weighted_layers,
)
from clip_rd_edge.exporting.int8.ranges import (
    Ranges,
    entropy_ranges,
    measure_ranges,
    range_without_ties,
)
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.options import WeightBits
from clip_rd_edge.exporting.parity import Inputs

RangeMethod = Literal["min-max", "percentile", "entropy"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
# Quantised if all their inputs come from quantised nodes: SiLU and similar activations, residual sums, pooling. In
# float, each would need its inputs dequantised and its output quantised again.
_FOLLOWERS = ("Add", "Mul", "Sigmoid", "HardSigmoid", "ReduceMean", "GlobalAveragePool", "AveragePool", "MaxPool")
# The quantiser removes these and lets the range of their output do the clipping; keeping them would cost a conversion.
_CLIPPING = ("Relu", "Clip")


class StaticQuantizer:
    """Quantises any of a tower's layers, and the element-wise nodes after them: U8 activations, per-channel S8 weights.

    Only the weights of layers have `weight_bits`: constants of element-wise nodes, where nothing saturates, have 8,
    like activations.

    Weights are rounded, and biases corrected, by what each layer sees: see `exporting.int8.rounding`.

    ONNX Runtime's CPU kernels are fastest with U8 and S8. Matrix products of two activations, as in attention, stay in
    float, and so do Softmax, normalisation and the nodes after them.

    Attributes:
        layers: names of all layers with weights.

    Args:
        model: path of a float32 model that `quant_pre_process` has optimised.
        samples: inputs (N, …) that the ranges are measured on.
        weight_bits: see `exporting.int8.saturation`.
        rounded: the layers with weights that are rounded already; None rounds each weight to the nearest level.
    """

    def __init__(
        self, model: Path, samples: Inputs, *, weight_bits: WeightBits = 7, rounded: RoundedLayers | None = None
    ) -> None:
        self._model = onnx.load(model)
        self._samples = samples
        self._weight_bits = weight_bits
        self._rounded = rounded
        self.layers: tuple[str, ...] = tuple(node.name for node in weighted_layers(self._model))

    def quantize(self, method: RangeMethod, layers: Sequence[str]) -> bytes:
        """Return the model with `layers`, a subset of `self.layers`, in INT8, as file content."""
        if not layers:  # an empty list means all layers to the library
            return file_content(self._model)
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        if method == "entropy":
            ranges = self._entropy_ranges
        else:
            ranges = self._ranges.min_max if method == "min-max" else self._ranges.percentile
        ranges = {name: range_without_ties(*bounds) for name, bounds in ranges.items()}
        model = copy.deepcopy(self._model)
        if self._rounded:
            self._rounded.replace(model, layers)
        with silently():
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=self._weight_bits == 7,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
                nodes_to_quantize=[*layers, *_followers(self._model, layers)],
                nodes_to_exclude=[],
                op_types_to_quantize=[*LAYERS, *_FOLLOWERS, *_CLIPPING],
                extra_options={"TensorQuantOverrides": self._overrides},
            )
            quantizer.quantize_model()
        _keep_in_float(quantizer.model.model)
        return file_content(quantizer.model.model)

    @cached_property
    def _overrides(self) -> dict[str, list[dict[str, Any]]]:
        """The quantiser's settings of the constants that no layer multiplies."""
        weights = {node.input[1] for node in weighted_layers(self._model)}
        names = {name for node in self._model.graph.node if node.op_type in _FOLLOWERS for name in node.input}
        constants = [tensor for tensor in self._model.graph.initializer if tensor.name in names - weights]
        return {t.name: [{"reduce_range": False}] for t in constants if t.data_type == onnx.TensorProto.FLOAT}

    @cached_property
    def _ranges(self) -> Ranges:
        measured = measure_ranges(self._model, self._tensors, self._samples)
        return Ranges(_finite(measured.min_max), _finite(measured.percentile))

    @cached_property
    def _entropy_ranges(self) -> dict[str, tuple[Any, Any]]:
        return entropy_ranges(activation_batches(self._model, list(self._ranges.min_max), self._samples))

    @cached_property
    def _tensors(self) -> list[str]:
        """Names of the float activations that quantised nodes read and write."""
        constants = {tensor.name for tensor in self._model.graph.initializer}
        names = {
            name: None
            for node in self._model.graph.node
            if node.op_type in (*LAYERS, *_FOLLOWERS, *_CLIPPING)
            for name in (*node.input[:2], *node.output)  # the third input is a bias or a setting
            if name and name not in constants
        }
        floats = float_tensors(self._model.graph)
        return [name for name in names if name in floats]


def _finite(ranges: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    # The sum with a causal mask reaches −infinity. No layer reads it, but the quantiser checks every range.
    return {name: bounds for name, bounds in ranges.items() if np.isfinite(bounds).all()}


def _keep_in_float(model: onnx.ModelProto) -> None:
    """Give a layer in float, whose input comes from INT8, that input by one scale per channel, all the same; in place.

    From 1.21 on, ONNX Runtime's optimiser (WeightBiasQuantization) computes a float Conv or Gemm between
    DequantizeLinear and QuantizeLinear in INT8, with one scale for all its weights, whatever that costs: layers stay in
    float because INT8 costs too much there. It leaves those whose input has more scales than one.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for layer in weighted_layers(model, ("Conv", "Gemm")):
        dequantize = producers.get(layer.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        size = constants[layer.input[1]].dims[1 if output_axis(layer) == 0 else 0]
        channels = size * next((attribute.i for attribute in layer.attribute if attribute.name == "group"), 1)
        names = [f"{layer.name}/{name}" for name in dequantize.input[1:]]
        for name, per_channel in zip(dequantize.input[1:], names, strict=True):
            value = numpy_helper.to_array(constants[name])
            graph.initializer.append(numpy_helper.from_array(np.full(channels, value), per_channel))
        output = f"{layer.name}/input"
        inputs = [dequantize.input[0], *names]
        graph.node.append(helper.make_node("DequantizeLinear", inputs, [output], output, axis=1))
        layer.input[0] = output
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    unread = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.output[0] not in read]
    for node in unread:
        graph.node.remove(node)


def _followers(model: onnx.ModelProto, layers: Sequence[str]) -> list[str]:
    """Return the names of the nodes in _FOLLOWERS and _CLIPPING that read only outputs of quantised nodes."""
    constants = {tensor.name for tensor in model.graph.initializer}
    quantized, followers, quantized_outputs = set(layers), [], set[str]()
    for node in model.graph.node:  # ONNX keeps them in the order of computation
        activations = [name for name in node.input if name and name not in constants]
        if node.op_type in (*_FOLLOWERS, *_CLIPPING) and activations and quantized_outputs.issuperset(activations):
            followers.append(node.name)
            quantized_outputs.update(node.output)
        elif node.name in quantized:
            quantized_outputs.update(node.output)
    return followers
