"""How much two honest runs differ by chance: what a change has to be greater than.

A model's pace is its p50 divided by that of the reference (`benchmarking.reference`) in the same sitting, as a
logarithm; a run's pace is the median over its sittings. How far sittings scatter tells how far runs may: the noise of a
comparison is WIDTH times the standard error of the difference of two such medians, OPENING counted in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Of some twenty comparisons in a report none shall be flagged by chance: 0.05 / 20, one-sided, with room for sittings
# that have something in common.
WIDTH = 3.5
# What no sitting of one run shows: another process has the model laid out otherwise in memory. A standard deviation.
OPENING = 0.01
_OF_MEDIAN = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean

Paces = npt.NDArray[np.float64]


def paces(sittings: Sequence[float], reference: Sequence[float]) -> Paces:
    """Logarithm of what a model takes over what the reference takes, a sitting each, (S,)."""
    logarithms: Paces = np.log(np.asarray(sittings)) - np.log(np.asarray(reference))
    return logarithms


def change(old: Paces, new: Paces) -> float:
    """How much longer the new run takes than the old, as a fraction, at the same pace of the machine."""
    return float(np.expm1(np.median(new) - np.median(old)))


def noise(old: Paces, new: Paces, *, pooled: float = 0.0) -> float:
    """What `change` may be by chance, as a fraction.

    Args:
        pooled: standard deviation of all models' paces (`pooled_deviation`): the sittings of one alone may lie together
            by luck.
    """
    variances = [
        max(pooled**2, float(np.var(each, ddof=1)) if len(each) > 1 else 0.0) / len(each) for each in (old, new)
    ]
    return math.expm1(WIDTH * math.sqrt(2 * OPENING**2 + _OF_MEDIAN**2 * sum(variances)))


def pooled_deviation(every: Sequence[Paces]) -> float:
    """Standard deviation within models, over all of them."""
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in every)
    freedom = sum(len(each) - 1 for each in every)
    return math.sqrt(squares / freedom) if freedom else 0.0


def of_one_run(every: Sequence[Paces]) -> float:
    """What two such runs may differ by in any row, as a fraction; `every` are the paces of all rows, of one kind."""
    pooled = pooled_deviation(every)
    return max(noise(each, each, pooled=pooled) for each in every)
