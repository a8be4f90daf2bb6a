"""The ways of writing a tower in INT8 for CPUs, static and dynamic, and the activation ranges that set scales."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.exporting.graph import (
    LAYERS,
    activation_batches,
    attributes_of,
    file_content,
    float_tensors,
    output_axis,
    producers_of,
    replace_nodes,
    silently,
    weighted_layers,
)
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.parity import Inputs
from clip_rd_edge.exporting.plan import WeightBits

Bounds = dict[str, tuple[Any, Any]]  # lower and upper bound per tensor name
RangeMethod = Literal["percentile", "min-max"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
# Quantised if all their inputs come from quantised nodes: SiLU and similar activations, residual sums, pooling. In
# float, each would need its inputs dequantised and its output quantised again.
_FOLLOWERS = ("Add", "Mul", "Sigmoid", "HardSigmoid", "ReduceMean", "GlobalAveragePool", "AveragePool", "MaxPool")
# The quantiser removes these and lets the range of their output do the clipping; keeping them would cost a conversion.
_CLIPPING = ("Relu", "Clip")


class StaticQuantizer:
    """Quantises any of a tower's layers, and the element-wise nodes after them: U8 activations, per-channel S8 weights.

    ONNX Runtime's CPU kernels are fastest with these. Only the weights of layers have `weight_bits`: constants of
    element-wise nodes, where nothing saturates, have 8. Matrix products of two activations, as in attention, stay in
    float, and so do Softmax, normalisation and the nodes after them.

    Args:
        samples: inputs (N, …), on the first of which the ranges are measured.
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

        ranges = {name: range_without_ties(*bounds) for name, bounds in self._ranges[method].items()}
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
    def _ranges(self) -> dict[RangeMethod, Bounds]:
        # The sum with a causal mask reaches −infinity. No layer reads it, but the quantiser checks every range.
        measured = measure_ranges(self._model, self._tensors, self._samples)
        return {
            method: {name: bounds for name, bounds in of_method.items() if np.isfinite(bounds).all()}
            for method, of_method in measured.items()
        }

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


def _keep_in_float(model: onnx.ModelProto) -> None:
    """Give a layer in float, whose input comes from INT8, that input by one scale per channel, all the same; in place.

    From 1.21 on, ONNX Runtime's optimiser (WeightBiasQuantization) computes a float Conv or Gemm between
    DequantizeLinear and QuantizeLinear in INT8, with one scale for all its weights, whatever that costs: layers stay in
    float because INT8 costs too much there. It leaves those whose input has more scales than one.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = producers_of(graph)
    for layer in weighted_layers(model, ("Conv", "Gemm")):
        dequantize = producers.get(layer.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        size = constants[layer.input[1]].dims[1 if output_axis(layer) == 0 else 0]
        channels = size * attributes_of(layer).get("group", 1)
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


def scales_per_batch(content: bytes) -> bool:
    """Return whether a model quantises activations at run time, by their range over the whole batch."""
    return any(node.op_type == "DynamicQuantizeLinear" for node in onnx.load_from_string(content).graph.node)


def quantize_dynamically(
    model: Path | bytes, *, matrix_products: bool, token_embeddings: bool, per_token: bool, weight_bits: WeightBits = 7
) -> bytes:
    """Return a model with S8 weights, one scale per column, as file content.

    Args:
        model: a float32 model of opset 18 or later that `quant_pre_process` has optimised.
        matrix_products: quantise MatMul and Gemm with constant weights; the matrix products of attention stay in float,
            and so do Softmax and the mask that is added before it.
        token_embeddings: quantise the token embedding table, which is most of a small text tower's size.
        per_token: one scale per token instead of one for the whole batch, which is more accurate, since a token with
            large values costs the others nothing (ZeroQuant, Yao et al. 2022, section 4.1), and independent of the
            batch. It is slower, which matters to towers of small products.
        weight_bits: of the weights of matrix products, see `exporting.int8.saturation`; token embeddings have 8.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = [*(["MatMul", "Gemm"] if matrix_products else []), *(["Gather"] if token_embeddings else [])]
    with tempfile.TemporaryDirectory() as folder, silently():
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        if isinstance(model, bytes):
            source.write_bytes(model)
        else:
            source = model
        quantize_dynamic(
            source,
            target,
            kinds,
            per_channel=True,
            reduce_range=weight_bits == 7,
            weight_type=QuantType.QInt8,  # U8 weights are several times slower
            extra_options={"MatMulConstBOnly": True},
        )
        quantized = onnx.load(target)
    if per_token:
        _scale_per_token(quantized.graph)
    return file_content(quantized)


def with_token_embeddings(make: Callable[[], Path | bytes]) -> bytes:
    """Return the model that `make` returns with its token embeddings in INT8, too."""
    return quantize_dynamically(make(), matrix_products=False, token_embeddings=True, per_token=False)


_AXIS, _TINY, _LEVEL, _ZERO_POINT = (f"per_token/{name}" for name in ("axis", "tiny", "level", "zero_point"))
_CONSTANTS = {
    _AXIS: np.array([-1], np.int64),
    _TINY: np.array(1e-12, np.float32),
    _LEVEL: np.array(1 / 127, np.float32),
    _ZERO_POINT: np.array(128, np.uint8),  # U8 around the middle: ONNX Runtime's kernels are fastest with U8 and S8
}


def _scale_per_token(graph: onnx.GraphProto) -> None:
    """Divide each row that is quantised at run time by its largest magnitude, and multiply the product's row by it.

    Between the two, the scale is a constant, so that the product is one with Q/DQ, which ONNX Runtime fuses. It also
    fuses MatMulInteger with the Mul after it, but would take the rows' scales for a single one there.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[onnx.NodeProto] = []
    replaced: list[onnx.NodeProto] = []
    for quantizer in (node for node in graph.node if node.op_type == "DynamicQuantizeLinear"):
        levels, scale, _ = quantizer.output
        # The quantiser writes MatMulInteger, Cast, and Mul by the product of the scales of activations and weights.
        scales = {node.output[0]: node for node in readers[scale]}
        nodes += _quantize_rows(quantizer.input[0])
        replaced += [quantizer, *scales.values()]
        for product in readers[levels]:
            (cast,) = readers[product.output[0]]
            (multiply,) = readers[cast.output[0]]
            (both,) = scales.keys() & set(multiply.input)
            (weight_scale,) = set(scales[both].input) - {scale}
            weights = (product.input[1], weight_scale, product.input[3])
            nodes += _multiply_rows(quantizer.input[0], weights, multiply.output[0])
            replaced += [product, cast, multiply]
    if not replaced:
        return
    removed = {node.output[0] for node in replaced}
    nodes += [node for node in graph.node if node.output[0] not in removed]
    replace_nodes(graph, nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in _CONSTANTS.items())


def _quantize_rows(values: str) -> list[onnx.NodeProto]:
    """Return nodes that write VALUES/largest (…, 1), and VALUES/quantized (…, D): values divided by it, after Q/DQ."""
    return [
        _node("Abs", [values], f"{values}/abs"),
        _node("ReduceMax", [f"{values}/abs", _AXIS], f"{values}/max"),
        # So that a row of zeros is not divided by zero. Max would be right, too, and takes several times as long.
        _node("Add", [f"{values}/max", _TINY], f"{values}/largest"),
        _node("Div", [values, f"{values}/largest"], f"{values}/unit"),
        _node("QuantizeLinear", [f"{values}/unit", _LEVEL, _ZERO_POINT], f"{values}/levels"),
        _node("DequantizeLinear", [f"{values}/levels", _LEVEL, _ZERO_POINT], f"{values}/quantized"),
    ]


def _multiply_rows(values: str, weights: Sequence[str], output: str) -> list[onnx.NodeProto]:
    """Return nodes that write the product of `values`, quantised as above, and weights: levels, scale, zero point."""
    return [
        _node("DequantizeLinear", weights, f"{output}/weights", axis=1),
        _node("MatMul", [f"{values}/quantized", f"{output}/weights"], f"{output}/unit"),
        _node("Mul", [f"{output}/unit", f"{values}/largest"], output),
    ]


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], output, **attributes)


_PERCENTILE = 99.99  # a few outliers would widen the range and cost all other values their resolution
_MAX_VALUES = 50_000  # per activation: using all of them takes minutes
_TOGETHER = 8  # samples whose values together have a range without outliers
_FOR_RANGES = 64  # samples; more of them change no range that matters, and each takes as long as three embeddings
_SYMMETRIC = 1e-3  # relative


def subsample(values: npt.NDArray[Any], count: int = _MAX_VALUES, *, seed: int = 0) -> npt.NDArray[Any]:
    """Return a random subset of an activation's values, flattened, large enough to show their distribution.

    Evenly spaced values would miss channels wherever the step and the number of channels have a common factor.
    """
    flat = values.reshape(-1)
    return flat if flat.size <= count else flat[_picks(flat.size, count, seed)]


@lru_cache(maxsize=64)  # tensors of few sizes have most of the values
def _picks(size: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, size, count)


def range_without_outliers(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the range of an activation's values, of any shape, without the outliers on either side."""
    with np.errstate(invalid="ignore"):  # interpolating between two infinities of a causal mask is invalid
        low, high = np.percentile(subsample(values), [100 - _PERCENTILE, _PERCENTILE])
    return float(low), float(high)


def range_without_ties(low: Any, high: Any) -> tuple[Any, Any]:
    """Return a range for U8; one that reaches as far below 0 as above gets one more level below.

    Pixels p in 0…255 with mean and standard deviation 0.5 become 2p/255 - 1. U8 over [-1, 1] has steps of 2/255, too,
    and 0 on a level: each pixel lies between two of them, and rounding goes by the last bit of a sum, which differs by
    processor. In steps of 1/127 they do not, and no end is clipped.
    """
    symmetric = high > 0 and abs(low + high) <= _SYMMETRIC * high
    return (-high * np.float32(128 / 127), high) if symmetric else (low, high)


def measure_ranges(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> dict[RangeMethod, Bounds]:
    """Measure the ranges of a model's named float tensors on the first of some inputs.

    Those of the percentile are means over groups of samples, of each group's range without outliers.
    ONNX Runtime's own calibrators do the same, but its percentile calibrator keeps all histograms in memory and fails
    on a tensor whose values are nearly all the same. Samples run one by one: the activations of several take gigabytes.
    """
    ends, without_outliers = [], []
    seen: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in tensors}
    samples = samples[:_FOR_RANGES]
    for number, values in enumerate(activation_batches(model, tensors, samples, batch_size=1), 1):
        ends.append([(value.min(), value.max()) for value in values.values()])
        for name, value in values.items():
            seen[name].append(subsample(value, _MAX_VALUES // _TOGETHER, seed=number % _TOGETHER))
        if number % _TOGETHER == 0 or number == len(samples):
            without_outliers.append([range_without_outliers(np.concatenate(subsets)) for subsets in seen.values()])
            seen = {name: [] for name in tensors}
    lowest, highest = np.asarray(ends).min(axis=0)[:, 0], np.asarray(ends).max(axis=0)[:, 1]
    with np.errstate(over="ignore"):  # of a mask of float32's most negative number
        low, high = np.asarray(without_outliers, dtype=np.float32).mean(axis=0).T
    return {
        "min-max": {name: (lowest[i], highest[i]) for i, name in enumerate(tensors)},
        "percentile": {name: (low[i], high[i]) for i, name in enumerate(tensors)},
    }
