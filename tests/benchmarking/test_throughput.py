from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.api import first_answer
from clip_rd_edge.benchmarking import throughput as load
from clip_rd_edge.benchmarking.throughput import (
    BATCHES,
    EnergyMeter,
    measure_cold_start,
    measure_energy,
    measure_throughput,
)

# Not a model: answers after a while, holding some memory, and ends later.
PROGRAM = """
import sys, time
assert open(sys.argv[1], "rb").read() == b"picture"
time.sleep(0.1)
print('{"peak_memory_bytes": 7}', flush=True)
time.sleep(0.3)
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(b"picture")
    return path


def test_from_launch_to_the_answer_and_not_to_the_end(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_rd_edge.benchmarking.throughput._ENOUGH_SECONDS", 0.01)
    found = measure_cold_start([sys.executable, "-S", "-c", PROGRAM], picture)
    assert found is not None
    assert found.first_answer_s >= 0.1
    assert (found.runs, found.peak_memory_bytes) == (1, 7)


def test_a_process_that_fails_has_no_cold_start(picture: Path) -> None:
    assert measure_cold_start([sys.executable, "-S", "-c", "raise SystemExit(3)"], picture) is None


def test_a_bundle_answers_in_a_process_of_its_own(colour_bundle: Path, colour_pictures: Path) -> None:
    found = measure_cold_start(first_answer(str(colour_bundle), None, 1), colour_pictures / "red.png")
    assert found is not None
    assert found.first_answer_s > 0.01
    assert found.peak_memory_bytes is None or 10e6 < found.peak_memory_bytes < 2e9


ONE = np.zeros((1, 3, 8, 8), dtype=np.float32)


def test_pictures_a_second_by_batch(make_encoder: Callable[..., Any]) -> None:
    encoder, batches = make_encoder(), set()
    plain = encoder.encode_pixels
    encoder.encode_pixels = lambda pixels: (batches.add(len(pixels)), plain(pixels))[1]
    (found,) = measure_throughput({"a": encoder}, {"a": ONE}).values()
    assert [each.batch for each in found] == sorted(batches) == list(BATCHES)
    assert all(each.images_per_second > 0 for each in found)


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


def counter(folder: Path, name: str, microjoules: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_count_and_begin_again_at_zero(tmp_path: Path) -> None:
    first, second = counter(tmp_path / "rapl:0", "package-0", 900_000), counter(tmp_path / "rapl:1", "package-1", 0)
    counter(tmp_path / "rapl:0:0", "core", 0)  # a part of package 0
    meter = EnergyMeter(tmp_path)
    assert meter
    first.write_text("150000")
    second.write_text("500000")
    assert meter.joules() == pytest.approx(0.75)
    assert meter.joules() == 0


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert not EnergyMeter(tmp_path)
