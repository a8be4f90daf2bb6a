"""Check this machine: what can run bundles here, what is missing, and the pip command that installs it.

Imports nothing heavy except ONNX Runtime, for its providers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.bundle.formats import FORMATS
from clip_rd_edge.errors import PACKAGE, in_one_line, install_command, pip
from clip_rd_edge.runtime.backends.onnxruntime import (
    OPENVINO_PROCESSORS,
    PROVIDERS,
    choose_device,
    import_onnxruntime,
    overlapping_builds,
)
from clip_rd_edge.runtime.encoder import AUTO
from clip_rd_edge.utils.host import (
    FAST_BF16,
    ONNXRUNTIMES,
    OPENCVS,
    cpu_quota,
    instruction_sets,
    is_installed,
    jetson_name,
    machine_name,
    memory_bytes,
    system_name,
    usable_cores,
)

# What each extra is for. Extras without an entry are listed, too.
EXTRAS = {
    "train": "distilling, exporting, and evaluating models that are not bundles",
    "emoji": "data set and teacher of the quickstart",
    "everyday": "the built-in model, where there is no PyTorch to make it",
    "demo": "the page of demo (segno: only for the QR code of demo --host)",
    "serve": "serving bundles to other programs",
    "camera": "classify --camera",
    "remote": "shards in object stores and on web servers",
    "parquet": "tables of pairs in Parquet",
    "usearch": "searching a million images and more",
    "ray": "embed and index on a Ray cluster",
    "wandb": "distill --report-to wandb",
    "torch-tensorrt": "export --via torch-tensorrt, which needs the target GPU and a CUDA build of torch",
    **{extra: purpose for info in FORMATS.values() for extra, purpose in info.extras.items()},
}
_NOT_LISTED = {"all", "dev", "docs"}
# JetPack 6 has CUDA 12, whose driver runs no later major version; JetPack 7 has CUDA 13.
_CUDA_BINDINGS = {"jetson-orin": "cuda-bindings<13", "jetson-thor": "cuda-bindings>=13"}
_ONNXRUNTIME_GPU = '"onnxruntime-gpu[cuda,cudnn]"'  # the extras bring the libraries of CUDA and cuDNN
_FAST_INT8 = {"AVX-VNNI", "AVX-512 VNNI", "AMX INT8", "Neon dot product", "Arm I8MM"}


State = Literal["ok", "missing", "broken"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check.

    Attributes:
        what: the subject of the check, in a word or two.
        state: `ok`; `missing` for an optional dependency that is not installed, or a device for bundles that
            does not start; `broken` if no bundle can run.
        detail: what was found.
        remedy: the command that fixes it, or empty.
    """

    what: str
    state: State
    detail: str
    remedy: str = ""

    @property
    def is_extra(self) -> bool:
        """Whether it is about optional packages, which are missing unless one asks for them."""
        return self.what.startswith("[")


def examine() -> list[Finding]:
    """Check the processor, threads, ONNX Runtime, GPU and installed packages."""
    memory = f", {memory_bytes() / 1e9:.0f} GB of memory" if memory_bytes() else ""
    return [
        Finding(what="machine", state="ok", detail=f"{machine_name()}{memory}"),
        Finding(what="system", state="ok", detail=f"{system_name()}, Python {platform.python_version()}"),
        _processor(instruction_sets()),
        _threads(usable_cores(), os.cpu_count() or 1),
        _onnxruntime(),
        *_openvino(),
        _gpu(),
        *(_extra(name, packages) for name, packages in extras().items()),
    ]


def extras() -> dict[str, list[str]]:
    """Return the packages that each extra adds, from the installed metadata of clip-rd-edge."""
    packages: dict[str, dict[str, None]] = {}  # as sets in order: some have a line for each range of Python's versions
    for line in requires(PACKAGE) or []:
        requirement, _, marker = line.partition(";")
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)", marker)
        system = re.search(r"sys_platform ([!=]=) ['\"](\w+)", marker)
        if name and (system is None or (system[1] == "==") == (system[2] == sys.platform)):
            packages.setdefault(extra[1] if extra else "", {})[name[0]] = None
    # Every installation has these, ONNX Runtime perhaps in another build, which has a name of its own.
    always = packages.pop("", {})
    own = {extra: [name for name in names if name not in always] for extra, names in packages.items()}
    return {extra: names for extra, names in own.items() if names and extra not in _NOT_LISTED}


def _processor(features: tuple[str, ...]) -> Finding:
    if not features:
        return Finding(what="processor", state="ok", detail="the system does not report its instruction sets")
    fast = [name for name in features if name in _FAST_INT8]
    int8 = f"INT8 is fast ({fast[-1]})" if fast else "INT8 may be no faster than float32: no VNNI, AMX or dot product"
    bf16 = "bfloat16 in hardware" if FAST_BF16 & set(features) else "no bfloat16 in hardware"
    return Finding(what="processor", state="ok", detail=f"{', '.join(features)}: {int8}; {bf16}")


def _threads(usable: int, cores: int) -> Finding:
    detail = f"{usable} of {cores} cores are usable" if usable < cores else f"{cores} cores"
    if (quota := cpu_quota()) is not None and quota < usable:
        detail += f", limited to the time of {quota:g}: run bundles with --threads {max(1, int(quota))}"
    # ONNX Runtime's own thread pool ignores the variable; the libraries of numpy and torch read it.
    if omp_threads := os.environ.get("OMP_NUM_THREADS"):
        detail += f"; OMP_NUM_THREADS={omp_threads} applies to numpy and torch, --threads to bundles"
    return Finding(what="threads", state="ok", detail=detail)


def _onnxruntime() -> Finding:
    try:
        from clip_rd_edge.runtime.backends.onnxruntime import PRODUCT, RIGHT_SUMS, start_failure, wrong_sums

        ort = import_onnxruntime()
        available = ort.get_available_providers()
        fault = wrong_sums()
    except Exception as error:  # noqa: BLE001 — any reason why it does not run is the finding
        detail = in_one_line(error).removeprefix("ONNX Runtime ")
        return Finding(what="ONNX Runtime", state="broken", detail=detail, remedy=getattr(error, "hint", ""))
    hidden = set(OPENVINO_PROCESSORS) - {"openvino"}  # that the provider is here says nothing of a GPU or NPU
    devices = [name for name, provider in PROVIDERS.items() if provider.name in available and name not in hidden]
    # The list has what is compiled in; drivers and libraries are looked for when a session starts.
    failures = {name: reason for name in devices if name != "cpu" and (reason := start_failure(PRODUCT, name))}
    starting = [name for name in devices if name not in failures]
    chosen = choose_device(AUTO, available, precision="fp32")
    default = "cpu" if chosen in failures else chosen
    detail = f"{ort.__version__} for {', '.join(starting)}; bundles run on {default}"
    if default != "cpu":
        detail += " (INT8 on cpu)"
    others = [name for name in starting if name not in ("cpu", default)]
    if others:
        detail += f"; --device also takes {', '.join(others)}"
    detail += "".join(f"; {name} does not start: {reason}" for name, reason in failures.items())
    remedy = f"{pip('install')} {_ONNXRUNTIME_GPU}" if "cuda" in failures and _has_nvidia_driver() else ""
    if fault:
        package = next((name for name in ONNXRUNTIMES if is_installed(name)), ONNXRUNTIMES[0])
        detail, remedy = f"{detail}. {fault}", f'{pip("install")} "{package}{RIGHT_SUMS}"'
    if overlap := overlapping_builds():
        detail, remedy = f"{detail}. {overlap[0]}", overlap[1]
    state: State = "missing" if chosen in failures or (overlap and default == "cpu") else "ok"
    return Finding(what="ONNX Runtime", state=state, detail=detail, remedy=remedy)


def _openvino() -> list[Finding]:
    if not is_installed("openvino"):
        return []
    try:
        from clip_rd_edge.runtime.backends.openvino import available_processors

        available = available_processors()
    except Exception as error:  # noqa: BLE001 — any reason why it does not load is the finding
        detail = f"cannot be imported: {in_one_line(error)}"
        return [Finding(what="OpenVINO", state="missing", detail=detail, remedy=f"{pip('install')} -U openvino")]
    devices = [name for name, processor in OPENVINO_PROCESSORS.items() if processor in available]
    detail = f"{version('openvino')} for {', '.join(available)}: --device {' or '.join(devices)}"
    return [Finding(what="OpenVINO", state="ok", detail=detail)]


def _gpu() -> Finding:
    remedy = ""
    if jetson := jetson_name():
        requirement = _CUDA_BINDINGS[jetson]
        detail = f"NVIDIA Jetson: see clip-rd-edge targets {jetson}"
        older = version("cuda-bindings").startswith("12.") if is_installed("cuda-bindings") else None
        if older != requirement.endswith("<13"):
            remedy = f"{pip('install')} '{requirement}'  # {EXTRAS['tensorrt']}; TensorRT comes with JetPack"
    elif _has_nvidia_driver():
        detail = "NVIDIA: trains if torch supports it; runs bundles with onnxruntime-gpu or as engines ([rtx])"
        if not is_installed("onnxruntime-gpu"):
            remedy = f"{pip('uninstall')} -y onnxruntime && {pip('install')} {_ONNXRUNTIME_GPU}"
            remedy += "  # runs float32 bundles on the GPU"
    else:
        detail = "no usable GPU"
    return Finding(what="GPU", state="ok", detail=detail, remedy=remedy)


def _has_nvidia_driver() -> bool:
    """Return whether this machine has NVIDIA's driver, and is not a Jetson, whose libraries come with JetPack."""
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").is_file()
    return bool(driver) and not jetson_name()


def _extra(name: str, packages: list[str]) -> Finding:
    missing = [name for name in packages if not (is_installed(name) or (name in OPENCVS and find_spec("cv2")))]
    return Finding(
        what=f"[{name}]",
        state="missing" if missing else "ok",
        detail=f"{EXTRAS.get(name, '')}: {'needs ' + ', '.join(missing) if missing else 'installed'}",
        remedy=install_command(name) if missing else "",
    )
