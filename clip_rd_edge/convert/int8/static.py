"""Static INT8: ranges of activations are measured beforehand, and stand in the graph as Q/DQ. Never imports torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from clip_rd_edge.convert.graph import float_tensors, silently
from clip_rd_edge.convert.int8.ranges import Ranges, entropy_ranges, measure_ranges, watched
from clip_rd_edge.convert.parity import Inputs

RangeMethod = Literal["min-max", "percentile", "entropy"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
_LAYERS = ("Conv", "Gemm", "MatMul")
# Done on INT8 where all that they work on comes from INT8: SiLU and its kind, residual sums, pooling. In float, each
# would need its inputs converted and its output converted back.
_FOLLOWERS = ("Add", "Mul", "Sigmoid", "HardSigmoid", "ReduceMean", "GlobalAveragePool", "AveragePool", "MaxPool")
# The quantiser lets the range of what they give do their work, and takes them away: kept, each costs a conversion more.
_CUTS = ("Relu", "Clip")


class StaticQuantizer:
    """Quantises any of a tower's layers, and what follows them entry by entry: U8 activations, S8 weights by channel.

    U8 with S8 is what ONNX Runtime's kernels for CPUs are fastest with. Products of two activations, as in attention,
    stay in float, and so do Softmax, normalisation and all that works on what they give.

    Args:
        model: path of a float32 model that `quant_pre_process` has optimised.
        samples: what the ranges are measured on.
    """

    def __init__(self, model: Path, samples: Inputs) -> None:
        self._model = onnx.load(model)
        self._samples = samples
        self.layers: tuple[str, ...] = tuple(node.name for node in layers_of(self._model))

    def quantize(self, method: RangeMethod, layers: Sequence[str]) -> bytes:
        """The model with `layers`, a subset of `self.layers`, in INT8, as a file's content."""
        if not layers:  # which the library would take for all
            unchanged: bytes = self._model.SerializeToString()
            return unchanged
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        with silently():
            quantizer = QDQQuantizer(
                copy.deepcopy(self._model),
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, self._ranges_by(method)),
                nodes_to_quantize=[*layers, *_followers(self._model, layers)],
                nodes_to_exclude=[],
                op_types_to_quantize=[*_LAYERS, *_FOLLOWERS, *_CUTS],
                extra_options={},
            )
            quantizer.quantize_model()
        content: bytes = quantizer.model.model.SerializeToString()
        return content

    def _ranges_by(self, method: RangeMethod) -> dict[str, tuple[Any, Any]]:
        if method == "entropy":
            return self._by_entropy
        return self._ranges.min_max if method == "min-max" else self._ranges.percentile

    @cached_property
    def _ranges(self) -> Ranges:
        measured = measure_ranges(self._model, self._tensors, self._samples)
        return Ranges(_finite(measured.min_max), _finite(measured.percentile))

    @cached_property
    def _by_entropy(self) -> dict[str, tuple[Any, Any]]:
        return entropy_ranges(watched(self._model, list(self._ranges.min_max), self._samples))

    @cached_property
    def _tensors(self) -> list[str]:
        """The activations that quantised nodes take and give."""
        constants = {tensor.name for tensor in self._model.graph.initializer}
        names = {
            name: None
            for node in self._model.graph.node
            if node.op_type in (*_LAYERS, *_FOLLOWERS, *_CUTS)
            for name in (*node.input[:2], *node.output)  # the third input is a bias or a setting
            if name and name not in constants
        }
        floats = float_tensors(self._model.graph)
        return [name for name in names if name in floats]


def _finite(ranges: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    # The sum with a causal mask reaches −infinity. No layer reads it, but the quantiser looks at every range.
    return {name: bounds for name, bounds in ranges.items() if np.isfinite(bounds).all()}


def _followers(model: onnx.ModelProto, layers: Sequence[str]) -> list[str]:
    """Names of the nodes of _FOLLOWERS and _CUTS that work on nothing but what quantised nodes give."""
    constants = {tensor.name for tensor in model.graph.initializer}
    quantized, followers, given = set(layers), [], set[str]()
    for node in model.graph.node:  # ONNX keeps them in the order of computation
        works_on = [name for name in node.input if name and name not in constants]
        if node.op_type in (*_FOLLOWERS, *_CUTS) and works_on and given.issuperset(works_on):
            followers.append(node.name)
            given.update(node.output)
        elif node.name in quantized:
            given.update(node.output)
    return followers


def layers_of(model: onnx.ModelProto, kinds: Sequence[str] = _LAYERS) -> list[onnx.NodeProto]:
    """A model's nodes of these kinds that have weights: those whose second input is a constant."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in kinds and node.input[1] in constants]
