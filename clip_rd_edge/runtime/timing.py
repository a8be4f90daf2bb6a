"""Latencies that can be compared: everything is timed in turn, so that a machine that slows down slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Milliseconds = npt.NDArray[np.float64]


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 50, warmup: int = 5, max_seconds: float = 20.0
) -> dict[str, Milliseconds]:
    """Time some calls, A B C A B C …, in one thread of control.

    Args:
        calls: what to time, by name.
        rounds: how often each is timed, at most.
        warmup: untimed rounds first.
        max_seconds: timing ends early after this, once each call has been timed 5 times.

    Returns:
        For each name its latencies in milliseconds, in the order of time.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - started > max_seconds:
            break
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            call()
            samples[name].append((time.perf_counter_ns() - begin) / 1e6)
    return {name: np.asarray(values) for name, values in samples.items()}
