"""What ONNX Runtime computes on: its execution providers, by the names that `load(device=…)` takes.

Imports nothing at the top, so that a command line can list the devices for its help.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clip_rd_edge.errors import UsageError

Device = Literal["auto", "cpu", "cuda", "tensorrt", "coreml", "openvino", "xnnpack"]
AUTO = "auto"


class Provider(NamedTuple):
    """ONNX Runtime's name of a provider, what it is given, and the packages that bring it."""

    name: str
    options: Callable[[Path, int | None], dict[str, str]]
    package: str


def _none(cache: Path, threads: int | None) -> dict[str, str]:
    return {}


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", _none, "onnxruntime"),
    # The exhaustive search that it makes by default takes seconds for each new size of a batch.
    "cuda": Provider(
        "CUDAExecutionProvider", lambda cache, threads: {"cudnn_conv_algo_search": "HEURISTIC"}, "onnxruntime-gpu"
    ),
    # It builds an engine when a tower is opened, which takes minutes the first time.
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        lambda cache, threads: {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        },
        "onnxruntime-gpu",
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider", lambda cache, threads: {"ModelFormat": "MLProgram"}, "onnxruntime on a Mac"
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        lambda cache, threads: {"device_type": "CPU", **({"num_of_threads": str(threads)} if threads else {})},
        "onnxruntime-openvino",
    ),
    "xnnpack": Provider(
        "XnnpackExecutionProvider",
        lambda cache, threads: {"intra_op_num_threads": str(threads)} if threads else {},
        "a build of onnxruntime with XNNPACK",
    ),
}
# What `auto` tries first: only what somebody installed a package of its own for, and what starts at once. CoreML is in
# every Mac's package, compiles a tower each time it is opened and rounds to float16; TensorRT takes minutes at first;
# XNNPACK knows float32 alone. These three have to be asked for.
_PREFERRED = ("cuda", "openvino")
DEVICES: tuple[str, ...] = (AUTO, *PROVIDERS)


def choose_device(device: str, available: Sequence[str], *, precision: str) -> str:
    """The device to open a tower on.

    Args:
        device: one of DEVICES.
        available: names of ONNX Runtime's providers here.
        precision: the tower's. INT8 was chosen by what the CPU gains from it, so that `auto` leaves it there.

    Raises:
        UsageError: there is no such device, or this ONNX Runtime has no provider for it.
    """
    here = [name for name, provider in PROVIDERS.items() if provider.name in available]
    if device == AUTO:
        wanted = () if precision.startswith("int8") else _PREFERRED
        return next((name for name in wanted if name in here), "cpu")
    if device not in PROVIDERS:
        raise UsageError(f"There is no device {device!r}; there are {', '.join(DEVICES)}.")
    if device not in here:
        package = PROVIDERS[device].package
        raise UsageError(
            f"This ONNX Runtime has no provider for {device}; it has {', '.join(here) or 'none that is known'}.",
            hint=f"what brings it: {package}, in place of onnxruntime"
            if package.startswith("onnxruntime-")
            else f"what brings it: {package}",
        )
    return device


def provider_list(device: str, *, cache: Path, threads: int | None) -> list[tuple[str, dict[str, str]]]:
    """What InferenceSession takes as `providers`; the CPU's comes last, for what the others do not know.

    Args:
        cache: a folder for engines that are built here.
    """
    names = {"cpu": ("cpu",), "tensorrt": ("tensorrt", "cuda", "cpu")}.get(device, (device, "cpu"))
    return [(PROVIDERS[name].name, PROVIDERS[name].options(cache, threads)) for name in names]


def device_of(session: Any) -> str:
    """The device that a session runs on first; ONNX Runtime falls back in silence where a provider fails to start."""
    first = session.get_providers()[0]
    return next((name for name, provider in PROVIDERS.items() if provider.name == first), first)


def say(sentence: str) -> None:
    """A sentence for whoever runs the program, on stderr unless logging is set up otherwise."""
    logger = logging.getLogger("clip_rd_edge")
    logger.setLevel(logging.WARNING)  # open_clip's loading silences the root logger
    logger.warning(sentence)
