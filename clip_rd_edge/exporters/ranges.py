"""The ranges of a tower's activations, which static INT8 needs beforehand. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.exporters.measure import Inputs
from clip_rd_edge.runtime.ort import open_session

PERCENTILE = 99.99  # what a few outliers do to a range costs all other values their resolution
_BATCH_SIZE = 8
# Entries of an activation, evenly spread, that its percentile is taken of: sorting them all takes minutes.
_MOST_ENTRIES = 50_000


@dataclass(frozen=True)
class Ranges:
    """Least and greatest value by the name of each tensor: of all samples, and without the outliers of each batch."""

    min_max: dict[str, tuple[Any, Any]]
    percentile: dict[str, tuple[Any, Any]]


def measure_ranges(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> Ranges:
    """Run a model on some inputs and see what values the named float tensors take.

    ONNX Runtime's own calibrators do the same; theirs of percentiles keeps histograms of everything in memory, and
    fails on a tensor whose values are nearly all the same.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {output.name for output in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in given)
    session = open_session(watched.SerializeToString())
    feed = session.get_inputs()[0].name
    rows = []
    for batch in in_batches(len(samples), _BATCH_SIZE):
        values = session.run(list(tensors), {feed: samples[batch]})
        rows.append([_extremes(value) for value in values])
    table = np.asarray(rows, dtype=np.float32)  # (batches, tensors, 4)
    lowest, highest = table[..., 0].min(axis=0), table[..., 1].max(axis=0)
    low, high = table[..., 2].mean(axis=0), table[..., 3].mean(axis=0)
    return Ranges(
        min_max={name: (lowest[i], highest[i]) for i, name in enumerate(tensors)},
        percentile={name: (low[i], high[i]) for i, name in enumerate(tensors)},
    )


def _extremes(value: Inputs) -> tuple[float, float, float, float]:
    """Minimum, maximum, and the two percentiles."""
    flat = value.reshape(-1)
    few = flat[:: -(-flat.size // _MOST_ENTRIES)]
    with np.errstate(invalid="ignore"):  # between two infinities of a causal mask lies nothing
        low, high = np.percentile(few, [100 - PERCENTILE, PERCENTILE])
    return float(flat.min()), float(flat.max()), float(low), float(high)
