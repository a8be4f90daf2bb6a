"""ONNX graph helpers that all conversions share, a way to silence the libraries they call, preprocessing as a graph."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.process import SharedBlock, quiet_logs

if TYPE_CHECKING:
    from clip_rd_edge.exporting.parity import Inputs

LAYERS = ("Conv", "Gemm", "MatMul")
# Node types of the L2 norm at the end of a tower.
_NORM_KINDS = frozenset(("Div", "Expand", "Clip", "Max", "ReduceL2", "ReduceSumSquare", "Sqrt", "LpNormalization"))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_SILENT = SharedBlock(_silence)


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Suppress progress lines, warnings and logs that a user cannot act on. Exceptions still propagate.

    What other threads log is not suppressed; what they print to `sys.stdout` and their warnings are, until the last
    thread has left the block.
    """
    with quiet_logs(logging.WARNING), _SILENT:
        yield


def prepare_for_quantization(model: Path, folder: Path) -> Path:
    """Write a copy of a model for quantisation: constants and batch norms folded, shapes inferred; return its path."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / f"preprocessed-{model.name}"
    with silently():
        # Symbolic shape inference fails on open_clip's text towers, and nothing here needs it.
        quant_pre_process(str(model), str(path), skip_symbolic_shape=True)
    return path


def file_content(model: onnx.ModelProto) -> bytes:
    """Return the content of a model's file as the ONNX format requires it: nodes sorted, no unused operator sets.

    ONNX Runtime's quantiser appends its nodes, and its optimiser imports every set that it knows. It reads such files,
    but `onnx.checker` and other runtimes refuse them. Sorts the model in place.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    ONNXModel(model).topological_sort()
    used = {"", "ai.onnx", *(node.domain for node in model.graph.node)}
    imports = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    content: bytes = model.SerializeToString()
    return content


def float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the float32 activations, without weights, of a graph with inferred shapes."""
    described = (*graph.input, *graph.output, *graph.value_info)
    return {value.name for value in described if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a model whose outputs include the named tensors, so that a session returns their values."""
    extended = copy.deepcopy(model)
    present = {output.name for output in extended.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in present)
    return extended


def activation_batches(
    model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs, *, batch_size: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Run a model on some inputs, batch by batch, and yield the values of the named float tensors."""
    session = open_session(with_outputs(model, tensors).SerializeToString())
    input_name = session.get_inputs()[0].name
    for batch in in_batches(len(samples), batch_size):
        yield dict(zip(tensors, session.run(list(tensors), {input_name: samples[batch]}), strict=True))


def weighted_layers(model: onnx.ModelProto, kinds: Sequence[str] = LAYERS) -> list[onnx.NodeProto]:
    """Return a model's nodes of these kinds that have weights: those whose second input is a constant."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in kinds and node.input[1] in constants]


def output_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a layer's weights, 0 or -1, that its output channels are on."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attributes_of(node).get("transB") else -1


def norm_nodes(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the nodes that compute L2 norms, and of those that divide a tower's output by its own.

    Squares need twice the range of what is squared, and an embedding divided by a rounded norm is not normalised: they
    all stay in float32. `exporting.clean_up` writes a norm as Sqrt(ReduceSum(Pow(x, 2))); the last is followed to its
    division.
    """
    producers = producers_of(graph)
    names: set[str] = set()
    for root in graph.node:
        total = producers.get(root.input[0]) if root.op_type == "Sqrt" else None
        square = producers.get(total.input[0]) if total is not None and total.op_type == "ReduceSum" else None
        if total is not None and square is not None and square.op_type == "Pow":
            names.update((square.name, total.name, root.name))
    pending = [output.name for output in graph.output]
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.op_type in _NORM_KINDS and node.name not in names:
            names.add(node.name)
            pending.extend(node.input)
    return names


def rename_tensors(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """Give a graph's inputs, outputs and activations their new names, by the old ones, in place; return the model."""
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    return model


def drop_unused_constants(graph: onnx.GraphProto) -> None:
    """Remove the constants that no node reads and that are not outputs, in place."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return the node that writes each activation."""
    return {output: node for node in graph.node for output in node.output}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes in place of its own."""
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


# Preprocessing inside the image tower. PIL's antialiased resize is separable: one matrix over the columns, rounded to
# bytes, then one over the rows, rounded again. The graph computes both matrices from the image's size, in integers up
# to the last division, so that no precision is lost on large images. Pillow 13 resizes the rows of some tall images
# first, Pillow 12 and earlier never do; the graph always resizes columns first.
IMAGE = "image"  # (1, height, width, 3) uint8
_PREFIX = "preprocess/"


def with_preprocessing(model: onnx.ModelProto, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return a copy of an image tower that takes one image, (1, height, width, 3) uint8 RGB of any size.

    Args:
        model: pixel_values (N, 3, H, W) float32 -> image_embedding, of opset 18 or later.
    """
    result = copy.deepcopy(model)
    graph = result.graph
    prefix = _preprocessing_graph(preprocessing, graph.input[0].name)
    nodes = [*prefix.nodes, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.initializer.extend(prefix.constants)
    graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [1, "height", "width", 3]))
    return result


def _preprocessing_graph(preprocessing: Preprocessing, output: str) -> _Graph:
    g = _Graph()
    height, width = (g.op("Squeeze", g.op("Shape", IMAGE, start=i, end=i + 1), g.ints([0])) for i in (1, 2))
    new_height, new_width = _resized_size(g, preprocessing, height, width)
    rows, columns = preprocessing.size
    column_weights, column_inside = _resize_matrix(g, preprocessing, columns, width, new_width)
    row_weights, row_inside = _resize_matrix(g, preprocessing, rows, height, new_height)
    planes = g.op("Transpose", g.op("Squeeze", IMAGE, g.ints([0])), perm=[2, 0, 1])  # (3, height, width)
    planes = g.op("Cast", planes, to=TensorProto.FLOAT)
    # (3, height, W), then (3, H, W)
    planes = _round_to_bytes(g, g.op("MatMul", planes, g.op("Transpose", column_weights, perm=[1, 0])))
    planes = _round_to_bytes(g, g.op("MatMul", row_weights, planes))
    if preprocessing.resize_mode == "longest":
        inside = g.op("And", g.op("Unsqueeze", row_inside, g.ints([1])), column_inside)
        planes = g.op("Where", inside, planes, g.floats(float(preprocessing.fill_color)))
    scaled = g.op("Div", planes, g.floats(255.0))
    mean, std = (g.floats(np.reshape(values, (3, 1, 1))) for values in (preprocessing.mean, preprocessing.std))
    normalised = g.op("Div", g.op("Sub", scaled, mean), std)
    g.op("Unsqueeze", normalised, g.ints([0]), output=output)
    return g


def _resized_size(g: _Graph, preprocessing: Preprocessing, height: str, width: str) -> tuple[str, str]:
    """Height and width after resizing, rounded as `bundle.preprocess` rounds."""
    rows, columns = preprocessing.size
    if preprocessing.resize_mode == "squash":
        return g.ints(rows), g.ints(columns)
    if preprocessing.resize_mode == "shortest" and rows == columns:
        shorter = g.op("Min", height, width)
        new = [g.op("Div", g.op("Mul", g.ints(rows), edge), shorter) for edge in (height, width)]
        return new[0], new[1]
    edges = [g.op("Cast", edge, to=TensorProto.DOUBLE) for edge in (height, width)]
    ratios = [g.op("Div", edge, g.doubles(float(size))) for edge, size in zip(edges, (rows, columns), strict=True)]
    ratio = g.op("Max" if preprocessing.resize_mode == "longest" else "Min", *ratios)
    rounded = [g.op("Cast", g.op("Round", g.op("Div", edge, ratio)), to=TensorProto.INT64) for edge in edges]
    new = [g.op("Max", edge, g.ints(1)) for edge in rounded]
    return new[0], new[1]


def _resize_matrix(
    g: _Graph, preprocessing: Preprocessing, output_size: int, size: str, new_size: str
) -> tuple[str, str]:
    """Return the matrix (output_size, size) of one axis, cropped or padded at the centre, and which rows lie inside."""
    two = g.ints(2)
    excess = g.op("Sub", new_size, g.ints(output_size))
    half = g.op("Mul", g.op("Cast", excess, to=TensorProto.FLOAT), g.floats(0.5))
    # Crop offsets round half to even, as in Python; padding widths round down.
    rounding = "Round" if preprocessing.resize_mode != "longest" else "Ceil"
    offset = g.op("Cast", g.op(rounding, half), to=TensorProto.INT64)
    positions = g.op("Add", g.ints(np.arange(output_size)), offset)
    inside = g.op("And", g.op("GreaterOrEqual", positions, g.ints(0)), g.op("Less", positions, new_size))
    # Distance from each new pixel's centre to each old one's, in units of the filter:
    # ((2r + 1) size − (2i + 1) new_size) / (2 max(size, new_size)).
    centres = g.op("Mul", g.op("Add", g.op("Mul", positions, two), g.ints(1)), size)
    old_positions = g.op("Range", g.ints(0), size, g.ints(1))
    old_centres = g.op("Mul", g.op("Add", g.op("Mul", old_positions, two), g.ints(1)), new_size)
    distances = g.op("Sub", g.op("Unsqueeze", centres, g.ints([1])), old_centres)
    unit = g.op("Cast", g.op("Mul", g.op("Max", size, new_size), two), to=TensorProto.FLOAT)
    x = g.op("Div", g.op("Cast", g.op("Abs", distances), to=TensorProto.FLOAT), unit)
    bicubic = preprocessing.evaluation_interpolation == "bicubic"
    weights = _bicubic(g, x) if bicubic else g.op("Relu", g.op("Sub", g.floats(1.0), x))
    total = g.op("ReduceSum", weights, g.ints([1]))
    # A row in the padding sums to 0; its pixels are overwritten by the fill colour, but must not be NaN.
    total = g.op("Where", g.op("Unsqueeze", inside, g.ints([1])), total, g.floats(1.0))
    return g.op("Div", weights, total), inside


def _bicubic(g: _Graph, x: str) -> str:
    """PIL's bicubic filter with a = −0.5, of distances that are not negative."""
    square = g.op("Mul", x, x)
    near = g.op("Add", g.op("Mul", g.op("Sub", g.op("Mul", x, g.floats(1.5)), g.floats(2.5)), square), g.floats(1.0))
    far = g.op("Add", g.op("Mul", g.op("Sub", x, g.floats(5.0)), x), g.floats(8.0))
    far = g.op("Mul", g.op("Sub", g.op("Mul", far, x), g.floats(4.0)), g.floats(-0.5))
    outside = g.op("Where", g.op("Less", x, g.floats(2.0)), far, g.floats(0.0))
    return g.op("Where", g.op("Less", x, g.floats(1.0)), near, outside)


def _round_to_bytes(g: _Graph, values: str) -> str:
    """Round and clip to the values of a byte, still as float32, as PIL does after each of its two passes."""
    return g.op("Clip", g.op("Floor", g.op("Add", values, g.floats(0.5))), g.floats(0.0), g.floats(255.0))


class _Graph:
    """Collects nodes and constants in the order they are requested, so that code reads like a formula."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = f"{_PREFIX}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name=name, **attributes))
        return output or name

    def ints(self, values: npt.ArrayLike) -> str:
        return self._constant(np.asarray(values, dtype=np.int64))

    def floats(self, values: npt.ArrayLike) -> str:
        return self._constant(np.asarray(values, dtype=np.float32))

    def doubles(self, values: npt.ArrayLike) -> str:
        return self._constant(np.asarray(values, dtype=np.float64))

    def _constant(self, values: npt.NDArray[Any]) -> str:
        name = f"{_PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name
