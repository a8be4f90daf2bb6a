"""Noise of latency comparisons.

A model's latency is expressed relative to the reference workload (`benchmarking.latency`): the logarithm of its p50
over the reference's p50 in the same timing block. A run's relative latency is the median over its blocks. The scatter
of the blocks predicts the scatter of runs: the noise of a comparison is STANDARD_ERRORS times the standard error of the
difference of two such medians, with RELOAD_DEVIATION included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# None of the about twenty comparisons in a report should be flagged by chance: 0.05 / 20, one-sided, with a margin for
# correlation between blocks.
STANDARD_ERRORS = 3.5
# Standard deviation that blocks of one run cannot show: another process has the model in another place in memory.
RELOAD_DEVIATION = 0.01
MIN_BLOCKS = 2  # a single one has no scatter, so that every difference would exceed the noise
_MEDIAN_TO_MEAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean

LogRatios = npt.NDArray[np.float64]


def log_ratios(blocks: Sequence[float], reference: Sequence[float]) -> LogRatios:
    """Return the logarithm of a model's latency over the reference's, per block, (B,)."""
    ratios: LogRatios = np.log(np.asarray(blocks)) - np.log(np.asarray(reference))
    return ratios


def relative_change(old: LogRatios, new: LogRatios) -> float:
    """Return the increase in latency from the old run to the new, as a fraction, corrected for the machine's speed."""
    return float(np.expm1(np.median(new) - np.median(old)))


def change_noise(old: LogRatios, new: LogRatios, *, pooled: float = 0.0) -> float:
    """Return how large `relative_change` can be by chance, as a fraction.

    Args:
        old, new: log ratios of at least MIN_BLOCKS blocks each.
        pooled: standard deviation over all models (`pooled_deviation`), used as a lower bound: the blocks of a single
            model may be close together by chance.
    """
    variances = [max(pooled**2, float(np.var(ratios, ddof=1))) / len(ratios) for ratios in (old, new)]
    deviation = math.sqrt(2 * RELOAD_DEVIATION**2 + _MEDIAN_TO_MEAN_ERROR**2 * sum(variances))
    return math.expm1(STANDARD_ERRORS * deviation)


def pooled_deviation(models: Sequence[LogRatios]) -> float:
    """Return the standard deviation within models, pooled over all of them."""
    squares = sum(float(((ratios - ratios.mean()) ** 2).sum()) for ratios in models)
    degrees_of_freedom = sum(len(ratios) - 1 for ratios in models)
    return math.sqrt(squares / degrees_of_freedom) if degrees_of_freedom else 0.0


def run_noise(models: Sequence[LogRatios]) -> float:
    """Return how much any row can differ between two runs like this one by chance, as a fraction.

    Args:
        models: the log ratios of all rows for one measurement, of at least MIN_BLOCKS blocks each.
    """
    pooled = pooled_deviation(models)
    return max(change_noise(ratios, ratios, pooled=pooled) for ratios in models)
