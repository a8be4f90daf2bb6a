"""The ranges of a tower's activations, which static INT8 needs beforehand. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.contract.ranges import without_outliers
from clip_rd_edge.exporters.measure import Inputs
from clip_rd_edge.runtime.backends.onnxruntime import open_session

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Ranges:
    """Least and greatest value by the name of each tensor: of all samples, and without the outliers of each batch."""

    min_max: dict[str, tuple[Any, Any]]
    percentile: dict[str, tuple[Any, Any]]


def watched(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> Iterator[dict[str, Inputs]]:
    """Run a model on some inputs, a few at a time, and give the values that the named float tensors take."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    given = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in given)
    session = open_session(graph.SerializeToString())
    feed = session.get_inputs()[0].name
    for batch in in_batches(len(samples), _BATCH_SIZE):
        yield dict(zip(tensors, session.run(list(tensors), {feed: samples[batch]}), strict=True))


def measure_ranges(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> Ranges:
    """See what values the named float tensors of a model take on some inputs.

    ONNX Runtime's own calibrators do the same; theirs of percentiles keeps histograms of everything in memory, and
    fails on a tensor whose values are nearly all the same.
    """
    rows = [[_extremes(value) for value in batch.values()] for batch in watched(model, tensors, samples)]
    table = np.asarray(rows, dtype=np.float32)  # (batches, tensors, 4)
    lowest, highest = table[..., 0].min(axis=0), table[..., 1].max(axis=0)
    low, high = table[..., 2].mean(axis=0), table[..., 3].mean(axis=0)
    return Ranges(
        min_max={name: (lowest[i], highest[i]) for i, name in enumerate(tensors)},
        percentile={name: (low[i], high[i]) for i, name in enumerate(tensors)},
    )


def _extremes(value: Inputs) -> tuple[float, float, float, float]:
    """Minimum, maximum, and the two percentiles."""
    return float(value.min()), float(value.max()), *without_outliers(value)
