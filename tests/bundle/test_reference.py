"""The inputs of a bundle's reference embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.bundle.reference import Reference, read_reference, reference_images, write_reference
from clip_rd_edge.errors import ConfigError


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
