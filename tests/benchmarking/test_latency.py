from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.api.models import first_answer
from clip_rd_edge.benchmarking.latency import (
    BATCHES,
    measure_cold_start,
    measure_latencies,
    measure_throughput,
    percentiles,
)
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import preprocess


def test_each_tower_and_end_to_end_latency(make_encoder: Callable[..., Any], squares: dict[str, Path]) -> None:
    slow, fast = make_encoder(), make_encoder()
    plain, layouts = slow.encode_pixels, []

    def encode_slowly(pixels: np.ndarray) -> np.ndarray:
        layouts.append((pixels.shape, pixels.strides))
        time.sleep(0.02)
        return plain(pixels)

    slow.encode_pixels = encode_slowly
    measured = measure_latencies({"slow": slow, "fast": fast}, squares["red"], threads=1, rounds=6).rows
    stacked = np.stack([preprocess(open_image(squares["red"]), slow.describe().preprocessing)])
    assert set(layouts) == {((1, 3, 8, 8), stacked.strides)}
    assert measured["slow"].image.p50 >= 20 > measured["fast"].image.p50
    assert measured["slow"].end_to_end.p50 >= 20
    assert measured["slow"].text.p50 < 20
    assert measured["slow"].image.p95 >= measured["slow"].image.p50
    assert (measured["fast"].rounds, measured["fast"].threads) == (6, 1)


def test_the_interval_of_a_quantile_covers_the_differences_between_timing_blocks() -> None:
    """The calls of a block resemble each other: ten blocks of alike calls say no more than ten calls."""
    rng = np.random.default_rng(0)
    levels = 10 + np.arange(10)  # ms: the machine was slower from block to block
    alike = percentiles([level + rng.normal(0, 0.01, 50) for level in levels])
    mixed = percentiles(np.split(rng.permutation(np.repeat(levels, 50)) + rng.normal(0, 0.01, 500), 10))
    assert alike.p50 == pytest.approx(mixed.p50, abs=0.6)
    assert alike.p50_interval is not None
    assert mixed.p50_interval is not None
    assert alike.p50_interval.high - alike.p50_interval.low > 3
    assert mixed.p50_interval.high - mixed.p50_interval.low < 2


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
    monkeypatch.setattr("clip_rd_edge.benchmarking.latency._MAX_RUN_SECONDS", 0.01)
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
