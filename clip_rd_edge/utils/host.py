"""Information about the host machine: processor, memory, instruction sets, installed packages and load."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from clip_rd_edge.utils.process import SharedBlock

# Flags that determine the speed of INT8 and BF16, in /proc/cpuinfo or macOS's hw.optional, with their usual names.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx2_0": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "Neon",
    "neon": "Neon",
    "asimddp": "Neon dot product",
    "FEAT_DotProd": "Neon dot product",
    "i8mm": "Arm I8MM",
    "FEAT_I8MM": "Arm I8MM",
    "bf16": "Arm BF16",
    "FEAT_BF16": "Arm BF16",
    "sve": "SVE",
}
FAST_BF16 = {"AVX-512 BF16", "AMX BF16", "Arm BF16"}
# The distributions of ONNX Runtime, of which one is to be installed: all are the folder `onnxruntime`.
_BUILDS = ("gpu", "directml", "openvino", "qnn", "rocm", "migraphx")
ONNXRUNTIMES = ("onnxruntime", *(f"onnxruntime-{build}" for build in _BUILDS))
# The distributions of OpenCV, of which one is to be installed: all are the folder `cv2`.
OPENCVS = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")
# Implementer and part in /proc/cpuinfo, which names no processor of Arm servers.
_ARM_CORES = {
    ("0x41", "0xd0c"): "Arm Neoverse-N1",
    ("0x41", "0xd40"): "Arm Neoverse-V1",
    ("0x41", "0xd49"): "Arm Neoverse-N2",
    ("0x41", "0xd4f"): "Arm Neoverse-V2",
}
_CPUINFO = Path("/proc/cpuinfo")
_BOARD = Path("/proc/device-tree/model")
_SYSCTL = "/usr/sbin/sysctl"
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_JETSON_RELEASE = Path("/etc/nv_tegra_release")
_TIMEOUT_S = 10


def machine_name() -> str:
    """Return the processor's name and number of cores, such as `Intel(R) N100, 4 cores`."""
    cores = os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"


def system_name() -> str:
    """Return distribution, kernel and architecture."""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def memory_bytes() -> int:
    """Return the total memory of the machine, or 0 if it is unknown."""
    if os.name == "nt":
        status = (ctypes.c_uint64 * 8)(64)  # a MEMORYSTATUSEX: its size in bytes, the total memory, …
        windows: Any = ctypes
        return int(status[1]) if windows.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cores() -> int:
    """Return the number of cores available to this process; a container or `taskset` may restrict it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return the limit of CPU time in cores (`docker run --cpus`, systemd's CPUQuota), or None if there is no limit.

    It is the smallest of this process's control group and of those around it, by cgroups v2 or v1. In a container, the
    own group may be the root, whatever its path.
    """
    limits = _group_limits("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us"), "cpu.max")
    return min((quota / period for quota, period in limits if quota > 0), default=None)


def memory_limit() -> int | None:
    """Return the limit of memory in bytes of this process's control group, as `cpu_quota`; None without one."""
    limits = _group_limits("memory", ("memory.limit_in_bytes",), "memory.max")
    return min((limit for (limit,) in limits if limit < memory_bytes()), default=None)


def _group_limits(controller: str, old_files: Sequence[str], file: str) -> Iterator[list[int]]:
    """Yield the numbers in the files of cgroups v1, or in the file of v2, for this process's group and those around."""
    for line in _read(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue  # of v1, where each has groups of its own
        root, names = (_CGROUPS / controller, old_files) if controllers else (_CGROUPS, (file,))
        for group in (own := PurePosixPath(path), *own.parents):
            with suppress(OSError, ValueError):  # ValueError: a limit of "max"
                texts = [(root / str(group).lstrip("/") / name).read_text() for name in names]
                yield [int(text) for text in " ".join(texts).split()]


def instruction_sets(features: str | None = None) -> tuple[str, ...]:
    """Return which of INSTRUCTION_SETS the processor supports, as reported by the operating system.

    Args:
        features: content of /proc/cpuinfo on x86 (`flags`) and Arm (`Features`), or output of macOS's
            `sysctl hw.optional`; empty if unknown. None reads this machine's.
    """
    if features is None:
        features = _read(_CPUINFO) or _sysctl("hw.optional")
    entries = _entries(features)
    named = [value.split() for key, value in entries if key in ("flags", "Features")]  # of each core
    flags = named[0] if named else [key.rpartition(".")[2] for key, value in entries if value == "1"]
    return tuple(dict.fromkeys(name for flag, name in INSTRUCTION_SETS.items() if flag in flags))


def _entries(text: str) -> list[tuple[str, str]]:
    """Return the lines `key: value` of a report of the system."""
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    # From the metadata: importing torch for its version takes seconds. Imported here, as running a bundle needs none.
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def is_installed(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return package in installed_versions([package])


def jetson_name() -> str:
    """Return `jetson-orin` or `jetson-thor`, or an empty string on another machine.

    JetPack 6 (R36) runs on the Orin, JetPack 7 (R38) on the Thor.
    """
    if not _JETSON_RELEASE.is_file():
        return ""
    release = re.search(r"\bR(\d+)\b", _read(_JETSON_RELEASE))
    return "jetson-thor" if release and int(release[1]) >= 38 else "jetson-orin"


def cuda_capability() -> str:
    """Return the compute capability of the first NVIDIA GPU as the driver reports it, such as `8.9`, or empty."""
    capability = re.match(r"\d+\.\d+$", _of_nvidia_gpus("compute_cap"), re.MULTILINE)
    return capability[0] if capability else ""


def nvidia_gpus() -> str:
    """Return the names of the NVIDIA GPUs as the driver reports them, separated by commas, or an empty string."""
    return ", ".join(map(str.strip, _of_nvidia_gpus("name").splitlines()))


def _of_nvidia_gpus(what: str) -> str:
    return _answer_of("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader")


def _sysctl(*arguments: str) -> str:
    return _answer_of(_SYSCTL, *arguments) if platform.system() == "Darwin" else ""


def _answer_of(*command: str) -> str:
    """Return the output of a command, or nothing if it is missing, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _processor() -> str:
    # Arm boards give their name in the device tree. platform.processor() is empty on most Linux systems, and arm on
    # every new Mac.
    return (
        _read(_BOARD).rstrip("\0").strip()
        or _processor_in(_read(_CPUINFO))
        or _sysctl("-n", "machdep.cpu.brand_string").strip()
        or platform.processor()
        or platform.machine()
    )


def _processor_in(cpuinfo: str) -> str:
    """Return the name that Linux gives to a processor; on Arm, that of the cores, or their numbers; else nothing."""
    fields = _entries(cpuinfo)
    if named := [value for key, value in fields if key == "model name"]:
        return named[0]
    implementers, parts = ([value for key, value in fields if key == f"CPU {what}"] for what in ("implementer", "part"))
    cores = dict.fromkeys(zip(implementers, parts, strict=False))  # few processors have two kinds
    return " + ".join(_ARM_CORES.get(core, f"{platform.machine()} {'-'.join(core)}") for core in cores)


_STAT, _STATUS, _STATM = Path("/proc/stat"), Path("/proc/self/status"), Path("/proc/self/statm")


class BackgroundLoad:
    """Measures the CPU load of other processes since creation, to tell a busy machine from a slow model."""

    def __init__(self) -> None:
        self._busy, self._total = _cpu_ticks()
        self._own_seconds = time.process_time()

    def share(self) -> float | None:
        """Return the fraction of all cores' time used by other processes, in [0, 1]; None if it is unknown."""
        busy, total = _cpu_ticks()
        if total <= self._total:
            return None
        seconds = (total - self._total) / os.sysconf("SC_CLK_TCK")
        others = (busy - self._busy) / (total - self._total) - (time.process_time() - self._own_seconds) / seconds
        return min(max(others, 0.0), 1.0)


def _cpu_ticks() -> tuple[int, int]:
    """Return busy time (including time stolen by a hypervisor) and total time of all cores since boot, in ticks."""
    if not _STAT.is_file():
        return 0, 0
    user, nice, system, idle, iowait, *others = map(int, _read(_STAT).split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + iowait


def resident_memory_bytes() -> int | None:
    """Return the memory of this process that is in use now, or None if it is unknown."""
    if not _STATM.is_file():
        return None
    return int(_read(_STATM).split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int | None:
    """Return the peak memory of this process, or None if it is unknown."""
    # VmHWM is preferred to ru_maxrss, which on Linux includes the parent's memory at the time of the fork.
    for line in _read(_STATUS).splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


# Parameters of glibc's `mallopt`. Once one is set, glibc adapts its thresholds no more: in the end they get the values
# that it reaches by itself in a process with large tensors.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_ADAPTED = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65_536}


@contextmanager
def _kept() -> Iterator[None]:
    glibc = _glibc()
    if glibc is not None:
        glibc.mallopt(_MMAP_MAX, 0)
        glibc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        return_freed_memory()


# Within the block, memory that is freed stays with the process. A training step frees tens of megabytes, and each of
# their pages costs an interruption and a page of zeros when the next step asks for it again. The C library alone
# decides so: with another than glibc, or another allocator, nothing changes.
FREED_MEMORY_KEPT = SharedBlock(_kept)


def return_freed_memory() -> None:
    """Give free memory back to the system, now and later, in a process forked from one that keeps it."""
    glibc = _glibc()
    if glibc is not None:
        for parameter, value in _ADAPTED.items():
            glibc.mallopt(parameter, value)
        glibc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library if it is glibc, whose `mallopt` counts its parameters from -1; None for others."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "gnu_get_libc_version") else None
