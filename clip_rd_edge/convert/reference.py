"""Add reference answers to a bundle, for `verify` to compare a device's with. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.contract.reference import Reference, reference_images, write_reference
from clip_rd_edge.convert.int8.saturation import open_as_written
from clip_rd_edge.convert.parity import HARD_TEXTS
from clip_rd_edge.runtime.backends.session import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder, RunOptions


class NodeByNode(BundleEncoder):
    """Runs the ONNX files without fusing nodes: Q/DQ layers are computed in float32, as the file says.

    INT8 kernels differ by processor, and may be wrong on this one; the reference must not depend on it.
    """

    runtime = "onnxruntime"

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, options: RunOptions) -> NodeByNode:
        """Open a bundle."""
        return cls(folder, manifest, threads=options.threads)

    def int8_fault(self, tower: Tower) -> str:
        """Return an empty string: what `open_tower` opens is right everywhere."""
        return ""

    def open_tower(self, tower: Tower) -> Any:
        """Open an unoptimised session for the tower's ONNX file."""
        path = self.folder / tower.file
        if super().int8_fault(tower):
            return open_as_written(path.read_bytes(), threads=self.threads)
        return open_session(str(path), threads=self.threads, optimize=False)


def add_reference(folder: Path, encoder: BundleEncoder) -> None:
    """Write reference.npz into a bundle's folder.

    Args:
        folder: the bundle's folder; its manifest is not yet written.
        encoder: computes the answers, such as NodeByNode. Without a text tower, there are none for texts.

    Raises:
        ConfigError: a tower does not run.
    """
    manifest = encoder.manifest
    images = reference_images(manifest.preprocessing.size)
    texts = HARD_TEXTS if manifest.text else ()
    ids = encoder.tokenize(texts) if texts else np.zeros((0, manifest.tokenizer.context_length), dtype=np.int64)
    reference = Reference(
        texts=texts,
        ids=ids,
        images=images,
        text_embeddings=encoder.encode_ids(ids) if texts else encoder.encode_texts([]),
        image_embeddings=encoder.encode_images([Image.fromarray(image) for image in images]),
    )
    write_reference(folder, reference)
