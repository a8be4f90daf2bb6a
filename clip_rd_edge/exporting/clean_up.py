"""Clean up a graph that torch has exported: the same values, in operators that most programs read rightly.

ONNX Runtime reads whatever torch writes. Others follow the standard less closely, or only an older one: they fail, or
give wrong embeddings without an error. Each pass names the programs that need it, and leaves an unknown graph as it is.
FP16 and INT8 files are made from the result, and so are the engines of TensorRT and OpenVINO.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.exporting.graph import attributes_of, drop_unused_constants, producers_of, replace_nodes
from clip_rd_edge.runtime.backends.onnxruntime import open_session

# Attributes that came after opset 11, with their defaults; programs that were written for it ignore or refuse them.
_NEW_ATTRIBUTES = {
    "antialias": 0, "batch_dims": 0, "keep_aspect_ratio_policy": b"stretch", "noop_with_empty_axes": 0,
    "reduction": b"none", "select_last_index": 0, "start": 0, "training_mode": 0,
}  # fmt: skip
# Element-wise operators whose inputs are broadcast to one shape.
_BROADCASTING = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "And", "Or", "Xor", "Equal", "Where"))
# Shapes are compared at these batch sizes: what is the same at both does not depend on the batch size.
_BATCH_SIZES = (2, 3)
_SMALL = 64  # entries of the constants that shapes are computed from
_SMALL_BYTES = 1024  # of a constant that may be added to the file in place of a node

Shapes = dict[str, tuple[int, ...]]


def clean_up(model: onnx.ModelProto) -> None:
    """Clean up a float32 model in place; its outputs stay the same, except for the order of summing squares."""
    graph = model.graph
    strip_source_info(graph)
    regroup_gelu(graph)
    if any(attribute.type == onnx.AttributeProto.GRAPH for node in graph.node for attribute in node.attribute):
        return  # the passes below look at one graph, and not at branches that read its tensors
    spell_out_l2_norms(graph)
    drop_nan_guards(graph)
    fold_constants(model)
    unsqueeze_instead_of_gathering_all(model)
    skip_expansions(model)
    drop_redundant_attributes(graph)
    drop_unused_nodes(graph)


def strip_source_info(graph: onnx.GraphProto) -> None:
    """Remove the exporter's notes of the Python lines that each node comes from.

    They contain paths of this machine, take up to a megabyte, and are of no use on a device.
    """
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def regroup_gelu(graph: onnx.GraphProto) -> None:
    """Rewrite GELU, x · (½ · (1 + erf)), as (x · (1 + erf)) · ½, which ONNX Runtime fuses into one kernel.

    Halving is exact, so the values stay the same; a text tower in INT8 takes 5 % less time.
    """
    producers = producers_of(graph)
    halves = {tensor.name for tensor in graph.initializer if not tensor.dims and numpy_helper.to_array(tensor) == 0.5}
    for node in graph.node:
        for x, halved in (tuple(node.input), tuple(node.input)[::-1]) if node.op_type == "Mul" else ():
            inner = producers.get(halved)
            if inner is None or inner.op_type != "Mul" or inner.input[0] not in halves:
                continue
            half, one_plus_erf = inner.input
            if _is_one_plus_erf(one_plus_erf, producers):
                inner.input[:] = [x, one_plus_erf]
                node.input[:] = [halved, half]
                break


def _is_one_plus_erf(name: str, producers: dict[str, onnx.NodeProto]) -> bool:
    add = producers.get(name)
    erf = producers.get(add.input[0]) if add is not None and add.op_type == "Add" else None
    return erf is not None and erf.op_type == "Erf"


def spell_out_l2_norms(graph: onnx.GraphProto) -> None:
    """Rewrite ReduceL2 as the root of a sum of squares, Sqrt(ReduceSum(Pow(x, 2))).

    The axes of ReduceL2 are an input since opset 18. MNN 3.6 looks for the attribute that they were before, finds none
    and takes one norm of the whole batch. Those of ReduceSum are an input since opset 13, which MNN supports.

    The square is a Pow, because quantisers put Mul into INT8, where squares lose most. `graph.norm_nodes` finds the
    three nodes again.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = attributes_of(node)
        if node.op_type != "ReduceL2" or attributes.get("noop_with_empty_axes"):
            nodes.append(node)
            continue
        (x, *axes), (norm,) = node.input, node.output
        two = _add_constant(graph, f"{norm}/two", np.float32(2))
        nodes += (
            helper.make_node("Pow", [x, two], [f"{norm}/squares"], f"{node.name}/square"),
            helper.make_node(
                "ReduceSum", [f"{norm}/squares", *axes], [f"{norm}/sum"], f"{node.name}/sum", **attributes
            ),
            helper.make_node("Sqrt", [f"{norm}/sum"], [norm], node.name),
        )
    replace_nodes(graph, nodes)


def drop_nan_guards(graph: onnx.GraphProto) -> None:
    """Drop Where(IsNaN(p), 0, p) around p = Softmax(x + Where(mask, a, b)) with finite numbers a and b.

    torch exports attention with a mask of booleans, as in BERT, with this guard against rows whose scores are all -inf.
    No score of these is. MNN 3.6 has no IsNaN and does not convert the tower.
    """
    producers = producers_of(graph)
    replaced = {}
    for node in graph.node:
        guard = producers.get(node.input[0]) if node.op_type == "Where" else None
        if guard is None or guard.op_type != "IsNaN" or guard.input[0] != node.input[2]:
            continue
        softmax = producers.get(guard.input[0])
        add = producers.get(softmax.input[0]) if softmax is not None and softmax.op_type == "Softmax" else None
        if add is not None and add.op_type == "Add" and any(_is_finite_mask(n, graph, producers) for n in add.input):
            replaced[node.output[0]] = guard.input[0]
    for node in graph.node:
        node.input[:] = [replaced.get(name, name) for name in node.input]


def _is_finite_mask(name: str, graph: onnx.GraphProto, producers: dict[str, onnx.NodeProto]) -> bool:
    where = producers.get(name)
    if where is None or where.op_type != "Where":
        return False
    values = [_constant(graph, value) for value in where.input[1:]]
    return all(value is not None and np.isfinite(value).all() for value in values)


def fold_constants(model: onnx.ModelProto) -> None:
    """Compute the nodes whose inputs are all constants, unless that makes the file larger.

    torch leaves nodes that it has no function for. For BERT's positions and token types, which are the same for all
    texts, onnx's reference implementation and onnx2tf cannot compute GatherElements, and a whole table of positions
    stays in the file, where the context needs a few rows.
    """
    graph = model.graph
    while True:
        constants = {tensor.name: tensor for tensor in graph.initializer if _is_inline(tensor)}
        readers = Counter(name for node in graph.node for name in set(node.input))
        nodes = [node for node in graph.node if node.input and all(name in constants for name in node.input)]
        computed, folded = _computed(model, nodes, constants), {}
        for node in nodes:
            values = [numpy_helper.from_array(computed[name], name) for name in node.output if name]
            replaced = sum(constants[name].ByteSize() for name in set(node.input) if readers[name] == 1)
            if sum(value.ByteSize() for value in values) <= max(replaced, _SMALL_BYTES):
                folded[node.output[0]] = values
        if not folded:
            return
        replace_nodes(graph, [node for node in graph.node if node.output[0] not in folded])
        graph.initializer.extend(value for values in folded.values() for value in values)
        drop_unused_constants(graph)


def _is_inline(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL


def _computed(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of nodes whose inputs are constants, by name; all at once, as each session takes a while."""
    if not nodes:
        return {}
    names = [name for node in nodes for name in node.output if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    tensors = [constants[name] for name in dict.fromkeys(name for node in nodes for name in node.input)]
    graph = helper.make_graph(nodes, "constants", [], outputs, initializer=tensors)
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    values = open_session(part.SerializeToString(), threads=1).run(None, {})
    return dict(zip(names, values, strict=True))


def unsqueeze_instead_of_gathering_all(model: onnx.ModelProto) -> None:
    """Replace a GatherND that reads every entry of a tensor in its order, in a shape with more axes, by Unsqueeze.

    transformers reads a text's padding mask (N, T) so, for its attention mask (N, 1, 1, T), by eleven nodes. OpenCV 5
    has no GatherND of booleans, and QNN refuses it.
    """
    gathers = [node for node in model.graph.node if node.op_type == "GatherND"]
    gathers = [node for node in gathers if not attributes_of(node).get("batch_dims")]
    parts = [(node, part) for node in gathers if (part := _computed_from_shapes(model, node.input[1])) is not None]
    shapes = [_shapes(model, size) for size in _BATCH_SIZES] if parts else []
    for node, part in parts:
        axes = {_added_axes(part, size, at.get(node.input[0])) for size, at in zip(_BATCH_SIZES, shapes, strict=True)}
        (added,) = axes if len(axes) == 1 else (None,)
        if added:
            name = _add_constant(model.graph, f"{node.output[0]}/axes", np.asarray(added, np.int64))
            new = helper.make_node("Unsqueeze", [node.input[0], name], node.output, node.name)
            node.CopyFrom(new)


def _computed_from_shapes(model: onnx.ModelProto, name: str) -> onnx.ModelProto | None:
    """Return the part of a model that computes a tensor, or None if its values depend on more than the batch size."""
    graph = onnx.GraphProto(name="part", node=model.graph.node, input=model.graph.input)
    graph.output.append(onnx.ValueInfoProto(name=name))
    drop_unused_nodes(graph)
    read = {name for node in graph.node for name in node.input if name}
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read and _is_inline(tensor))
    known = {*producers_of(graph), *(tensor.name for tensor in graph.initializer)}
    if any(node.op_type != "Shape" and not known.issuperset(filter(None, node.input)) for node in graph.node):
        return None
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _added_axes(part: onnx.ModelProto, batch_size: int, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the axes that gathering by the output of `part` adds to a tensor of this shape, None if it does more."""
    (value,) = part.graph.input
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    feed = {value.name: np.zeros((batch_size, *dims), dtype)}
    (indices,) = open_session(part.SerializeToString()).run(None, feed)
    if shape is None or indices.shape[-1] != len(shape) or math.prod(indices.shape[:-1]) != math.prod(shape):
        return None
    if not np.array_equal(indices.reshape(-1, len(shape)), np.indices(shape).reshape(len(shape), -1).T):
        return None
    kept, added = list(shape), []
    for axis, size in enumerate(indices.shape[:-1]):
        if kept and size == kept[0]:
            kept.pop(0)
        else:
            added.append(axis)  # of size 1, since the number of entries is the same
    return None if kept else tuple(added)


def skip_expansions(model: onnx.ModelProto) -> None:
    """Have an element-wise operator read the input of an Expand where its other inputs have the shape of its output.

    It broadcasts by itself, which also takes less time. torch expands the norm of every embedding, by its batch size
    from Shape(end=1). OpenCV 4 knows no `end`, and fails or returns five axes; compilers for NPUs may refuse any Shape.
    """
    graph, producers = model.graph, producers_of(model.graph)
    readers = [node for node in graph.node if node.op_type in _BROADCASTING]
    expanded = {name for name, node in producers.items() if node.op_type == "Expand"}
    readers = [node for node in readers if expanded.intersection(node.input)]
    shapes = [_shapes(model, size) for size in _BATCH_SIZES] if readers else []
    for node in readers:
        for i, name in enumerate(node.input):
            others, output = [*node.input[:i], *node.input[i + 1 :]], node.output[0]
            if name in expanded and all(
                output in known and any(known.get(other) == known[output] for other in others) for known in shapes
            ):
                node.input[i] = producers[name].input[0]


def _shapes(model: onnx.ModelProto, batch_size: int) -> Shapes:
    """Return the shapes of activations at a batch size, as far as they follow from the graph alone."""
    graph = onnx.GraphProto(name="shapes", node=model.graph.node, input=model.graph.input, output=model.graph.output)
    for tensor in model.graph.initializer:  # of weights, the shape is enough
        if math.prod(tensor.dims) <= _SMALL and _is_inline(tensor):
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    names = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim[:1]}
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in names:
                dim.dim_value = batch_size
    known = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(known, data_prop=True).graph
    tensors = {v.name: v.type.tensor_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    return {
        name: tuple(dim.dim_value for dim in tensor.shape.dim)
        for name, tensor in tensors.items()
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
    }


def drop_redundant_attributes(graph: onnx.GraphProto) -> None:
    """Drop attributes that are newer than opset 11 where they have their default values.

    onnx's converter to older opsets keeps `noop_with_empty_axes=0`, and its files are invalid: opset 17 is what ONNX
    Runtime 1.12 to 1.16, TensorRT 8.5 and compilers for NPUs read. onnx2torch refuses `allowzero=1`, here of a Reshape
    to a constant shape without a 0. Older attributes stay: the defaults of some have changed.
    """
    for node in graph.node:
        kept = [attribute for attribute in node.attribute if not _is_redundant(attribute, node, graph)]
        del node.attribute[:]
        node.attribute.extend(kept)


def _is_redundant(attribute: onnx.AttributeProto, node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    if attribute.name == "allowzero":
        shape = _constant(graph, node.input[1])
        return attribute.i == 0 or (shape is not None and bool(np.all(shape)))
    return bool(helper.get_attribute_value(attribute) == _NEW_ATTRIBUTES.get(attribute.name))


def drop_unused_nodes(graph: onnx.GraphProto) -> None:
    """Remove the nodes whose outputs nobody reads, in place, with their constants and descriptions."""
    used = {output.name for output in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):  # ONNX keeps them in the order of computation
        if used.intersection(node.output):
            used.update(node.input)
            nodes.append(node)
    replace_nodes(graph, nodes[::-1])
    drop_unused_constants(graph)
    written = {name for node in nodes for name in node.output}
    described = [value for value in graph.value_info if value.name in written]
    del graph.value_info[:]
    graph.value_info.extend(described)


def _constant(graph: onnx.GraphProto, name: str) -> npt.NDArray[Any] | None:
    """Return the value of a constant, or None if it is not a constant, or in a file of its own."""
    for tensor in graph.initializer:
        if tensor.name == name and _is_inline(tensor):
            value: npt.NDArray[Any] = numpy_helper.to_array(tensor)
            return value
    return None


def _add_constant(graph: onnx.GraphProto, name: str, value: npt.ArrayLike) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name
