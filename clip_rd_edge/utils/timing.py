"""Comparable latencies: calls are timed in turn, so that a slow-down of the machine affects all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clip_rd_edge.utils.text import duration

Milliseconds = npt.NDArray[np.float64]
Call = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """The time allowed for some work; its text is what is left, if the time is limited."""

    seconds: float = math.inf
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def share(self, part: float, *, most: float = math.inf) -> float:
        """Return a part of the seconds that are left, at most `most` and at least 0."""
        return max(0.0, min(part * self.left, most))

    def __str__(self) -> str:
        return "" if math.isinf(self.seconds) else f"{duration(max(self.left, 0))} left"


# Of warm-up.
_WINDOW = 5  # calls per median
_TOLERANCE, _MAX_CALLS, _MAX_SECONDS = 0.05, 100, 2.0


def time_in_turn(
    calls: Mapping[str, Call], *, rounds: int = 50, warmup: int = 5, max_seconds: float = 20.0, min_rounds: int = 5
) -> dict[str, Milliseconds]:
    """Time several calls in one thread, interleaved as A B C A B C ….

    Args:
        calls: the calls to time, by name.
        rounds: max number of times each call is timed.
        warmup: number of untimed rounds to start with.
        max_seconds: stop early after this time, once each call has been timed `min_rounds` times.

    Returns:
        The latencies of each call in milliseconds, in chronological order.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() - started > max_seconds:
            break
        for name, call in calls.items():
            samples[name].append(_milliseconds(call))
    return {name: np.asarray(values) for name, values in samples.items()}


def warm_up(call: Call) -> int:
    """Call until latency is steady: the median of five calls is at most 5 % below that of the previous five.

    Returns:
        The number of calls made; warm-up also ends after 100 calls or 2 seconds.
    """
    started = time.perf_counter()
    samples: list[float] = []
    while len(samples) < _MAX_CALLS and time.perf_counter() - started < _MAX_SECONDS:
        samples.append(_milliseconds(call))
        if len(samples) >= 2 * _WINDOW:
            previous, latest = np.median(samples[-2 * _WINDOW : -_WINDOW]), np.median(samples[-_WINDOW:])
            if latest > (1 - _TOLERANCE) * previous:
                break
    return len(samples)


def _milliseconds(call: Call) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6


def sign_test(count: int, others: int) -> float:
    """Return the probability that at least `count` changes go one way if each goes either way equally often.

    Args:
        count: number of changes in the one direction; the test is one-sided.
        others: number of changes in the other direction.
    """
    changed = count + others
    outcomes, term = 0, math.comb(changed, count)
    for number in range(count, changed + 1):
        outcomes += term
        term = term * (changed - number) // (number + 1)  # the next binomial coefficient, without its factorials
    probability: float = outcomes / 2**changed
    return probability
