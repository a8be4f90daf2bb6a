"""What a measurement was made on, in a few words."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

# Flags of /proc/cpuinfo that decide how fast INT8 and BF16 are, by the names that people use.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "Neon",
    "asimddp": "Neon dot product",
    "i8mm": "Arm I8MM",
    "bf16": "Arm BF16",
    "sve": "SVE",
}
# The same as macOS names them, below hw.optional.
_MACOS_INSTRUCTION_SETS = {
    "avx2_0": "AVX2",
    "avx512f": "AVX-512",
    "neon": "Neon",
    "FEAT_DotProd": "Neon dot product",
    "FEAT_I8MM": "Arm I8MM",
    "FEAT_BF16": "Arm BF16",
}
_CPUINFO = Path("/proc/cpuinfo")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def machine_name() -> str:
    """The processor's name and number of cores, such as `Intel(R) N100, 4 cores`."""
    cores = os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"


def system_name() -> str:
    """Distribution, kernel and architecture."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{name}, {kernel}" if name else kernel


def memory_bytes() -> int:
    """Memory of the whole machine, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0


def usable_cores() -> int:
    """Cores that this process may run on: a container or `taskset` may leave it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(text: str | None = None) -> float | None:
    """Cores whose time the container gets in all, or None where it is not limited; `docker run --cpus` sets it.

    Args:
        text: of the control group's cpu.max; None reads this process's.
    """
    if text is None:
        text = _CPU_MAX.read_text() if _CPU_MAX.is_file() else ""
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def instruction_sets(features: str | None = None) -> tuple[str, ...]:
    """The INSTRUCTION_SETS that the processor has, by what the system says of it.

    Args:
        features: the text of /proc/cpuinfo, on x86 (`flags`) and Arm (`Features`), or of macOS's `sysctl hw.optional`;
            None reads this machine's. Empty where the system tells nothing.
    """
    if features is None:
        features = _features()
    lines = [line.partition(":") for line in features.splitlines()]
    for key, _, value in lines:
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
    has = {key.strip().removeprefix("hw.optional.").removeprefix("arm.") for key, _, on in lines if on.strip() == "1"}
    return tuple(name for flag, name in _MACOS_INSTRUCTION_SETS.items() if flag in has)


def _features() -> str:
    if _CPUINFO.is_file():
        return _CPUINFO.read_text(errors="replace")
    if platform.system() == "Darwin":
        said = subprocess.run(["/usr/sbin/sysctl", "hw.optional"], capture_output=True, text=True, check=False)
        return said.stdout
    return ""


def _processor() -> str:
    # platform.processor() is empty on most Linux systems; boards with Arm cores name themselves in the device tree.
    model = Path("/proc/device-tree/model")
    if model.is_file():
        return model.read_text(errors="replace").rstrip("\0").strip()
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
