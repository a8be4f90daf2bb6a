"""What a measurement was made on, as data: latencies mean nothing without it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from clip_rd_edge.runtime.machine import machine_name

PACKAGES = ("clip-rd-edge", "onnxruntime", "torch", "open_clip_torch", "timm", "numpy", "pillow", "tokenizers")
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


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the software of a measurement.

    Attributes:
        machine: processor and cores.
        instruction_sets: those that matter for small numbers; empty where the system does not tell.
        memory_bytes: of the whole machine, 0 where the system does not tell.
        packages: versions of what is installed of PACKAGES.
        date: UTC, as ISO 8601.
        commit: of the checkout that the code ran from, or empty.
    """

    machine: str
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]
    date: str
    commit: str


def this_environment() -> Environment:
    """The environment of this process, now."""
    return Environment(
        machine=machine_name(),
        instruction_sets=instruction_sets(_CPUINFO.read_text(errors="replace") if _CPUINFO.is_file() else ""),
        memory_bytes=_memory_bytes(),
        system=_system(),
        python=platform.python_version(),
        packages=_versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
    )


def instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """The INSTRUCTION_SETS that the text of /proc/cpuinfo names, on x86 (`flags`) and Arm (`Features`)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
    return ()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{name}, {kernel}" if name else kernel


def _versions() -> dict[str, str]:
    # From the metadata: importing torch to ask for its version takes seconds, and a device has none.
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # an installed package may lie below somebody else's repository
        return ""
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
