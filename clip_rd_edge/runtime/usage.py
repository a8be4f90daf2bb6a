"""What this process and the others take of the machine."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

_STAT, _STATUS = Path("/proc/stat"), Path("/proc/self/status")


class OtherLoad:
    """What other processes take of the machine from now on, so that a busy machine is told from a slow model."""

    def __init__(self) -> None:
        self._busy, self._all = _jiffies()
        self._own = time.process_time()

    def share(self) -> float | None:
        """Part of all cores' time that others took, in [0, 1]; None where the system does not tell."""
        busy, everything = _jiffies()
        if everything <= self._all:
            return None
        seconds = (everything - self._all) / os.sysconf("SC_CLK_TCK")
        others = (busy - self._busy) / (everything - self._all) - (time.process_time() - self._own) / seconds
        return min(max(others, 0.0), 1.0)


def _jiffies() -> tuple[int, int]:
    """Time that the cores worked or were taken away by a hypervisor, and all time, since the machine started."""
    if not _STAT.is_file():
        return 0, 0
    user, nice, system, idle, waiting, *others = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + waiting


def peak_memory_bytes() -> int | None:
    """The most memory that this process held at once; None where the system does not tell."""
    # Not ru_maxrss first: on Linux it counts what the parent held when it started this process.
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
