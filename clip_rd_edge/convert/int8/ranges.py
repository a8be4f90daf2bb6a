"""The range that most of an activation's values lie in: what INT8 is scaled to, in training as in export."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.convert.graph import silently, with_outputs
from clip_rd_edge.convert.parity import Inputs
from clip_rd_edge.runtime.backends.onnxruntime import open_session

_PERCENTILE = 99.99  # what a few outliers do to a range costs all other values their resolution
_MOST_ENTRIES = 50_000  # of an activation: looking at them all takes minutes


def few_of(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Some of an activation's values, evenly spread, in one dimension: enough to tell how they are distributed."""
    flat = values.reshape(-1)
    return flat[:: -(-flat.size // _MOST_ENTRIES)]


def without_outliers(values: npt.NDArray[Any]) -> tuple[float, float]:
    """The range of an activation's values, of any shape, without its outliers on either side."""
    with np.errstate(invalid="ignore"):  # between two infinities of a causal mask lies nothing
        low, high = np.percentile(few_of(values), [100 - _PERCENTILE, _PERCENTILE])
    return float(low), float(high)


_BATCH_SIZE = 8


@dataclass(frozen=True)
class Ranges:
    """Least and greatest value by the name of each tensor: of all samples, and without the outliers of each batch."""

    min_max: dict[str, tuple[Any, Any]]
    percentile: dict[str, tuple[Any, Any]]


def watched(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> Iterator[dict[str, Inputs]]:
    """Run a model on some inputs, a few at a time, and give the values that the named float tensors take."""
    session = open_session(with_outputs(model, tensors).SerializeToString())
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
