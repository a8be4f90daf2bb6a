"""Energy of the processor by Intel's and AMD's own counters (RAPL), where the system lets them be read."""

from __future__ import annotations

from pathlib import Path

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
