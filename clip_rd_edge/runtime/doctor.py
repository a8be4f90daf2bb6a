"""What this machine can do for a bundle, what is missing, and the pip line that adds it. Imports nothing heavy but
ONNX Runtime, which is asked for its providers."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires, version
from importlib.util import cache_from_source
from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.runtime.backends.providers import AUTO, PROVIDERS, choose_device
from clip_rd_edge.utils.host import cpu_quota, instruction_sets, machine_name, memory_bytes, system_name, usable_cores

PACKAGE = "clip-rd-edge"
# What each extra is for; one that is not named here is listed all the same.
EXTRAS = {
    "train": "distil, export, evaluate models that are no bundle",
    "emoji": "the quickstart's data set and teacher",
    "demo": "the demo page",
    "camera": "classify --camera",
    "openvino": "export --format openvino, and running such bundles",
    "rtx": "export --format trt for RTX cards, and running the engines there",
    "tensorrt": "running a Jetson's engines",
}
_NOT_LISTED = {"all", "dev", "torch-tensorrt"}  # the last has a line of its own
_GREATEST = 5  # packages whose size is told
_FAST_INT8 = {"AVX-VNNI", "AVX-512 VNNI", "AMX INT8", "Neon dot product", "Arm I8MM"}
_FAST_BF16 = {"AVX-512 BF16", "AMX BF16", "Arm BF16"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        what: in a word or two.
        state: `ok`; `missing`, which something optional needs; `broken`, without which no bundle runs.
        detail: what was found.
        remedy: the command that mends it, or empty.
    """

    what: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at processor, threads, ONNX Runtime, GPU and packages."""
    memory = f", {memory_bytes() / 1e9:.0f} GB of memory" if memory_bytes() else ""
    return [
        Finding(what="machine", state="ok", detail=f"{machine_name()}{memory}"),
        Finding(what="system", state="ok", detail=f"{system_name()}, Python {platform.python_version()}"),
        _processor(instruction_sets()),
        _threads(usable_cores(), os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS"), cpu_quota()),
        _onnxruntime(),
        _gpu(),
        _room(footprints(PACKAGE)),
        *(_extra(name, packages) for name, packages in extras().items()),
        _torch_tensorrt(),
    ]


def extras() -> dict[str, list[str]]:
    """The packages that each extra brings, by the installed metadata of clip-rd-edge."""
    found: dict[str, list[str]] = {}
    for line in requires(PACKAGE) or []:
        if match := re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", line):
            package, extra = match.groups()
            if extra not in _NOT_LISTED:
                found.setdefault(extra, []).append(package)
    return found


def _processor(sets: tuple[str, ...]) -> Finding:
    if not sets:
        return Finding(what="processor", state="ok", detail="the system does not tell its instruction sets")
    fast = [name for name in sets if name in _FAST_INT8]
    int8 = f"INT8 is fast ({fast[-1]})" if fast else "INT8 may be no faster than float32: no VNNI, AMX or dot product"
    bf16 = "bfloat16 in hardware" if _FAST_BF16 & set(sets) else "no bfloat16 in hardware"
    return Finding(what="processor", state="ok", detail=f"{', '.join(sets)}: {int8}; {bf16}")


def _threads(usable: int, cores: int, limit: str | None, quota: float | None = None) -> Finding:
    limited = f"{usable} of {cores} cores may be used" if usable < cores else f"{cores} cores"
    if quota is not None and quota < usable:
        limited += f", for the time of {quota:g} in all: --threads {max(1, int(quota))} for a bundle"
    # ONNX Runtime's own thread pool does not read the variable; numpy's and torch's libraries do.
    note = f"; OMP_NUM_THREADS={limit} holds for numpy and torch, --threads for a bundle" if limit else ""
    return Finding(what="threads", state="ok", detail=f"{limited}{note}")


def _onnxruntime() -> Finding:
    try:
        import onnxruntime as ort

        available = ort.get_available_providers()
    except Exception as error:  # noqa: BLE001 — whatever keeps it from loading is what is looked for
        detail = f"does not load: {' '.join(str(error).split())}"
        return Finding(what="ONNX Runtime", state="broken", detail=detail, remedy="pip install -U onnxruntime")
    devices = [name for name, provider in PROVIDERS.items() if provider.name in available]
    taken = choose_device(AUTO, available, precision="fp32")
    detail = f"{ort.__version__} for {', '.join(devices)}; bundles run on {taken}"
    if taken != "cpu":
        detail += ", and on cpu in INT8"
    others = [name for name in devices if name not in ("cpu", taken)]
    if others:
        detail += f"; --device takes {', '.join(others)}"
    return Finding(what="ONNX Runtime", state="ok", detail=detail)


def _gpu() -> Finding:
    remedy = ""
    if Path("/etc/nv_tegra_release").is_file():
        detail = "NVIDIA Jetson: see clip-rd-edge devices jetson-orin"
        if not _installed("cuda-bindings"):
            remedy = f"pip install cuda-bindings  # {EXTRAS['tensorrt']}; TensorRT comes with JetPack"
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").is_file():
        detail = "NVIDIA: for training where torch sees it, for bundles by onnxruntime-gpu or by engines ([rtx])"
        if not _installed("onnxruntime-gpu"):
            remedy = "pip uninstall onnxruntime && pip install onnxruntime-gpu  # float32 bundles on the card"
    else:
        detail = "none that clip-rd-edge would use"
    return Finding(what="GPU", state="ok", detail=detail, remedy=remedy)


def _room(packages: list[Footprint]) -> Finding:
    total, compiled = sum(each.size_bytes for each in packages), sum(each.compiled_bytes for each in packages)
    greatest = ", ".join(f"{each.package} {each.size_bytes / 1e6:.0f}" for each in packages[:_GREATEST])
    rest = packages[_GREATEST:]
    detail = (
        f"{total / 1e6:.0f} MB without extras: {greatest}, {len(rest)} others "
        f"{sum(each.size_bytes for each in rest) / 1e6:.0f}; {compiled / 1e6:.0f} of it is compiled Python"
    )
    return Finding(what="installed", state="ok", detail=detail)


def _torch_tensorrt() -> Finding:
    """The other way from PyTorch to TensorRT, and why it is closed here."""
    here = [package for package in ("torch-tensorrt", "torch-tensorrt-rtx") if _installed(package)]
    detail = (
        f"{' and '.join(here) or 'not installed'}: for export --via torch-tensorrt, which needs the GPU that it builds "
        "for and a CUDA build of torch; without --via, engines are built from ONNX, without a GPU ([rtx])"
    )
    return Finding(what="torch-tensorrt", state="ok", detail=detail)


def _extra(name: str, packages: list[str]) -> Finding:
    purpose = EXTRAS.get(name, "")
    missing = [package for package in packages if not _installed(package)]
    detail = f"{purpose}: {'installed' if not missing else 'needs ' + ', '.join(missing)}"
    if not missing:
        return Finding(what=f"[{name}]", state="ok", detail=detail)
    return Finding(what=f"[{name}]", state="missing", detail=detail, remedy=f"pip install '{PACKAGE}[{name}]'")


def _installed(package: str) -> bool:
    # From the metadata: importing torch to see whether it is there takes seconds.
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a package takes on disk.

    Attributes:
        size_bytes: all its files, the compiled ones, too.
        compiled_bytes: those of them that Python made of its sources, and makes again when they are missing.
    """

    package: str
    size_bytes: int
    compiled_bytes: int


def footprints(package: str) -> list[Footprint]:
    """The package and all that it needs, greatest first; what is not installed takes no room."""
    found: dict[str, Footprint] = {}
    wanted = [package]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # asked for on another system or another Python only
        found[name] = _footprint(name, installed)
        wanted += _needs(installed)
    return sorted(found.values(), key=lambda each: (-each.size_bytes, each.package))


def _needs(installed: Distribution) -> list[str]:
    """Names of the packages that it asks for whatever extras are wanted, as PEP 503 writes them."""
    names = []
    for line in installed.requires or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and (match := re.match(r"[\w.-]+", requirement)):
            names.append(re.sub(r"[-_.]+", "-", match[0]).lower())
    return names


def _footprint(name: str, installed: Distribution) -> Footprint:
    # pip lists what it compiled itself, and not what was compiled when it was first imported: looked for in both cases.
    files = [Path(str(file.locate())) for file in installed.files or [] if file.suffix != ".pyc"]
    compiled = sum(_size(Path(cache_from_source(str(file)))) for file in files if file.suffix == ".py")
    return Footprint(package=name, size_bytes=sum(map(_size, files)) + compiled, compiled_bytes=compiled)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
