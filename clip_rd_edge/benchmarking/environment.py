"""What a measurement was made on, as data: latencies mean nothing without it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from clip_rd_edge.utils.host import instruction_sets, machine_name, memory_bytes, system_name

PACKAGES = (
    "clip-rd-edge",
    "onnxruntime",
    "openvino",
    "nncf",
    "torch",
    "open_clip_torch",
    "timm",
    "numpy",
    "pillow",
    "tokenizers",
)


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
        instruction_sets=instruction_sets(),
        memory_bytes=memory_bytes(),
        system=system_name(),
        python=platform.python_version(),
        packages=installed_versions(PACKAGES),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
    )


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    # From the metadata: importing torch to ask for its version takes seconds, and a device has none.
    found = {}
    for package in packages:
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
