"""Add reference answers to a bundle, for `verify` to compare a device's with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.bundle.reference import Reference, reference_images, worst_agreement, write_reference
from clip_rd_edge.exporting.int8.saturation import open_as_written
from clip_rd_edge.exporting.parity import HARD_TEXTS
from clip_rd_edge.runtime.backends.session import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder, RunOptions

# Relative; a few times the rounding of float32, 6e-8, as sums gather it.
_NOISE = 1e-6
_ROUNDINGS = 4


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


class _RoundedOtherwise(NodeByNode):
    """Runs the ONNX files node by node with weights and scales that differ by rounding, in another way for each seed.

    Processors and runtimes round sums otherwise, so that a few activations of INT8 become the next level. How far that
    moves the answers depends on the tower: the more layers follow, the farther. This shows it on any processor.
    """

    def __init__(self, encoder: BundleEncoder, seed: int) -> None:
        super().__init__(encoder.folder, encoder.manifest, threads=encoder.threads)
        self._rng = np.random.default_rng(seed)

    def open_tower(self, tower: Tower) -> Any:
        """Open an unoptimised session for the tower with such weights and scales."""
        model = onnx.load(self.folder / tower.file)
        scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        for tensor in model.graph.initializer:
            # Other constants of one number may be settings of an operator.
            if tensor.data_type == onnx.TensorProto.FLOAT and (tensor.name in scales or math.prod(tensor.dims) > 1):
                values = numpy_helper.to_array(tensor)
                factors = 1 + _NOISE * self._rng.standard_normal(values.shape)
                tensor.CopyFrom(numpy_helper.from_array((values * factors).astype(np.float32), tensor.name))
        return open_as_written(model.SerializeToString(), threads=self.threads)


def add_reference(folder: Path, encoder: BundleEncoder) -> None:
    """Write reference.npz into a bundle's folder.

    Args:
        folder: the bundle's folder; its manifest is not yet written.
        encoder: computes the answers, such as NodeByNode. Without a text tower, there are none for texts.
    """
    manifest = encoder.manifest
    images = reference_images(manifest.preprocessing.size)
    texts = HARD_TEXTS if manifest.text else ()
    ids = encoder.tokenize(texts) if texts else np.zeros((0, manifest.tokenizer.context_length), dtype=np.int64)

    def embed_images(encoder: BundleEncoder) -> Embeddings:
        return encoder.encode_images([Image.fromarray(image) for image in images])

    def embed_texts(encoder: BundleEncoder) -> Embeddings:
        return encoder.encode_ids(ids) if texts else encoder.encode_texts([])

    text_embeddings, image_embeddings = embed_texts(encoder), embed_images(encoder)
    reference = Reference(
        texts=texts,
        ids=ids,
        images=images,
        text_embeddings=text_embeddings,
        image_embeddings=image_embeddings,
        text_rounding=_rounding(encoder, manifest.text, embed_texts, text_embeddings),
        image_rounding=_rounding(encoder, manifest.image, embed_images, image_embeddings),
    )
    write_reference(folder, reference)


def _rounding(
    encoder: BundleEncoder, tower: Tower | None, embed: Callable[[BundleEncoder], Embeddings], answers: Embeddings
) -> float:
    """Return the lowest agreement of a tower's answers with those of other roundings; 1 if it is not in INT8."""
    if tower is None or not tower.precision.startswith("int8") or not isinstance(encoder, NodeByNode):
        return 1.0
    return min(worst_agreement(answers, embed(_RoundedOtherwise(encoder, seed))) for seed in range(_ROUNDINGS))
