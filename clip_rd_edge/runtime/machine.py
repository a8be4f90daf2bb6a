"""What a measurement was made on, in a few words."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_name() -> str:
    """The processor's name and number of cores, such as `Intel(R) N100, 4 cores`."""
    cores = os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"


def _processor() -> str:
    # platform.processor() is empty on most Linux systems; boards with Arm cores name themselves in the device tree.
    model = Path("/proc/device-tree/model")
    if model.is_file():
        return model.read_text(errors="replace").rstrip("\0").strip()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
