"""Open a bundle as an encoder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from clip_rd_edge.contract.bundle import Manifest, read_manifest
from clip_rd_edge.errors import UsageError
from clip_rd_edge.runtime.backends.providers import AUTO
from clip_rd_edge.runtime.encoder import BundleEncoder

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
    """Open a bundle. Each tower is loaded when it is first used.

    Args:
        bundle: the bundle's folder.
        threads: threads per tower; None leaves the choice to the runtime, which uses every core.
        runtime: the inference engine; None uses the one that the bundle was exported for. If its TensorRT engines
            cannot run here, the ONNX files that they were built from run on the CPU.
        device: ONNX Runtime's device, one of `providers.DEVICES`. `auto` chooses a GPU or OpenVINO if ONNX Runtime's
            package for it is installed, and the CPU otherwise and for INT8. `describe().device` is the device chosen.
        spin: False for embedding many images in ONNX Runtime: see `backends.onnxruntime.open_session`.

    Raises:
        InputError, ConfigError: the folder is not a bundle, is incomplete, or has a newer format.
        UsageError: the runtime is unknown, or the device is not available here.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
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
    # A device other than the CPU is a device of ONNX Runtime, whatever the bundle was exported for.
    engine = runtime or ("onnxruntime" if device not in (AUTO, "cpu") else manifest.target)
    if engine == "openvino":
        from clip_rd_edge.runtime.backends.openvino import OpenVinoEncoder

        return OpenVinoEncoder(folder, manifest, threads=threads)
    if engine == "tensorrt" or (engine.startswith("tensorrt") and device == AUTO):
        from clip_rd_edge.runtime.backends.tensorrt import TensorRtEncoder

        return TensorRtEncoder(folder, manifest, threads=threads, required=runtime is not None)
    from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder

    return OrtEncoder(folder, manifest, threads=threads, device=device, spin=spin)
