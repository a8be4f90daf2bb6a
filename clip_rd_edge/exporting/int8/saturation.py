"""INT8 that is right on every processor.

x86 processors without VNNI (Intel before Ice Lake and Alder Lake, AMD before Zen 4, most Atoms) multiply U8 activations
by S8 weights with `vpmaddubsw`, which adds each two neighbouring products in 16 bits and saturates: 2 · 255 · 127 is
64,770, twice what fits. The embeddings are then wrong, without an error. Weights of 7 bits cannot saturate:
2 · 255 · 64 is 32,640, and 32,767 fits. VNNI, AMX and Arm add in 32 bits, so both are right there, at the same speed.

An export for those may be made on a processor that saturates, which then times INT8, but not to evaluate it. The same
holds where ONNX Runtime's kernels are wrong; see `runtime.backends.onnxruntime`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.bundle.manifest import INSTRUCTION_SETS
from clip_rd_edge.exporting.graph import attributes_of, producers_of, replace_nodes
from clip_rd_edge.runtime.backends.onnxruntime import int8_fault, open_session, processor_saturates, wrong_sums

# Largest level of a weight, by its bits.
MAX_WEIGHT = {7: 64, 8: 127}
# In a browser, 8 bits depend on the processor below: WebAssembly's relaxed dot product is defined for 7.
_WITH_8_BITS = ("x86-64-vnni", "aarch64")
_LAYERS = ("Conv", "Gemm", "MatMul", "ConvInteger", "MatMulInteger")


def instruction_sets(content: bytes) -> tuple[str, ...]:
    """Return the instruction sets on which a CPU computes a model's INT8 as the file says, of `INSTRUCTION_SETS`.

    Returns:
        All of them if no weight can saturate; an empty tuple if no layer has INT8 weights.
    """
    largest = max_weight(onnx.load_from_string(content))
    if largest is None:
        return ()
    return INSTRUCTION_SETS if largest <= MAX_WEIGHT[7] else _WITH_8_BITS


def max_weight(model: onnx.ModelProto) -> int | None:
    """Return the largest absolute level of an S8 weight that a layer multiplies, or None if there is none."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = producers_of(model.graph)
    levels = [_levels(node.input[1], producers, constants) for node in model.graph.node if node.op_type in _LAYERS]
    largest = [int(np.abs(values.astype(np.int16)).max()) for values in levels if values is not None and values.size]
    return max(largest, default=None)


def _levels(
    name: str, producers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> npt.NDArray[np.generic] | None:
    """Return the S8 levels of the weight called `name`, which is a constant, or one that a graph (de)quantises."""
    if name in constants:
        signed = constants[name].data_type == onnx.TensorProto.INT8
        return np.asarray(numpy_helper.to_array(constants[name])) if signed else None
    node = producers.get(name)
    if node is None or node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return None
    if node.op_type == "DequantizeLinear" or node.input[0] not in constants:
        return _levels(node.input[0], producers, constants)
    values, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
    axis = attributes_of(node).get("axis", 1)
    shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)] if scale.ndim else []
    levels: npt.NDArray[np.int8] = np.clip(np.rint(values / scale.reshape(shape)), -128, 127).astype(np.int8)
    return levels


def right_session(
    session: Any,
    content: bytes,
    *,
    threads: int | None = None,
    runtime: str = "onnxruntime",
    sets: Callable[[bytes], tuple[str, ...]] = instruction_sets,
) -> Any:
    """Return a session for a model's embeddings: the given one, or if it is wrong on this processor, one that is not.

    Args:
        session: of the model, in `runtime`.
        content: of the model's file; where the session is wrong, an ONNX file.
    """
    is_right = not (processor_saturates() or wrong_sums())  # which takes less time than `sets`
    if is_right or not int8_fault(sets(content), runtime=runtime):
        return session
    return open_as_written(content, threads=threads)


def open_as_written(content: bytes, *, threads: int | None = None) -> Any:
    """Open a session that computes an ONNX file's INT8 as the file says on any processor, and slowly.

    Q/DQ is computed in float32, as no nodes are fused; integer products are in float64, which holds their sums.
    """
    model = onnx.load_from_string(content)
    nodes = [_in_float64(node) if node.op_type == "MatMulInteger" else [node] for node in model.graph.node]
    replace_nodes(model.graph, chain.from_iterable(nodes))
    return open_session(model.SerializeToString(), threads=threads, optimize=False)


def _in_float64(product: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the nodes of a MatMulInteger without INT8 kernels: some of them are wrong for U8 weights, too."""
    output = product.output[0]
    nodes, factors = [], []
    for role, inputs in (("a", product.input[::2]), ("b", product.input[1::2])):  # levels, and perhaps a zero point
        casts = [
            helper.make_node("Cast", [name], [f"{output}/{role}{i}"], to=onnx.TensorProto.DOUBLE)
            for i, name in enumerate(filter(None, inputs))
        ]
        nodes += casts
        if len(casts) > 1:
            nodes.append(helper.make_node("Sub", [cast.output[0] for cast in casts], [f"{output}/{role}"]))
        factors.append(nodes[-1].output[0])
    nodes.append(helper.make_node("MatMul", factors, [f"{output}/sums"]))
    nodes.append(helper.make_node("Cast", [f"{output}/sums"], [output], to=onnx.TensorProto.INT32))
    return nodes
