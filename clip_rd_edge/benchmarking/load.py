"""Towers under load: pictures a second by batch, and energy a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.runtime.energy import EnergyMeter
from clip_rd_edge.utils.timing import time_in_turn

BATCHES = (8, 32)  # beside 1, which is the latency
_ROUNDS, _MAX_SECONDS, _ENERGY_SECONDS = 7, 10.0, 2.0
Pixels = npt.NDArray[np.float32]


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Pictures a second that an image tower embeds when it is given `batch` at once; the median of some calls."""

    batch: int
    pictures_per_second: float


def measure_throughput(
    encoders: Mapping[str, TowerEncoder], pixels: Mapping[str, Pixels]
) -> dict[str, tuple[Throughput, ...]]:
    """Time all image towers in turn at each of BATCHES; `pixels` are one preprocessed picture each, (1, 3, H, W)."""
    found: dict[str, list[Throughput]] = {label: [] for label in encoders}
    for batch in BATCHES:
        calls: dict[str, Callable[[], object]] = {
            label: partial(encoder.encode_pixels, np.repeat(pixels[label], batch, axis=0))
            for label, encoder in encoders.items()
        }
        times = time_in_turn(calls, rounds=_ROUNDS, warmup=1, max_seconds=_MAX_SECONDS, least=3)
        for label, samples in times.items():
            per_second = 1000 * batch / float(np.median(samples))
            found[label].append(Throughput(batch=batch, pictures_per_second=per_second))
    return {label: tuple(each) for label, each in found.items()}


def measure_energy(
    encoders: Mapping[str, TowerEncoder], pixels: Mapping[str, Pixels], *, meter: EnergyMeter | None = None
) -> dict[str, float]:
    """Joules of the whole processor a picture, of image towers one after the other; empty where nothing tells."""
    meter = meter or EnergyMeter()
    if not meter:
        return {}
    found = {}
    for label, encoder in encoders.items():
        calls, began = 0, time.perf_counter()
        meter.joules()
        while time.perf_counter() - began < _ENERGY_SECONDS:
            encoder.encode_pixels(pixels[label])
            calls += 1
        found[label] = meter.joules() / calls
    return found
