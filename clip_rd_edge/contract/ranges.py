"""The range that most of an activation's values lie in: what INT8 is scaled to, in training as in export."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

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
