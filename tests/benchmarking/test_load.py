from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clip_rd_edge.benchmarking import load
from clip_rd_edge.benchmarking.load import BATCHES, measure_energy, measure_throughput
from clip_rd_edge.runtime.energy import EnergyMeter

ONE = np.zeros((1, 3, 8, 8), dtype=np.float32)


def test_pictures_a_second_by_batch(make_encoder: Callable[..., Any]) -> None:
    encoder, batches = make_encoder(), set()
    plain = encoder.encode_pixels
    encoder.encode_pixels = lambda pixels: (batches.add(len(pixels)), plain(pixels))[1]
    (found,) = measure_throughput({"a": encoder}, {"a": ONE}).values()
    assert [each.batch for each in found] == sorted(batches) == list(BATCHES)
    assert all(each.pictures_per_second > 0 for each in found)


class Meter(EnergyMeter):
    """Reads two joules whenever it is asked."""

    def __init__(self) -> None:
        self._counters = [None]  # type: ignore[list-item]

    def joules(self) -> float:
        return 2.0


def test_energy_a_picture(make_encoder: Callable[..., Any], monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(load, "_ENERGY_SECONDS", 0.01)
    calls: list[int] = []
    encoder = make_encoder()
    encoder.encode_pixels = lambda pixels: calls.append(len(pixels))
    assert measure_energy({"a": encoder}, {"a": ONE}, meter=Meter()) == {"a": 2.0 / len(calls)}
    assert measure_energy({"a": encoder}, {"a": ONE}, meter=EnergyMeter(tmp_path)) == {}
