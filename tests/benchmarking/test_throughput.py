from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.api.models import first_answer
from clip_rd_edge.benchmarking import throughput
from clip_rd_edge.benchmarking.throughput import (
    BATCHES,
    EnergyMeter,
    measure_cold_start,
    measure_energy,
    measure_throughput,
)

# Stands in for a model: answers after a while and exits later.
PROGRAM = """
import sys, time
assert open(sys.argv[1], "rb").read() == b"image"
time.sleep(0.1)
print('{"peak_memory_bytes": 7}', flush=True)
time.sleep(0.3)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(b"image")
    return path


def test_cold_start_ends_with_the_answer_rather_than_the_process(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_rd_edge.benchmarking.throughput._MAX_RUN_SECONDS", 0.01)
    cold_start = measure_cold_start([sys.executable, "-S", "-c", PROGRAM], image)
    assert cold_start is not None
    assert cold_start.first_answer_s >= 0.1
    assert (cold_start.runs, cold_start.peak_memory_bytes) == (1, 7)


def test_the_cold_start_of_a_bundle_is_measured(colour_bundle: Path, colour_images: Path) -> None:
    cold_start = measure_cold_start(first_answer(str(colour_bundle), None, 1), colour_images / "red.png")
    assert cold_start is not None
    assert cold_start.first_answer_s > 0.01
    assert cold_start.peak_memory_bytes is None or 10e6 < cold_start.peak_memory_bytes < 2e9


PIXELS = np.zeros((1, 3, 8, 8), dtype=np.float32)


def test_throughput_is_measured_per_batch_size(make_encoder: Callable[..., Any]) -> None:
    encoder, batches = make_encoder(), set()
    plain = encoder.encode_pixels
    encoder.encode_pixels = lambda pixels: (batches.add(len(pixels)), plain(pixels))[1]
    (results,) = measure_throughput({"a": encoder}, {"a": PIXELS}).values()
    assert [result.batch for result in results] == sorted(batches) == list(BATCHES)
    assert all(result.images_per_second > 0 for result in results)


class FakeMeter(EnergyMeter):
    """Reports two joules at every reading."""

    def __init__(self) -> None:
        self._counters = [None]  # type: ignore[list-item]

    def joules(self) -> float:
        return 2.0


def test_energy_is_measured_per_image(make_encoder: Callable[..., Any], monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(throughput, "_ENERGY_SECONDS", 0.01)
    calls: list[int] = []
    encoder = make_encoder()
    encoder.encode_pixels = lambda pixels: calls.append(len(pixels))
    assert measure_energy({"a": encoder}, {"a": PIXELS}, meter=FakeMeter()) == {"a": 2.0 / len(calls)}
    assert measure_energy({"a": encoder}, {"a": PIXELS}, meter=EnergyMeter(tmp_path)) == {}


def make_counter(folder: Path, name: str, microjoules: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_energy_counts_whole_packages_and_handles_wraparound(tmp_path: Path) -> None:
    first, second = (
        make_counter(tmp_path / "rapl:0", "package-0", 900_000),
        make_counter(tmp_path / "rapl:1", "package-1", 0),
    )
    make_counter(tmp_path / "rapl:0:0", "core", 0)  # part of package 0
    meter = EnergyMeter(tmp_path)
    assert meter
    first.write_text("150000")
    second.write_text("500000")
    assert meter.joules() == pytest.approx(0.75)
    assert meter.joules() == 0
