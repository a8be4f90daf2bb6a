"""A tower in TensorRT's INT8: as many layers as the agreement with float32 allows. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.exporters.candidates import SENSITIVITY_SAMPLES, SENSITIVITY_SECONDS
from clip_rd_edge.exporters.measure import Inputs, embed
from clip_rd_edge.exporters.parity import Agreement, agreement
from clip_rd_edge.exporters.ranges import measure_ranges
from clip_rd_edge.exporters.sensitivity import group_errors, layers_within
from clip_rd_edge.exporters.static import layers_of
from clip_rd_edge.exporters.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.runtime.backends.onnxruntime import open_session

# Shares of the allowed error that the layers left in INT8 may sum to, tried from the first on.
_SHARES = (0.9, 0.4, 0.1)


@dataclass(frozen=True)
class SymmetricTower:
    """A tower with symmetric Q/DQ.

    Attributes:
        model: in float32 around the Q/DQ.
        layers: those in INT8; of the others, `in_float`, accuracy asked to leave them.
        of: agreement with float32 on the samples that judge.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    in_float: tuple[str, ...]
    of: Agreement


def symmetric_tower(
    prepared: Path, *, calibrate: Inputs, judge: Inputs, min_agreement: float, progress: Callable[[str], None]
) -> SymmetricTower | None:
    """Quantise every layer; where that costs too much, leave out the layers that it hurts most. None where none holds.

    Args:
        prepared: a float32 model that `quant_pre_process` has optimised.
        calibrate, judge: inputs to set ranges by, and others.
        min_agreement: least centred cosine with float32.
    """
    model = onnx.load(prepared)
    every = tuple(node.name for node in layers_of(model))
    ranges = measure_ranges(model, quantized_inputs(model), calibrate)
    reference = embed(open_session(str(prepared)), judge)

    def attempt(layers: Sequence[str]) -> SymmetricTower:
        quantized = quantize_symmetrically(model, ranges, layers=layers)
        of = agreement(reference, embed(open_session(quantized.SerializeToString()), judge))
        return SymmetricTower(quantized, tuple(layers), tuple(name for name in every if name not in layers), of)

    whole = attempt(every)
    if whole.of.centred_cosine >= min_agreement:
        return whole
    progress(f"measuring what INT8 costs in each of {len(every)} layers")
    few = calibrate[:SENSITIVITY_SAMPLES]

    def embed_with(layers: Sequence[str]) -> Embeddings:
        return embed(open_session(quantize_symmetrically(model, ranges, layers=layers).SerializeToString()), few)

    errors = group_errors(every, embed_with, embed(open_session(str(prepared)), few), max_seconds=SENSITIVITY_SECONDS)
    for share in _SHARES:
        if layers := layers_within(errors, share * (1 - min_agreement)):
            partly = attempt(layers)
            if partly.of.centred_cosine >= min_agreement:
                return partly
    return None
