"""Dynamic INT8: weights are quantised in advance, activations at run time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from clip_rd_edge.exporting.graph import file_content, silently
from clip_rd_edge.exporting.options import WeightBits


def scales_per_batch(content: bytes) -> bool:
    """Return whether a model quantises activations at run time, by their range over the whole batch."""
    return any(node.op_type == "DynamicQuantizeLinear" for node in onnx.load_from_string(content).graph.node)


def quantize_dynamically(
    model: Path | bytes,
    *,
    matrix_products: bool,
    token_embeddings: bool,
    per_token: bool,
    weight_bits: WeightBits = 7,
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
    del graph.node[:]
    graph.node.extend(nodes)
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
