"""From a bundle's folder to an encoder."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.bundle import read_manifest
from clip_rd_edge.runtime.ort import OrtEncoder


def load(bundle: str | Path, *, threads: int | None = None) -> OrtEncoder:
    """Open a bundle. Neither tower is loaded before it is first asked for.

    Args:
        bundle: the folder.
        threads: threads a tower runs on; None leaves it to ONNX Runtime, which takes every core.

    Raises:
        InputError, ConfigError: it is no bundle, incomplete, or of a newer format.
    """
    folder = Path(bundle)
    return OrtEncoder(folder, read_manifest(folder), threads=threads)
