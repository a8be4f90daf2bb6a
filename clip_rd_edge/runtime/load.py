"""From a bundle's folder to an encoder."""

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
    """Open a bundle. Neither tower is loaded before it is first asked for.

    Args:
        bundle: the folder.
        threads: threads a tower runs on; None leaves it to the runtime, which takes every core.
        runtime: what runs it; None takes what the bundle was exported for, and for engines that cannot run here the
            ONNX files that they came from.
        device: what ONNX Runtime computes on, one of `providers.DEVICES`; `auto` takes a CUDA card where its package is
            installed, and the CPU otherwise and for INT8. `describe().device` tells what was taken.
        spin: False for many pictures in ONNX Runtime: see `ort.open_session`.

    Raises:
        InputError, ConfigError: it is no bundle, incomplete, or of a newer format.
        UsageError: there is no such runtime, or no such device here.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"There is no runtime {runtime!r}; there are {', '.join(RUNTIMES)}.")
    return encoder_of(folder, manifest, threads=threads, runtime=runtime, device=device, spin=spin)


def encoder_of(
    folder: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    runtime: Runtime | None = None,
    device: str = AUTO,
    spin: bool = True,
) -> BundleEncoder:
    """As `load`, of a bundle whose manifest has been read."""
    # A device other than the CPU is ONNX Runtime's to serve, whatever the bundle was exported for.
    meant = runtime or ("onnxruntime" if device not in (AUTO, "cpu") else manifest.target)
    if meant == "openvino":
        from clip_rd_edge.runtime.backends.openvino import OpenVinoEncoder

        return OpenVinoEncoder(folder, manifest, threads=threads)
    if meant == "tensorrt" or (meant.startswith("tensorrt") and device == AUTO):
        from clip_rd_edge.runtime.backends.tensorrt import TensorRtEncoder

        return TensorRtEncoder(folder, manifest, threads=threads, required=runtime is not None)
    from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder

    return OrtEncoder(folder, manifest, threads=threads, device=device, spin=spin)
