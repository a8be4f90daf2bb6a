"""The reference embeddings of a bundle, reference.npz: a few inputs, and the embeddings that devices must give them.

texts (N,), ids (N, T) int32              texts, and the token ids that the tokenizer turns them into
images (N, H, W, 3) uint8                 images of the size that the image tower takes
text_embeddings, image_embeddings (N, D)  float32, L2-normalised: what the files say, evaluated node by node
text_rounding, image_rounding ()          float32: their lowest agreement with what the tower answers if sums are
                                          rounded otherwise; 1 if it was not measured, as where it is not in INT8

A bundle without a text tower has no texts: (0,), (0, T) and (0, D).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.tokenizer import TokenIds
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.arrays import npz_bytes, read_npz, require_arrays
from clip_rd_edge.utils.files import write_bytes

REFERENCE = "reference.npz"
_MAX_BYTES = 64_000_000  # of an array
_HINT = "copy or export the bundle again"
_ARRAYS = {
    "texts": "U texts?", "ids": "iu texts? tokens", "images": "iu images height width channels",
    "text_embeddings": "f texts? size", "image_embeddings": "f images size",
    "text_rounding": "f", "image_rounding": "f",
}  # fmt: skip
_COUNT = 8  # reference images, half of them on white
# Levels of a colour's channels.
_ALL, _SATURATED, _WHITE = np.arange(256), np.array([0, 255]), np.full(3, 255)


class Reference(msgspec.Struct, frozen=True):
    """Inputs of both towers, with their reference embeddings and what rounding does to them; shapes as above."""

    texts: tuple[str, ...]
    ids: TokenIds
    images: npt.NDArray[np.uint8]
    text_embeddings: Embeddings
    image_embeddings: Embeddings
    text_rounding: float = 1.0
    image_rounding: float = 1.0


def write_reference(folder: Path, reference: Reference) -> None:
    """Write reference.npz into a bundle's folder."""
    kinds = {"texts": np.str_, "ids": np.int32, "text_rounding": np.float32, "image_rounding": np.float32}
    arrays = {name: np.asarray(getattr(reference, name), kinds.get(name)) for name in Reference.__struct_fields__}
    write_bytes(folder / REFERENCE, npz_bytes(compressed=True, **arrays))


def read_reference(folder: Path) -> Reference | None:
    """Return a bundle's reference embeddings, or None if it has none."""
    path = folder / REFERENCE
    if not path.is_file():
        return None
    arrays = read_npz(path, max_bytes=_MAX_BYTES, hint=_HINT)
    require_arrays(arrays, _ARRAYS, source=path, hint=_HINT)
    images, texts = len(arrays["images"]), len(arrays["texts"])
    if images < 2 or texts not in (images, 0):
        raise ConfigError(f"{path} has {images} images and {texts} texts.", hint=_HINT)
    return Reference(
        tuple(map(str, arrays["texts"])),
        arrays["ids"].astype(np.int64),
        arrays["images"].astype(np.uint8),
        text_embeddings=arrays["text_embeddings"].astype(np.float32),
        image_embeddings=arrays["image_embeddings"].astype(np.float32),
        text_rounding=float(arrays["text_rounding"].astype(np.float32)),
        image_rounding=float(arrays["image_rounding"].astype(np.float32)),
    )


def reference_images(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return images (N, H, W, 3) of rectangles and ellipses on white, coloured and shaded backgrounds.

    They are generated, not taken from training data, which a bundle must not give away. White areas and saturated
    colours are the inputs on which INT8 kernels that saturate deviate most.
    """
    height, width = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / np.asarray([max(height - 1, 1), max(width - 1, 1)]).reshape(2, 1, 1)
    images = []
    for i in range(_COUNT):
        levels = _SATURATED if i % 2 else _ALL
        start, end = (_WHITE, _WHITE) if i < _COUNT // 2 else rng.choice(levels, (2, 3))
        shade = (np.round(8 * (x if rng.random() < 0.5 else y)) / 8)[..., None]
        image = start + (end - start) * shade
        for _ in range(2 if i < _COUNT // 2 else 6):
            (top, left), (half_height, half_width) = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.4, 2)
            rows, columns = (y - top) / half_height, (x - left) / half_width
            inside = rows**2 + columns**2 < 1 if rng.random() < 0.5 else np.maximum(abs(rows), abs(columns)) < 1
            image = np.where(inside[..., None], rng.choice(levels, 3), image)
        images.append(image.round().astype(np.uint8))
    return np.stack(images)


def worst_agreement(reference: Embeddings, answers: Embeddings) -> float:
    """Return the lowest cosine of N ≥ 2 embeddings with their reference, both (N, D), less the reference's mean.

    CLIP embeddings share a large mean, so the raw cosine stays near 1 even if a tower answers nothing but that mean.
    Values that are not finite count as 0.
    """
    if not np.isfinite(answers).all():
        return 0.0
    mean = reference.mean(axis=0, dtype=np.float64)
    a, b = reference - mean, answers - mean
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min(np.sum(a * b, axis=1) / np.maximum(norms, 1e-24)))
