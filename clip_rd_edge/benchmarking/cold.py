"""Cold start and memory: what a process of its own takes to its first answer."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.contract.images import ImageFile

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
