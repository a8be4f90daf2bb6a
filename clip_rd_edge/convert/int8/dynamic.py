"""Dynamic INT8: weights are quantised in advance, activations at run time. Never imports torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from clip_rd_edge.convert.graph import file_content, silently
from clip_rd_edge.convert.options import WeightBits


def scales_per_batch(content: bytes) -> bool:
    """Return whether a model quantises activations at run time, by their range over the whole batch."""
    return any(node.op_type == "DynamicQuantizeLinear" for node in onnx.load_from_string(content).graph.node)


def quantize_dynamically(
    model: Path | bytes,
    *,
    matrix_products: bool,
    token_embeddings: bool,
    per_channel: bool,
    weight_bits: WeightBits = 7,
) -> bytes:
    """Return a model with S8 weights, as file content.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        matrix_products: quantise MatMul and Gemm with constant weights; the matrix products of attention stay in float,
            and so do Softmax and the mask that is added before it.
        token_embeddings: quantise the token embedding table, which is most of a small text tower's size.
        per_channel: one scale per column of the weights, which is more accurate and sometimes slower.
        weight_bits: of the weights of matrix products, see `convert.int8.saturation`; token embeddings have 8.
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
            per_channel=per_channel,
            reduce_range=weight_bits == 7,
            weight_type=QuantType.QInt8,  # U8 weights are several times slower
            extra_options={"MatMulConstBOnly": True},
        )
        return file_content(onnx.load(target))
