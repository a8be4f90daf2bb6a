"""Add reference answers to a bundle, for `verify` to compare a device's with. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.contract.reference import Reference, reference_images, write_reference
from clip_rd_edge.convert.parity import HARD_TEXTS
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder


class _NodeByNode(BundleEncoder):
    """Runs the ONNX files without fusing nodes: Q/DQ layers are computed in float32, as the file says.

    INT8 kernels differ by processor, and may saturate on this one; the reference must not depend on it.
    """

    runtime = "onnxruntime"

    def open_tower(self, tower: Tower) -> Any:
        """Open an unoptimised session for the tower's ONNX file."""
        return open_session(str(self.folder / tower.file), threads=self.threads, optimize=False)


def add_reference(folder: Path, manifest: Manifest) -> None:
    """Write reference.npz into the folder of a bundle whose manifest is not yet written.

    Raises:
        ConfigError: ONNX Runtime cannot run a tower.
    """
    encoder = _NodeByNode(folder, manifest)
    images = reference_images(manifest.preprocessing.size)
    ids = encoder.tokenize(HARD_TEXTS)
    reference = Reference(
        texts=HARD_TEXTS,
        ids=ids,
        images=images,
        text_embeddings=encoder.encode_ids(ids),
        image_embeddings=encoder.encode_images([Image.fromarray(image) for image in images]),
    )
    write_reference(folder, reference)
