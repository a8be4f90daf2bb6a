"""Round INT8 weights so that layers return what they did, instead of each weight to the nearest level.

The weights of a layer are rounded input by input, and what each rounding changes is made up for by the inputs that are
still to come, as far as the two vary together: GPTQ (Frantar et al. 2023, section 3), which with enough samples
minimises the mean square error of the layer's outputs greedily. Biases then take back the shift of the outputs' means
that is left (Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.2).

Both go by the inputs that the layers have in float32. Those of a quantised tower would include the shifts of the layers
before, which their own biases take back. Matrix products that are quantised dynamically lose next to nothing by their
weights, and are rounded to the nearest level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from clip_rd_edge.exporting.graph import (
    activation_batches,
    attributes_of,
    drop_unused_constants,
    output_axis,
    weighted_layers,
)
from clip_rd_edge.exporting.parity import Inputs

_MAX_SAMPLES, _POSITIONS = 64, 2048  # more of either changes nothing that can be measured
# Inputs whose covariance is regarded; it takes as much memory as its square, and inverting it time as its cube.
_MAX_COLUMNS = 512
_DAMPING = 0.01  # of the mean square, as in GPTQ
_AT_ONCE = 64  # inputs whose errors reach those after them in one product, which is faster than one by one
_MIN_SCALE = np.finfo(np.float16).smallest_subnormal
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def weight_scale(max_magnitude: npt.ArrayLike, max_level: int) -> Floats:
    """Return the scale at which `max_magnitude` is `max_level`, rounded up to a float16, so that FP16 keeps it."""
    exact = np.maximum(np.asarray(max_magnitude, dtype=np.float32) / max_level, np.float32(_MIN_SCALE))
    rounded = exact.astype(np.float16)
    too_small = rounded.astype(np.float32) < exact
    scale: Floats = np.where(too_small, np.nextafter(rounded, np.float16(np.inf)), rounded).astype(np.float32)
    return scale


class RoundedLayers:
    """The layers of a tower with weights that are levels times a scale per output channel.

    The largest magnitude of each channel is the largest level, so that every quantiser that scales by it finds the same
    scale and levels.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        samples: inputs (N, …) of the tower; the first ones are used.
        max_level: largest level of a weight; see `exporting.int8.saturation`.
    """

    def __init__(self, model: onnx.ModelProto, samples: Inputs, *, max_level: int) -> None:
        self._model, self._samples, self._max_level = model, samples[:_MAX_SAMPLES], max_level
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._layers = [layer for node in weighted_layers(model) if (layer := self._layer(node))]

    def replace(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        """Give the named nodes of `model`, a copy of the float32 model, their rounded weights and biases, in place."""
        graph = model.graph
        for node in graph.node:
            if node.name in names and node.name in self._rounded:
                for index, values in self._rounded[node.name].items():
                    node.input[index] = f"{node.name}/rounded_{index}"  # another layer may share the old one
                    graph.initializer.append(numpy_helper.from_array(values, node.input[index]))
        drop_unused_constants(graph)

    @cached_property
    def _rounded(self) -> dict[str, dict[int, Floats]]:
        """The new constants of each layer, by the number of the node's input."""
        moments = {layer.node.name: _Moments(layer) for layer in self._layers}
        if not moments:
            return {}
        random = np.random.default_rng(0)
        share = math.ceil(_POSITIONS / len(self._samples))
        tensors = list(dict.fromkeys(layer.node.input[0] for layer in self._layers))
        # One by one: the activations of several samples take gigabytes.
        for batch in activation_batches(self._model, tensors, self._samples, batch_size=1):
            for layer in self._layers:
                values = batch[layer.node.input[0]].astype(np.float32, copy=False)
                moments[layer.node.name].add(layer.inputs(values, share, random))
        return {layer.node.name: self._round(layer, moments[layer.node.name]) for layer in self._layers}

    def _round(self, layer: _Layer, moments: _Moments) -> dict[int, Floats]:
        whole = layer.weights.astype(np.float64)
        weights = layer.blocks(whole)
        largest = np.abs(whole.reshape(len(whole), -1)).max(axis=1)
        scale = weight_scale(largest, self._max_level).astype(np.float64)
        block_scale = layer.blocks_of_outputs(scale)
        levels = round_weights(weights, block_scale, moments.products(), moments.count, self._max_level)
        rounded = layer.unblocked(levels * block_scale[..., None])
        _keep_largest(whole, rounded, scale * self._max_level)
        constants = {1: layer.stored(rounded)}
        if (bias := self._constants.get("".join(layer.node.input[2:3]))) is not None:
            shift = np.einsum("gok,gk->go", layer.blocks(rounded) - weights, moments.means())
            constants[2] = (numpy_helper.to_array(bias) - layer.sum_of_outputs(shift)).astype(np.float32)
        return constants

    def _layer(self, node: onnx.NodeProto) -> _Layer | None:
        """Return the layer of a node, or None if its inputs cannot be told from the node alone."""
        values = numpy_helper.to_array(self._constants[node.input[1]])
        attributes = attributes_of(node)
        if node.op_type == "Conv":
            padding = attributes.get("auto_pad", b"NOTSET")
            return _Layer(node, values, attributes) if padding in (b"NOTSET", b"VALID") else None
        if values.ndim != 2 or attributes.get("transA", 0):
            return None
        by_column = output_axis(node) == -1
        return _Layer(node, values.T if by_column else values, {}, by_column=by_column)


def round_weights(weights: Doubles, scale: Doubles, products: Doubles, count: int, max_level: int) -> Doubles:
    """Return the levels (G, O, K) of G blocks of weights, rounded so that their products with inputs change least.

    Args:
        weights: (G, O, K).
        scale: of each output, (G, O).
        products: of each two inputs, their mean over positions (G, K, K).
        count: number of positions; the fewer, the less the products of different inputs count.
        max_level: largest level.
    """
    columns = weights.shape[-1]
    squares = np.einsum("gkk->gk", products).copy()
    known = count / (count + columns)
    products = known * products
    np.einsum("gkk->gk", products)[...] = squares + _DAMPING * squares.mean(axis=1, keepdims=True) + 1e-12
    # The inputs that matter most come first, while there are many left to make up for their roundings.
    order = np.argsort(-squares, axis=1)
    products = np.take_along_axis(np.take_along_axis(products, order[:, :, None], 1), order[:, None, :], 2)
    remaining = np.take_along_axis(weights, order[:, None, :], 2)
    factors = np.linalg.cholesky(np.linalg.inv(products)).transpose(0, 2, 1)
    levels = np.empty_like(remaining)
    for start in range(0, columns, _AT_ONCE):
        stop = min(start + _AT_ONCE, columns)
        errors = np.empty((*remaining.shape[:2], stop - start))
        for column in range(start, stop):
            levels[..., column] = np.clip(np.rint(remaining[..., column] / scale), -max_level, max_level)
            error = (remaining[..., column] - levels[..., column] * scale) / factors[:, None, column, column]
            remaining[..., column + 1 : stop] -= error[..., None] * factors[:, None, column, column + 1 : stop]
            errors[..., column - start] = error
        remaining[..., stop:] -= errors @ factors[:, start:stop, stop:]
    unordered: Doubles = np.take_along_axis(levels, np.argsort(order, axis=1)[:, None, :], 2)
    return unordered


def _keep_largest(weights: Doubles, rounded: Doubles, bounds: Doubles) -> None:
    """Set the largest of each channel's weights (O, …) to its bound (O,), in place, where none reaches it any more."""
    flat, rounded_flat = (values.reshape(len(weights), -1) for values in (weights, rounded))
    channels = np.arange(len(weights))
    largest = np.abs(flat).argmax(axis=1)
    values = flat[channels, largest]
    smaller = (np.abs(rounded_flat).max(axis=1) < bounds) & (values != 0)
    rounded_flat[channels[smaller], largest[smaller]] = (np.sign(values) * bounds)[smaller]


@dataclass(frozen=True)
class _Layer:
    """A node with weights (O, C, …), and how they are cut into blocks (G, O / groups, K) that see inputs of their own.

    A block has some of the channels of a group, so that no block has more than _MAX_COLUMNS inputs.

    Attributes:
        by_column: the node has them as (C, O).
    """

    node: onnx.NodeProto
    weights: Floats
    attributes: dict[str, Any]
    by_column: bool = False

    @property
    def _groups(self) -> int:
        return int(self.attributes.get("group", 1))

    @cached_property
    def _blocks_per_group(self) -> int:
        channels, kernel = self.weights.shape[1], math.prod(self.weights.shape[2:])
        fitting = (n for n in range(1, channels + 1) if channels % n == 0 and channels // n * kernel <= _MAX_COLUMNS)
        return next(fitting, channels)

    def blocks(self, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        blocks = weights.reshape(self._groups, len(weights) // self._groups, self._blocks_per_group, -1)
        return blocks.swapaxes(1, 2).reshape(-1, blocks.shape[1], blocks.shape[3])

    def unblocked(self, blocks: Doubles) -> Doubles:
        """Return the weights of blocks (G, O / groups, K) in the shape of `weights`."""
        return (
            blocks.reshape(self._groups, self._blocks_per_group, *blocks.shape[1:])
            .swapaxes(1, 2)
            .reshape(self.weights.shape)
        )

    def blocks_of_outputs(self, values: Doubles) -> Doubles:
        """Return values (O,) of the outputs for each block, (G, O / groups)."""
        return np.repeat(values.reshape(self._groups, -1), self._blocks_per_group, axis=0)

    def sum_of_outputs(self, values: Doubles) -> Doubles:
        """Return the sum (O,) over each output's blocks of values (G, O / groups)."""
        total: Doubles = values.reshape(self._groups, self._blocks_per_group, -1).sum(axis=1).reshape(-1)
        return total

    def stored(self, weights: Doubles) -> Floats:
        return np.ascontiguousarray(weights.T if self.by_column else weights, dtype=np.float32)

    def inputs(self, values: Floats, count: int, random: np.random.Generator) -> Floats:
        """Return what the blocks see at `count` random positions of an activation, (G, K, P)."""
        rows = self._patches(values, count, random) if self.node.op_type == "Conv" else _some(values, count, random)
        return rows.reshape(len(rows), self._groups * self._blocks_per_group, -1).transpose(1, 2, 0)

    def _patches(self, values: Floats, count: int, random: np.random.Generator) -> Floats:
        """Return what a convolution sees of (N, C, …) at random positions of its outputs, (P, C, …)."""
        kernel = self.weights.shape[2:]
        dimensions = len(kernel)
        pads = self.attributes.get("pads", [0] * 2 * dimensions)
        strides, dilations = (self.attributes.get(name, [1] * dimensions) for name in ("strides", "dilations"))
        if any(pads):
            values = np.pad(values, [(0, 0), (0, 0), *zip(pads[:dimensions], pads[dimensions:], strict=True)])
        spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(values, spans, axis=tuple(range(2, 2 + dimensions)))
        steps = (slice(None, None, step) for step in (*strides, *dilations))
        windows = np.moveaxis(
            windows[(slice(None), slice(None), *steps)], 1, 1 + dimensions
        )  # (N, positions …, C, kernel …)
        shape = windows.shape[: 1 + dimensions]
        return windows[np.unravel_index(_picks(math.prod(shape), count, random), shape)]


def _some(values: Floats, count: int, random: np.random.Generator) -> Floats:
    rows = values.reshape(-1, values.shape[-1])
    return rows[_picks(len(rows), count, random)]


def _picks(total: int, count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.arange(total) if total <= count else random.choice(total, count, replace=False)


class _Moments:
    """Means and products of what a layer's blocks see, over all positions added."""

    def __init__(self, layer: _Layer) -> None:
        blocks, _, columns = layer.blocks(layer.weights).shape
        self.count = 0
        self._sums = np.zeros((blocks, columns))
        self._products = np.zeros((blocks, columns, columns), np.float32)

    def add(self, inputs: Floats) -> None:
        self.count += inputs.shape[2]
        self._sums += inputs.sum(axis=2)
        self._products += inputs @ inputs.transpose(0, 2, 1)

    def means(self) -> Doubles:
        return self._sums / self.count

    def products(self) -> Doubles:
        return self._products.astype(np.float64) / self.count
