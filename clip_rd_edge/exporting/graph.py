"""ONNX graph helpers that all conversions share, and a way to silence the libraries they call."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx

from clip_rd_edge.bundle.encoder import in_batches
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

    What other threads log is not suppressed. Until the last thread has left the block, what they print to `sys.stdout`
    and their warnings are.
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

    Squares need twice the range of what is squared, and an embedding by a rounded norm is not normalised: they all stay
    in float32. `exporting.clean_up` writes a norm as Sqrt(ReduceSum(Pow(x, 2))); the last is followed to its division.
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
    """Remove the constants that no node reads and that are no output, in place."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return the node that writes each activation."""
    return {output: node for node in graph.node for output in node.output}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes in place of its own."""
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
