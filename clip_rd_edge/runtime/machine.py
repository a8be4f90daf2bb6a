"""What a measurement was made on, in a few words."""

from __future__ import annotations

import os
import platform
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
_CPUINFO = Path("/proc/cpuinfo")


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


def instruction_sets(cpuinfo: str | None = None) -> tuple[str, ...]:
    """The INSTRUCTION_SETS that the text of /proc/cpuinfo names, on x86 (`flags`) and Arm (`Features`).

    Args:
        cpuinfo: the text; None reads this machine's. Empty where the system tells nothing.
    """
    if cpuinfo is None:
        cpuinfo = _CPUINFO.read_text(errors="replace") if _CPUINFO.is_file() else ""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
    return ()


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
