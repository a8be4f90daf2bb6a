"""The inputs of a bundle's reference embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.bundle.reference import Reference, read_reference, reference_images, write_reference
from clip_rd_edge.errors import ConfigError


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (384, 384)])
def test_half_of_the_images_are_mostly_white_and_all_differ(size: tuple[int, int]) -> None:
    images = reference_images(size)
    assert images.shape == (8, *size, 3)
    assert [float((image == 255).all(axis=-1).mean()) > 0.5 for image in images] == [True] * 4 + [False] * 4
    assert len({image.tobytes() for image in images}) == 8
    assert {0, 255} < set(np.unique(images))  # shades, and both ends of the range


@pytest.mark.parametrize(
    "change",
    [
        {"image_rounding": np.ones(2)},
        {"image_rounding": None},
        {"texts": np.zeros(8, np.complex64)},
        {"texts": np.asarray(["a"] * 7)},
        {"image_embeddings": np.zeros((7, 4), np.float32)},
        {"images": np.zeros((8, 8, 3), np.uint8)},
    ],
)
def test_what_rounding_does_is_stored_and_other_arrays_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    reference = Reference(("text",) * 8, np.zeros((8, 77), np.int64), reference_images((8, 8)), -rows, rows, 1.0, 0.75)
    write_reference(tmp_path, reference)
    stored = read_reference(tmp_path)
    assert stored is not None
    assert (stored.text_rounding, stored.image_rounding) == (1, 0.75)
    path = tmp_path / "reference.npz"
    arrays = {**np.load(path), **change}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ConfigError):
        read_reference(tmp_path)
