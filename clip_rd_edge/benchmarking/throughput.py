"""Throughput, energy and cold start of the models of a suite."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import TowerEncoder
from clip_rd_edge.bundle.images import ImageFile
from clip_rd_edge.utils.timing import time_in_turn

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Energy of the processor packages, from Intel's and AMD's counters (RAPL) if the system allows reading them.

    The counters include everything that runs on the processor.

    Args:
        folder: where Linux exposes the counters.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        # Intel's intel-rapl-mmio:0 counts the same package as intel-rapl:0, which comes later in order and is kept.
        paths = [path for path in sorted(folder.glob("*/energy_uj")) if _is_package(path)]
        self._counters = list({(path.parent / "name").read_text(): path for path in paths}.values())
        self._ranges = [int((path.parent / "max_energy_range_uj").read_text()) + 1 for path in self._counters]
        self._last = self._read()

    def __bool__(self) -> bool:
        """Return whether there is a readable counter."""
        return bool(self._counters)

    def joules(self) -> float:
        """Return the energy used since the last call, or since the meter was created."""
        now, before = self._read(), self._last
        self._last = now
        # Each counter wraps around to 0.
        return sum((new - old) % size for new, old, size in zip(now, before, self._ranges, strict=True)) / 1e6

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path in self._counters]


def _is_package(counter: Path) -> bool:
    """Return whether this is the counter of a whole package and can be read; on many systems only root may."""
    try:
        return (counter.parent / "name").read_text().startswith("package") and counter.read_text().strip().isdigit()
    except OSError:
        return False


BATCHES = (8, 32)  # batch 1 is the latency
_ROUNDS, _MIN_ROUNDS, _MAX_SECONDS, _ENERGY_SECONDS = 7, 3, 10.0, 2.0
Pixels = npt.NDArray[np.float32]


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Images per second in an image tower at this batch size; the median of several calls."""

    batch: int
    images_per_second: float


def measure_throughput(
    encoders: Mapping[str, TowerEncoder], pixels: Mapping[str, Pixels]
) -> dict[str, tuple[Throughput, ...]]:
    """Time all image towers in turn at each of BATCHES.

    Args:
        pixels: one preprocessed image per encoder, (1, 3, H, W).
    """
    results: dict[str, list[Throughput]] = {label: [] for label in encoders}
    for batch in BATCHES:
        calls: dict[str, Callable[[], object]] = {
            label: partial(encoder.encode_pixels, np.repeat(pixels[label], batch, axis=0))
            for label, encoder in encoders.items()
        }
        times = time_in_turn(calls, rounds=_ROUNDS, warmup=1, max_seconds=_MAX_SECONDS, min_rounds=_MIN_ROUNDS)
        for label, samples in times.items():
            rate = 1000 * batch / float(np.median(samples))
            results[label].append(Throughput(batch=batch, images_per_second=rate))
    return {label: tuple(by_batch) for label, by_batch in results.items()}


def measure_energy(
    encoders: Mapping[str, TowerEncoder], pixels: Mapping[str, Pixels], *, meter: EnergyMeter | None = None
) -> dict[str, float]:
    """Measure the energy per image of each image tower in joules of the whole processor; empty without a counter.

    Models that do not run on the CPU alone are left out: what another device takes is not in the processor's counters.
    """
    meter = EnergyMeter() if meter is None else meter
    joules = {}
    for label, encoder in encoders.items() if meter else ():
        if encoder.describe().device != "cpu":
            continue
        calls, start = 0, time.perf_counter()
        meter.joules()
        while time.perf_counter() - start < _ENERGY_SECONDS:
            encoder.encode_pixels(pixels[label])
            calls += 1
        joules[label] = meter.joules() / calls
    return joules


# Takes a model's name, runtime and number of threads. Returns the command of a process that opens the model, embeds a
# text and the image whose path is appended to the command, and prints one line of JSON with `peak_memory_bytes`.
Launch = Callable[[str, Any, int], Sequence[str]]
_MAX_RUNS, _MAX_RUN_SECONDS, _MAX_ANSWER_SECONDS = 3, 4.0, 600.0


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """Cold start of a new process, with its files already in the operating system's cache.

    Attributes:
        first_answer_s: time from launch to the embeddings of an image and a text, including imports and loading; the
            median of `runs`.
        peak_memory_bytes: peak memory of the process; None if unknown.
    """

    first_answer_s: float
    runs: int
    peak_memory_bytes: int | None


def measure_cold_start(command: Sequence[str], image: ImageFile) -> ColdStart | None:
    """Run a command up to three times, for about four seconds in total; return None if it fails or hangs."""
    seconds: list[float] = []
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"  # copied, because the image may be a member of a tar
        path.write_bytes(image.read_bytes())
        while len(seconds) < _MAX_RUNS and sum(seconds) < _MAX_RUN_SECONDS:
            answer = _time_first_answer([*command, str(path)])
            if answer is None:
                return None
            duration, peak = answer
            seconds.append(duration)
            peaks += [peak] if peak is not None else []
    median = float(np.median(seconds))
    return ColdStart(first_answer_s=median, runs=len(seconds), peak_memory_bytes=max(peaks, default=None))


def _time_first_answer(command: Sequence[str]) -> tuple[float, int | None] | None:
    """Return the seconds until a process prints its line, which is before it exits, and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    limit = threading.Timer(_MAX_ANSWER_SECONDS, process.kill)  # of a process that hangs, as in a driver
    limit.start()
    try:
        with process:
            assert process.stdout is not None
            line = process.stdout.readline()
            duration = time.perf_counter() - start
    finally:
        limit.cancel()
    try:
        return duration, msgspec.json.decode(line, type=_FirstAnswer).peak_memory_bytes
    except msgspec.DecodeError:
        return None


class _FirstAnswer(msgspec.Struct):
    peak_memory_bytes: int | None
