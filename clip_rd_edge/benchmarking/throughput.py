"""Energy of the processor by Intel's and AMD's own counters (RAPL), where the system lets them be read."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.contract.images import ImageFile
from clip_rd_edge.utils.timing import time_in_turn

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules that the processor's packages take; all that runs on them counts.

    Args:
        folder: where Linux shows the counters.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._counters = [_Counter(path) for path in sorted(folder.glob("*/energy_uj")) if _is_package(path)]

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._counters)

    def joules(self) -> float:
        """Energy since the last call, or since the meter was made."""
        return sum(counter.microjoules() for counter in self._counters) / 1e6


class _Counter:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._range = int((path.parent / "max_energy_range_uj").read_text())
        self._last = int(path.read_text())

    def microjoules(self) -> int:
        now = int(self._path.read_text())
        passed = (now - self._last) % (self._range + 1)  # it begins again at 0
        self._last = now
        return passed


def _is_package(counter: Path) -> bool:
    """Whether it counts a whole package and may be read: many systems keep it for root."""
    try:
        return (counter.parent / "name").read_text().startswith("package") and counter.read_text().strip().isdigit()
    except OSError:
        return False


BATCHES = (8, 32)  # beside 1, which is the latency
_ROUNDS, _MAX_SECONDS, _ENERGY_SECONDS = 7, 10.0, 2.0
Pixels = npt.NDArray[np.float32]


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Pictures a second that an image tower embeds when it is given `batch` at once; the median of some calls."""

    batch: int
    images_per_second: float


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
            found[label].append(Throughput(batch=batch, images_per_second=per_second))
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


# The command of a process that opens a model (its name, its runtime, its threads), embeds a text and the picture whose
# path is its last word, and prints one line of JSON with `peak_memory_bytes`.
Launch = Callable[[str, Any, int], Sequence[str]]
_RUNS, _ENOUGH_SECONDS = 3, 6.0


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """A new process, with its files in the system's cache.

    Attributes:
        first_answer_s: from its launch to the embeddings of a picture and a text, importing and loading included;
            the median of `runs`.
        peak_memory_bytes: the most that it held at once; None where the system does not tell.
    """

    first_answer_s: float
    runs: int
    peak_memory_bytes: int | None


def measure_cold_start(command: Sequence[str], picture: ImageFile) -> ColdStart | None:
    """Run a command up to three times, in about six seconds at most; None where it fails."""
    seconds: list[float] = []
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "picture"  # a picture may be a part of a tar
        path.write_bytes(picture.read_bytes())
        while len(seconds) < _RUNS and sum(seconds) < _ENOUGH_SECONDS:
            answered = _answer_of([*command, str(path)])
            if answered is None:
                return None
            taken, peak = answered
            seconds.append(taken)
            peaks += [peak] if peak is not None else []
    first = float(np.median(seconds))
    return ColdStart(first_answer_s=first, runs=len(seconds), peak_memory_bytes=max(peaks, default=None))


def _answer_of(command: Sequence[str]) -> tuple[float, int | None] | None:
    """Seconds to the line that a process prints, which is before it ends, and its peak of memory."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - began
    try:
        return taken, msgspec.json.decode(line, type=_Answer).peak_memory_bytes
    except msgspec.DecodeError:
        return None


class _Answer(msgspec.Struct):
    peak_memory_bytes: int | None
