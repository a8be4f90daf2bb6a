"""Ranges of activations by entropy: cut where the INT8 values tell most of the distribution. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.ranges import few_of
from clip_rd_edge.exporters.quiet import silently

# ONNX Runtime tries cuts from half the range to all of it, one a bin; finer bins take several times as long.
_BINS, _LEVELS = 256, 128


def entropy_ranges(batches: Iterable[Mapping[str, npt.NDArray[Any]]]) -> dict[str, tuple[Any, Any]]:
    """The range of each tensor, by its name, that loses least by the Kullback-Leibler divergence (Migacz 2017).

    The search is ONNX Runtime's own.

    Args:
        batches: the tensors' values, batch by batch; what is not finite is left out.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        "entropy", symmetric=False, num_bins=_BINS, num_quantized_bins=_LEVELS, percentile=None, scenario=None
    )
    with silently():
        for batch in batches:
            few = {name: few_of(values) for name, values in batch.items()}
            collector.collect({name: values[np.isfinite(values)] for name, values in few.items()})
        found = collector.compute_collection_result()
    return {name: (low, high) for name, (low, high, *_) in found.items()}
