"""Quantiles of latencies with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.scores import Interval
from clip_rd_edge.utils.timing import Milliseconds

RESAMPLES = 1_000
_QUANTILES = (50, 95, 99)


class Percentiles(msgspec.Struct, frozen=True):
    """Of repeated calls, in milliseconds.

    Attributes:
        p50_interval, p95_interval, p99_interval: 95 %, by bootstrap over sittings and over the calls of each.
        sittings: the p50 of each sitting, in the order of time.

    Results of format version 1 have p50 and p95 alone.
    """

    p50: float
    p95: float
    p99: float | None = None
    p50_interval: Interval | None = None
    p95_interval: Interval | None = None
    p99_interval: Interval | None = None
    sittings: tuple[float, ...] = ()


def percentiles(sittings: Sequence[Milliseconds], *, seed: int = 0) -> Percentiles:
    """Quantiles of S sittings' latencies.

    Calls of one sitting have more in common with each other than with those of the next, so that the bootstrap draws
    sittings first and calls within them after: drawing calls alone would promise too narrow an interval.
    """
    p50, p95, p99 = (float(value) for value in np.percentile(np.concatenate(sittings), _QUANTILES))
    drawn = _resampled(sittings, np.random.default_rng(seed))
    low, high = np.percentile(np.percentile(drawn, _QUANTILES, axis=1), [2.5, 97.5], axis=1)
    at50, at95, at99 = (Interval(float(a), float(b)) for a, b in zip(low, high, strict=True))
    return Percentiles(p50, p95, p99, at50, at95, at99, medians(sittings))


def medians(sittings: Sequence[Milliseconds]) -> tuple[float, ...]:
    """The p50 of each sitting."""
    return tuple(float(np.median(sitting)) for sitting in sittings)


def _resampled(sittings: Sequence[Milliseconds], rng: np.random.Generator) -> Milliseconds:
    """Bootstrap samples, (RESAMPLES, S × calls of the shortest sitting)."""
    calls = min(map(len, sittings))
    table = np.stack([sitting[:calls] for sitting in sittings])
    shape = (RESAMPLES, len(sittings), calls)
    chosen = rng.integers(0, len(sittings), shape[:2])[:, :, None]
    drawn: Milliseconds = table[chosen, rng.integers(0, calls, shape)]
    return drawn.reshape(RESAMPLES, -1)
