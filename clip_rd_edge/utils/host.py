"""Information about the host machine: processor, memory, instruction sets, installed packages and load."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from clip_rd_edge.utils.process import SharedBlock

# Flags in /proc/cpuinfo that determine the speed of INT8 and BF16, and their usual names.
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
# Their names on macOS, under hw.optional.
_MACOS_INSTRUCTION_SETS = {
    "avx2_0": "AVX2",
    "avx512f": "AVX-512",
    "neon": "Neon",
    "FEAT_DotProd": "Neon dot product",
    "FEAT_I8MM": "Arm I8MM",
    "FEAT_BF16": "Arm BF16",
}
# The distributions of ONNX Runtime, of which one is to be installed: all are the folder `onnxruntime`.
ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)
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
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{name}, {kernel}" if name else kernel


def memory_bytes() -> int:
    """Return the total memory of the machine, or 0 if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return _windows_memory()


def usable_cores() -> int:
    """Return the number of cores available to this process; a container or `taskset` may restrict it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(text: str | None = None) -> float | None:
    """Return the limit of CPU time in cores (`docker run --cpus`, systemd's CPUQuota), or None if there is no limit.

    Args:
        text: content of a control group's cpu.max; None reads those of this process, of which the smallest counts.
    """
    limits = [limit.strip().partition(" ") for limit in (_cpu_limits() if text is None else [text])]
    return min((int(q) / int(period) for q, _, period in limits if q.isdigit() and period.isdigit()), default=None)


def _cpu_limits() -> Iterator[str]:
    """Yield cpu.max of this process's control group and of those around it; what cgroups v1 have for it, in its form.

    In a container, the own group may be the root, whatever its path says.
    """
    for line in _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = _CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        for group in (own := PurePosixPath(path), *own.parents):
            with suppress(OSError):
                yield " ".join((root / str(group).lstrip("/") / name).read_text().strip() for name in names)


def instruction_sets(features: str | None = None) -> tuple[str, ...]:
    """Return which of INSTRUCTION_SETS the processor supports, as reported by the operating system.

    Args:
        features: content of /proc/cpuinfo on x86 (`flags`) and Arm (`Features`), or output of macOS's
            `sysctl hw.optional`; empty if unknown. None reads this machine's.
    """
    if features is None:
        features = _features()
    lines = [line.partition(":") for line in features.splitlines()]
    for key, _, value in lines:
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
    enabled = {key.strip() for key, _, value in lines if value.strip() == "1"}
    flags = {key.removeprefix("hw.optional.").removeprefix("arm.") for key in enabled}
    return tuple(name for flag, name in _MACOS_INSTRUCTION_SETS.items() if flag in flags)


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    # Read from the metadata: importing torch for its version takes seconds, and a device does not have it. Imported
    # here, as a device that only runs a bundle has no use for it.
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def is_installed(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return package in installed_versions([package])


def is_running(process: int) -> bool | None:
    """Return whether a process of this machine runs; None on Windows, where asking would send it a signal.

    One that has ended does not run, although it is listed until its parent has looked for it.
    """
    if os.name == "nt":
        return None
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self/stat").is_file():
            return False
    else:
        return state not in "ZX"
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def jetson_name() -> str:
    """Return `jetson-orin` or `jetson-thor`, or an empty string on another machine.

    JetPack 6 (R36) runs on the Orin, JetPack 7 (R38) on the Thor.
    """
    if not _JETSON_RELEASE.is_file():
        return ""
    release = re.search(r"\bR(\d+)\b", _JETSON_RELEASE.read_text(errors="replace"))
    return "jetson-thor" if release and int(release[1]) >= 38 else "jetson-orin"


def cuda_capability() -> str:
    """Return the compute capability of the first NVIDIA GPU as the driver reports it, such as `8.9`, or empty."""
    first = next(iter(_of_nvidia_gpus("compute_cap")), "")
    return first if re.fullmatch(r"\d+\.\d+", first) else ""


def nvidia_gpus() -> str:
    """Return the names of the NVIDIA GPUs as the driver reports them, separated by commas, or an empty string."""
    return ", ".join(_of_nvidia_gpus("name"))


def _of_nvidia_gpus(what: str) -> list[str]:
    """Return what the driver says of each GPU; nothing without a driver, or with one that fails."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # no driver, or a GPU that hangs
        return []
    return [line.strip() for line in result.stdout.splitlines()] if result.returncode == 0 else []


def _features() -> str:
    if _CPUINFO.is_file():
        return _CPUINFO.read_text(errors="replace")
    return _sysctl("hw.optional")


def _sysctl(*arguments: str) -> str:
    """Return what macOS says of its hardware; nothing on other systems."""
    if platform.system() != "Darwin":
        return ""
    command = [_SYSCTL, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    # Arm boards give their name in the device tree.
    if _BOARD.is_file():
        return _BOARD.read_text(errors="replace").rstrip("\0").strip()
    named = _processor_in(_CPUINFO.read_text(errors="replace") if _CPUINFO.is_file() else "")
    # platform.processor() is empty on most Linux systems, and arm on every new Mac.
    return named or _sysctl("-n", "machdep.cpu.brand_string").strip() or platform.processor() or platform.machine()


def _processor_in(cpuinfo: str) -> str:
    """Return the name that Linux gives to a processor; on Arm, that of the cores, or their numbers; else nothing."""
    fields = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())]
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
    user, nice, system, idle, iowait, *others = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + iowait


def resident_memory_bytes() -> int | None:
    """Return the memory of this process that is in use now, or None if it is unknown."""
    if not _STATM.is_file():
        return None
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int | None:
    """Return the peak memory of this process, or None if it is unknown."""
    # VmHWM is preferred to ru_maxrss, which on Linux includes the parent's memory at the time of the fork.
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return _windows_peak()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def _windows_memory() -> int:
    """Return the total memory of a machine with Windows, or 0."""
    # MEMORYSTATUSEX: its size, the share in use, and seven numbers, of which the first is the total.
    status = struct.pack("=2I7Q", 64, *[0] * 8)
    answer = _ask_windows("GlobalMemoryStatusEx", status)
    return int(struct.unpack("=2I7Q", answer)[2]) if answer else 0


def _windows_peak() -> int | None:
    """Return the peak memory of this process on Windows, or None."""
    # PROCESS_MEMORY_COUNTERS: its size, the page faults, and eight numbers, of which the first is the peak.
    counters = struct.pack("=2I8Q", 72, *[0] * 9)
    answer = _ask_windows("K32GetProcessMemoryInfo", counters, of_process=True)
    return int(struct.unpack("=2I8Q", answer)[2]) if answer else None


def _ask_windows(function: str, content: bytes, *, of_process: bool = False) -> bytes | None:
    """Return the structure that a function of the 64-bit kernel32 fills in, given its initial content, or None."""
    import ctypes

    if not hasattr(ctypes, "WinDLL"):
        return None
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    buffer = ctypes.create_string_buffer(content, len(content))
    arguments: list[Any] = [ctypes.byref(buffer)]
    if of_process:
        arguments = [ctypes.c_void_p(kernel.GetCurrentProcess()), *arguments, ctypes.c_uint32(len(content))]
    return buffer.raw if getattr(kernel, function)(*arguments) else None


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
    """Give memory that is free back to the system, from now on, too: for a process forked from one that keeps it."""
    glibc = _glibc()
    if glibc is not None:
        for parameter, value in _ADAPTED.items():
            glibc.mallopt(parameter, value)
        glibc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library if it is glibc, whose `mallopt` counts its parameters from -1; None for others."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
