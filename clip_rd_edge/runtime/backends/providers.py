"""The devices that `load(device=…)` takes: execution providers of ONNX Runtime, three of them of OpenVINO as well.

Does not import ONNX Runtime at the top, so that the command line can list the devices in its help quickly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from clip_rd_edge.errors import UsageError
from clip_rd_edge.installation import install_command
from clip_rd_edge.settings.deploying import Device
from clip_rd_edge.utils.text import printable

AUTO = "auto"


class Provider(NamedTuple):
    """An execution provider of ONNX Runtime.

    Attributes:
        name: ONNX Runtime's name for it.
        options: returns its options, given a cache folder and a number of threads.
        package: the package that contains it; empty where OpenVINO without ONNX Runtime serves the device better.
        needs: what it needs on the machine beside its package.
    """

    name: str
    options: Callable[[Path, int | None], dict[str, str]]
    package: str
    needs: str = ""


def _no_options(cache: Path, threads: int | None) -> dict[str, str]:
    return {}


def _openvino_cpu(cache: Path, threads: int | None) -> dict[str, str]:
    return {"device_type": "CPU", **({"num_of_threads": str(threads)} if threads else {})}


# OpenVINO's processors, by the name of the device. The package openvino runs on them without ONNX Runtime, too.
OPENVINO_PROCESSORS = {"openvino": "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", _no_options, "onnxruntime"),
    # The default, an exhaustive search, takes seconds for each new batch size.
    "cuda": Provider(
        "CUDAExecutionProvider",
        lambda cache, threads: {"cudnn_conv_algo_search": "HEURISTIC"},
        "onnxruntime-gpu",
        "NVIDIA's driver, CUDA and cuDNN",
    ),
    # Builds an engine when a tower is opened, which takes minutes the first time.
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        lambda cache, threads: {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        },
        "onnxruntime-gpu",
        "NVIDIA's driver, CUDA, cuDNN and TensorRT",
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider", lambda cache, threads: {"ModelFormat": "MLProgram"}, "onnxruntime on a Mac"
    ),
    # onnxruntime-openvino ends at 1.24, which gets sums of INT8 wrong on processors with AMX.
    "openvino": Provider("OpenVINOExecutionProvider", _openvino_cpu, ""),
    # Both compile a tower when it is opened, which takes seconds the first time.
    "openvino-gpu": Provider(
        "OpenVINOExecutionProvider",
        lambda cache, threads: {"device_type": "GPU", "cache_dir": str(cache)},
        "",
    ),
    "openvino-npu": Provider(
        "OpenVINOExecutionProvider",
        lambda cache, threads: {"device_type": "NPU", "cache_dir": str(cache)},
        "",
    ),
    "xnnpack": Provider(
        "XnnpackExecutionProvider",
        lambda cache, threads: {"intra_op_num_threads": str(threads)} if threads else {},
        "a build of onnxruntime with XNNPACK",
    ),
}
# What `auto` prefers to the CPU: devices that need a package of their own and that start at once. Others have to be
# requested by name: CoreML is in every Mac's package, compiles a tower each time it is opened and rounds to float16;
# TensorRT takes minutes at first; XNNPACK supports float32 only.
_PREFERRED = ("cuda", "openvino")
DEVICES: tuple[str, ...] = get_args(Device)
# Those that keep what they compiled. TensorRT's provider finds an engine again by the model's file name and structure,
# which two trainings of one student share: each model needs a folder of its own.
KEEP_ENGINES = ("tensorrt", "openvino-gpu", "openvino-npu")


def choose_device(device: str, available: Sequence[str], *, precision: str) -> str:
    """Return the device to open a tower on.

    Args:
        device: one of DEVICES.
        available: names of the providers that this ONNX Runtime has.
        precision: the tower's precision. INT8 is chosen for its speed on the CPU, so `auto` keeps it there.
    """
    supported = [name for name, provider in PROVIDERS.items() if provider.name in available]
    if device == AUTO:
        preferred = () if precision.startswith("int8") else _PREFERRED
        return next((name for name in preferred if name in supported), "cpu")
    if device not in PROVIDERS:
        raise UsageError(f"Unknown device {device!r}; expected one of {', '.join(DEVICES)}.")
    if device not in supported:
        from clip_rd_edge.runtime.backends.onnxruntime_builds import overlapping_builds

        package, fault, hint = PROVIDERS[device].package, "", ""
        if (overlap := overlapping_builds()) and overlap.build in (package, f"onnxruntime-{device.partition('-')[0]}"):
            fault, hint = f": {overlap.fault}", overlap.remedy
        replaces = " in place of onnxruntime" if package.startswith("onnxruntime-") else ""
        raise UsageError(
            f"This ONNX Runtime has no provider for {device}; it has {', '.join(supported) or 'no known one'}{fault}.",
            hint=hint or (f"install {package}{replaces}" if package else install_command("openvino")),
        )
    return device


def provider_list(device: str, *, cache: Path, threads: int | None) -> list[tuple[str, dict[str, str]]]:
    """Return the `providers` argument of InferenceSession; the CPU comes last, for operators that others lack.

    Args:
        cache: folder for the engines of this model that are built on this machine.
    """
    names = {"cpu": ("cpu",), "tensorrt": ("tensorrt", "cuda", "cpu")}.get(device, (device, "cpu"))
    return [(PROVIDERS[name].name, PROVIDERS[name].options(cache, threads)) for name in names]


def session_device(session: Any, requested: str) -> str:
    """Return the device that a session uses first; ONNX Runtime falls back silently if a provider fails to start.

    Args:
        requested: the device that it was opened for: several can have the same provider.
    """
    first = session.get_providers()[0]
    if PROVIDERS[requested].name == first:
        return requested
    return next((name for name, provider in PROVIDERS.items() if provider.name == first), first)


def warn(message: str) -> None:
    """Log a warning for the user: on stderr unless logging is configured otherwise."""
    logging.getLogger("clip_rd_edge").warning("%s", printable(message))
