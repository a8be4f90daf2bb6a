"""From a bundle's folder to an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clip_rd_edge.contract.bundle import Manifest, read_manifest
from clip_rd_edge.errors import UsageError
from clip_rd_edge.runtime.bundle_encoder import BundleEncoder

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")


def load(bundle: str | Path, *, threads: int | None = None, runtime: Runtime | None = None) -> BundleEncoder:
    """Open a bundle. Neither tower is loaded before it is first asked for.

    Args:
        bundle: the folder.
        threads: threads a tower runs on; None leaves it to the runtime, which takes every core.
        runtime: what runs it; None takes what the bundle was exported for.

    Raises:
        InputError, ConfigError: it is no bundle, incomplete, or of a newer format.
        UsageError: there is no such runtime.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"There is no runtime {runtime!r}; there are {', '.join(RUNTIMES)}.")
    return encoder_of(folder, manifest, threads=threads, runtime=runtime)


def encoder_of(
    folder: Path, manifest: Manifest, *, threads: int | None = None, runtime: Runtime | None = None
) -> BundleEncoder:
    """As `load`, of a bundle whose manifest has been read."""
    if (runtime or manifest.target) == "openvino":
        from clip_rd_edge.runtime.openvino import OpenVinoEncoder

        return OpenVinoEncoder(folder, manifest, threads=threads)
    from clip_rd_edge.runtime.ort import OrtEncoder

    return OrtEncoder(folder, manifest, threads=threads)
