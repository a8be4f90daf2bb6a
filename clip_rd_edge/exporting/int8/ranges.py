"""Activation ranges without outliers, which set the scales of INT8, in training as in export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from clip_rd_edge.exporting.graph import activation_batches, silently
from clip_rd_edge.exporting.parity import Inputs

_PERCENTILE = 99.99  # a few outliers would widen the range and cost all other values their resolution
_MAX_VALUES = 50_000  # per activation: using all of them takes minutes
_SYMMETRIC = 1e-3  # relative


def subsample(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a random subset of an activation's values, flattened, large enough to show their distribution.

    Evenly spaced values would miss channels wherever the step and the number of channels have a common factor.
    """
    flat = values.reshape(-1)
    if flat.size <= _MAX_VALUES:
        return flat
    return flat[np.random.default_rng(0).integers(0, flat.size, _MAX_VALUES)]


def range_without_outliers(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the range of an activation's values, of any shape, without the outliers on either side."""
    with np.errstate(invalid="ignore"):  # interpolating between two infinities of a causal mask is invalid
        low, high = np.percentile(subsample(values), [100 - _PERCENTILE, _PERCENTILE])
    return float(low), float(high)


def range_without_ties(low: Any, high: Any) -> tuple[Any, Any]:
    """Return a range for U8; one that reaches as far below 0 as above gets one more level below.

    Pixels p in 0…255 with mean and standard deviation 0.5 become 2p/255 - 1. U8 over [-1, 1] has steps of 2/255, too,
    and 0 on a level: each pixel lies between two of them, and rounding goes by the last bit of a sum, which differs by
    processor. In steps of 1/127 they do not, and no end is clipped.
    """
    symmetric = high > 0 and abs(low + high) <= _SYMMETRIC * high
    return (-high * np.float32(128 / 127), high) if symmetric else (low, high)


@dataclass(frozen=True)
class Ranges:
    """Lower and upper bound per tensor name.

    Attributes:
        min_max: min and max over all samples.
        percentile: mean over the batches of each batch's range without outliers.
    """

    min_max: dict[str, tuple[Any, Any]]
    percentile: dict[str, tuple[Any, Any]]


def measure_ranges(model: onnx.ModelProto, tensors: Sequence[str], samples: Inputs) -> Ranges:
    """Measure the ranges of a model's named float tensors on some inputs.

    ONNX Runtime's own calibrators do the same, but its percentile calibrator keeps all histograms in memory and fails
    on a tensor whose values are nearly all the same.
    """
    rows = [
        [(value.min(), value.max(), *range_without_outliers(value)) for value in batch.values()]
        for batch in activation_batches(model, tensors, samples)
    ]
    table = np.asarray(rows, dtype=np.float32)  # (batches, tensors, 4)
    lowest, highest = table[..., 0].min(axis=0), table[..., 1].max(axis=0)
    with np.errstate(over="ignore"):  # of a mask of float32's most negative number
        low, high = table[..., 2].mean(axis=0), table[..., 3].mean(axis=0)
    return Ranges(
        min_max={name: (lowest[i], highest[i]) for i, name in enumerate(tensors)},
        percentile={name: (low[i], high[i]) for i, name in enumerate(tensors)},
    )


# ONNX Runtime tries every cut from half the range to all of it, one per bin; finer bins take several times as long.
_BINS, _LEVELS = 256, 128
_MASKING = np.finfo(np.float32).max / 4  # no activation is as large


def entropy_ranges(batches: Iterable[Mapping[str, npt.NDArray[Any]]]) -> dict[str, tuple[Any, Any]]:
    """Return, per tensor name, the range that loses least by the Kullback-Leibler divergence (Migacz 2017).

    The search is ONNX Runtime's own.

    Args:
        batches: the tensors' values, batch by batch. Values that are not finite are ignored, and so are those by which
            a mask hides positions: float32's most negative number, in text towers of transformers.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        "entropy", symmetric=False, num_bins=_BINS, num_quantized_bins=_LEVELS, percentile=None, scenario=None
    )
    with silently():
        for batch in batches:
            subsets = {name: subsample(values) for name, values in batch.items()}
            collector.collect({name: values[np.abs(values) < _MASKING] for name, values in subsets.items()})
        result = collector.compute_collection_result()
    return {name: (low, high) for name, (low, high, *_) in result.items()}
