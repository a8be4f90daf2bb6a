"""The inputs of a bundle's reference answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.bundle.reference import (
    Reference,
    read_reference,
    reference_images,
    worst_agreement,
    write_reference,
)
from clip_rd_edge.errors import ConfigError


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (384, 384)])
def test_half_of_the_images_are_mostly_white_and_all_differ(size: tuple[int, int]) -> None:
    images = reference_images(size)
    assert images.shape == (8, *size, 3)
    assert [float((image == 255).all(axis=-1).mean()) > 0.5 for image in images] == [True] * 4 + [False] * 4
    assert len({image.tobytes() for image in images}) == 8
    assert {0, 255} < set(np.unique(images))  # shades, and both ends of the range


def test_the_answers_of_a_tower_for_384_pixels_take_less_than_100_kilobytes(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    reference = Reference(("text",) * 8, np.zeros((8, 77), np.int64), reference_images((384, 384)), -rows, rows)
    write_reference(tmp_path, reference)
    assert (tmp_path / "reference.npz").stat().st_size < 100_000
    stored = read_reference(tmp_path)
    assert stored is not None
    assert np.array_equal(stored.images, reference.images)
    assert worst_agreement(stored.image_embeddings, rows) > 0.999999


def test_what_rounding_does_is_stored_and_older_answers_have_none(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    reference = Reference(("text",) * 8, np.zeros((8, 77), np.int64), reference_images((8, 8)), -rows, rows, 1.0, 0.75)
    write_reference(tmp_path, reference)
    stored = read_reference(tmp_path)
    assert stored is not None
    assert (stored.text_rounding, stored.image_rounding) == (1, 0.75)
    path = tmp_path / "reference.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{name: value for name, value in arrays.items() if not name.endswith("_rounding")})
    older = read_reference(tmp_path)
    assert older is not None
    assert (older.text_rounding, older.image_rounding) == (1, 1)
    np.savez(path, **{**arrays, "image_rounding": np.ones(2)})
    with pytest.raises(ConfigError, match="unexpected shapes"):
        read_reference(tmp_path)
