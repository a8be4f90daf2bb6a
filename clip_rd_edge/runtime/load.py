"""Open a bundle as an encoder."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from clip_rd_edge.contract.bundle import Manifest, read_manifest
from clip_rd_edge.errors import UsageError
from clip_rd_edge.runtime.backends.providers import AUTO, OPENVINO_PROCESSORS, PROVIDERS
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.intact import require_intact_manifest

MAX_THREADS = 1_024  # each takes memory, and hundreds of thousands take minutes to start
Runtime = Literal["onnxruntime", "openvino", "tensorrt"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def load(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    runtime: Runtime | None = None,
    device: str = AUTO,
    spin: bool = True,
) -> BundleEncoder:
    """Open a bundle. Each tower is loaded when it is first used, and its checksum compared (see `runtime.intact`).

    Args:
        bundle: the bundle's folder.
        threads: threads per tower; None leaves the choice to the runtime, which uses every core.
        runtime: the inference engine; None uses the one that the bundle was exported for. If its TensorRT engines
            cannot run here, the ONNX files that they were built from run on the CPU.
        device: one of `providers.DEVICES`. `auto` chooses a GPU or OpenVINO if ONNX Runtime's package for it is
            installed, and the CPU otherwise, for INT8, and in OpenVINO itself. OpenVINO's devices run a bundle made for
            OpenVINO, or with `runtime="openvino"`, in OpenVINO itself, and others in ONNX Runtime, or in OpenVINO if
            only that is installed. `describe().device` is the device chosen.
        spin: False for embedding many images in ONNX Runtime: see `backends.onnxruntime.open_session`.

    Raises:
        InputError, ConfigError: the folder is not a bundle, is incomplete, has changed since the export, or has a newer
            format.
        UsageError: the runtime is unknown, the device is not available here, or `threads` is out of range.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    require_intact_manifest(folder, manifest)
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"Unknown runtime {runtime!r}; expected one of {', '.join(RUNTIMES)}.")
    return open_bundle(folder, manifest, threads=threads, runtime=runtime, device=device, spin=spin)


def open_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    runtime: Runtime | None = None,
    device: str = AUTO,
    spin: bool = True,
) -> BundleEncoder:
    """Like `load`, for a bundle whose manifest has been read already."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(
            f"The number of threads is {threads:,}; expected 1 to {MAX_THREADS:,}.",
            hint=f"this machine has {os.cpu_count()} cores",
        )
    engine = runtime or _runtime_for(device, manifest)
    if engine == "openvino":
        from clip_rd_edge.runtime.backends.openvino import CPU, OpenVinoEncoder

        if device not in (AUTO, "cpu", *OPENVINO_PROCESSORS):
            raise UsageError(
                f"OpenVINO has no device {device!r}; expected auto, cpu, {', '.join(OPENVINO_PROCESSORS)}."
            )
        return OpenVinoEncoder(folder, manifest, threads=threads, processor=OPENVINO_PROCESSORS.get(device, CPU))
    if engine == "tensorrt" or (engine.startswith("tensorrt") and device == AUTO):
        from clip_rd_edge.runtime.backends.tensorrt import TensorRtEncoder

        return TensorRtEncoder(folder, manifest, threads=threads, required=runtime is not None)
    from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder

    return OrtEncoder(folder, manifest, threads=threads, device=device, spin=spin)


def _runtime_for(device: str, manifest: Manifest) -> str:
    """Return the runtime, or the manifest's target, that opens a bundle on a device."""
    if device in (AUTO, "cpu"):
        return manifest.target
    if device in OPENVINO_PROCESSORS and (manifest.target == "openvino" or _only_openvino_itself()):
        return "openvino"
    return "onnxruntime"  # the others are its devices, whatever the bundle was exported for


def _only_openvino_itself() -> bool:
    """Return whether the package openvino is installed, and ONNX Runtime has no provider for it."""
    import onnxruntime as ort

    return bool(find_spec("openvino")) and PROVIDERS["openvino"].name not in ort.get_available_providers()
