"""Preprocessing inside the image tower: uint8 RGB of any size in, resized, cropped and normalised by the graph.

PIL's antialiased resize is separable: a matrix over the columns, rounded to bytes, then one over the rows, rounded
again. Both matrices are computed in the graph from the picture's size, in integers up to the last division, so that
nothing is lost on large pictures. Pillow 13 takes rows first for some tall pictures, up to 12 it never did; the graph
always takes columns first. Never imports torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.contract.preprocess import Preprocessing

IMAGE = "image"  # (1, height, width, 3) uint8
_PREFIX = "preprocess/"


def with_preprocessing(model: onnx.ModelProto, how: Preprocessing) -> onnx.ModelProto:
    """A copy of an image tower that takes a picture, (1, height, width, 3) uint8 RGB of any size.

    Args:
        model: pixel_values (N, 3, H, W) float32 -> image_embedding, of opset 18 or later.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    pixels = graph.input[0].name
    before = _preprocessing(how, pixels)
    nodes = [*before.nodes, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.initializer.extend(before.constants)
    graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [1, "height", "width", 3]))
    return copy


def preprocessing_model(how: Preprocessing) -> onnx.ModelProto:
    """The preprocessing alone: a picture (1, height, width, 3) uint8 -> pixel_values (1, 3, H, W) float32."""
    before = _preprocessing(how, "pixel_values")
    graph = helper.make_graph(
        before.nodes,
        "preprocessing",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [1, "height", "width", 3])],
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, *how.size])],
        initializer=before.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _preprocessing(how: Preprocessing, output: str) -> _Graph:
    g = _Graph()
    height, width = (g.op("Squeeze", g.op("Shape", IMAGE, start=i, end=i + 1), g.ints([0])) for i in (1, 2))
    new_height, new_width = _new_size(g, how, height, width)
    rows, columns = how.size
    across, column_there = _resize(g, how, columns, width, new_width)
    down, row_there = _resize(g, how, rows, height, new_height)
    planes = g.op("Transpose", g.op("Squeeze", IMAGE, g.ints([0])), perm=[2, 0, 1])  # (3, height, width)
    planes = g.op("Cast", planes, to=TensorProto.FLOAT)
    planes = _bytes(g, g.op("MatMul", planes, g.op("Transpose", across, perm=[1, 0])))  # (3, height, W)
    planes = _bytes(g, g.op("MatMul", down, planes))  # (3, H, W)
    if how.resize_mode == "longest":
        there = g.op("And", g.op("Unsqueeze", row_there, g.ints([1])), column_there)
        planes = g.op("Where", there, planes, g.floats(float(how.fill_color)))
    scaled = g.op("Div", planes, g.floats(255.0))
    mean, std = (g.floats(np.reshape(values, (3, 1, 1))) for values in (how.mean, how.std))
    normalised = g.op("Div", g.op("Sub", scaled, mean), std)
    g.op("Unsqueeze", normalised, g.ints([0]), output=output)
    return g


def _new_size(g: _Graph, how: Preprocessing, height: str, width: str) -> tuple[str, str]:
    """Height and width after resizing, rounded as `contract.preprocess` rounds."""
    rows, columns = how.size
    if how.resize_mode == "squash":
        return g.ints(rows), g.ints(columns)
    if how.resize_mode == "shortest" and rows == columns:
        shorter = g.op("Min", height, width)
        new = [g.op("Div", g.op("Mul", g.ints(rows), of), shorter) for of in (height, width)]
        return new[0], new[1]
    sizes = [g.op("Cast", of, to=TensorProto.DOUBLE) for of in (height, width)]
    ratios = [g.op("Div", of, g.doubles(float(to))) for of, to in zip(sizes, (rows, columns), strict=True)]
    ratio = g.op("Max" if how.resize_mode == "longest" else "Min", *ratios)
    new = [g.op("Cast", g.op("Round", g.op("Div", of, ratio)), to=TensorProto.INT64) for of in sizes]
    return new[0], new[1]


def _resize(g: _Graph, how: Preprocessing, wanted: int, size: str, new: str) -> tuple[str, str]:
    """The matrix (wanted, size) of one axis, cropped or padded to the middle; and which rows show the picture."""
    twice = g.ints(2)
    spare = g.op("Sub", new, g.ints(wanted))
    half = g.op("Mul", g.op("Cast", spare, to=TensorProto.FLOAT), g.floats(0.5))
    # A crop rounds to even as Python does; a border is cut to the next lower number.
    offset = g.op("Cast", g.op("Round" if how.resize_mode != "longest" else "Ceil", half), to=TensorProto.INT64)
    positions = g.op("Add", g.ints(np.arange(wanted)), offset)
    there = g.op("And", g.op("GreaterOrEqual", positions, g.ints(0)), g.op("Less", positions, new))
    # Distance of each new pixel's centre from each old one's, in units of the filter: (2r + 1) size − (2i + 1) new,
    # over 2 max(size, new).
    centres = g.op("Mul", g.op("Add", g.op("Mul", positions, twice), g.ints(1)), size)
    old = g.op("Range", g.ints(0), size, g.ints(1))
    old_centres = g.op("Mul", g.op("Add", g.op("Mul", old, twice), g.ints(1)), new)
    apart = g.op("Sub", g.op("Unsqueeze", centres, g.ints([1])), old_centres)
    unit = g.op("Cast", g.op("Mul", g.op("Max", size, new), twice), to=TensorProto.FLOAT)
    x = g.op("Div", g.op("Cast", g.op("Abs", apart), to=TensorProto.FLOAT), unit)
    weights = _bicubic(g, x) if how.interpolation == "bicubic" else g.op("Relu", g.op("Sub", g.floats(1.0), x))
    total = g.op("ReduceSum", weights, g.ints([1]))
    # A row of the border sums to nothing; it is painted over, but must not be NaN.
    total = g.op("Where", g.op("Unsqueeze", there, g.ints([1])), total, g.floats(1.0))
    return g.op("Div", weights, total), there


def _bicubic(g: _Graph, x: str) -> str:
    """PIL's filter with a = −0.5, of distances that are not negative."""
    square = g.op("Mul", x, x)
    near = g.op("Add", g.op("Mul", g.op("Sub", g.op("Mul", x, g.floats(1.5)), g.floats(2.5)), square), g.floats(1.0))
    far = g.op("Add", g.op("Mul", g.op("Sub", x, g.floats(5.0)), x), g.floats(8.0))
    far = g.op("Mul", g.op("Sub", g.op("Mul", far, x), g.floats(4.0)), g.floats(-0.5))
    outside = g.op("Where", g.op("Less", x, g.floats(2.0)), far, g.floats(0.0))
    return g.op("Where", g.op("Less", x, g.floats(1.0)), near, outside)


def _bytes(g: _Graph, values: str) -> str:
    """Rounded and clipped to what a byte holds, still as float32, as PIL does after each of its two passes."""
    return g.op("Clip", g.op("Floor", g.op("Add", values, g.floats(0.5))), g.floats(0.0), g.floats(255.0))


class _Graph:
    """Nodes and constants as they are asked for, so that a formula reads as one."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node; returns its output's name."""
        name = f"{_PREFIX}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name=name, **attributes))
        return output or name

    def ints(self, values: npt.ArrayLike) -> str:
        """An int64 constant."""
        return self._constant(np.asarray(values, dtype=np.int64))

    def floats(self, values: npt.ArrayLike) -> str:
        """A float32 constant."""
        return self._constant(np.asarray(values, dtype=np.float32))

    def doubles(self, values: npt.ArrayLike) -> str:
        """A float64 constant."""
        return self._constant(np.asarray(values, dtype=np.float64))

    def _constant(self, values: npt.NDArray[Any]) -> str:
        name = f"{_PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name
