"""Latencies that can be compared: everything is timed in turn, so that a machine that slows down slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Milliseconds = npt.NDArray[np.float64]
Call = Callable[[], object]
_WINDOW = 5  # calls whose medians are compared while warming up


def time_in_turn(
    calls: Mapping[str, Call], *, rounds: int = 50, warmup: int = 5, max_seconds: float = 20.0, least: int = 5
) -> dict[str, Milliseconds]:
    """Time some calls, A B C A B C …, in one thread of control.

    Args:
        calls: what to time, by name.
        rounds: how often each is timed, at most.
        warmup: untimed rounds first.
        max_seconds: timing ends early after this, once each call has been timed `least` times.

    Returns:
        For each name its latencies in milliseconds, in the order of time.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - started > max_seconds:
            break
        for name, call in calls.items():
            samples[name].append(_milliseconds(call))
    return {name: np.asarray(values) for name, values in samples.items()}


def warm_up(call: Call, *, tolerance: float = 0.05, max_calls: int = 100, max_seconds: float = 2.0) -> int:
    """Call until it is steady: until five calls' median is no more than `tolerance` below that of the five before.

    Returns:
        How many calls it took; after `max_calls` or `max_seconds` it counts as steady.
    """
    started = time.perf_counter()
    samples: list[float] = []
    while len(samples) < max_calls and time.perf_counter() - started < max_seconds:
        samples.append(_milliseconds(call))
        if len(samples) >= 2 * _WINDOW:
            before, last = np.median(samples[-2 * _WINDOW : -_WINDOW]), np.median(samples[-_WINDOW:])
            if last > (1 - tolerance) * before:
                break
    return len(samples)


def _milliseconds(call: Call) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6
