from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.contract.tokenizer import TokenIds
from clip_rd_edge.convert.calibration import calibration_set
from clip_rd_edge.data.tables import TablePairs
from clip_rd_edge.errors import InputError

HOW = Preprocessing(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _tokenize(texts: Sequence[str]) -> TokenIds:
    return np.asarray([[int(text)] for text in texts], dtype=np.int64)


def _pairs(folder: Path, count: int) -> TablePairs:
    """Picture i is of the grey i, and its captions are i and i + 1000."""
    images = []
    for i in range(count):
        images.append(folder / f"{i}.png")
        Image.new("RGB", (10, 9), (i % 256,) * 3).save(images[-1])
    return TablePairs("greys", tuple(images), tuple((str(i), str(i + 1000)) for i in range(count)))


def test_half_calibrate_and_half_judge_without_overlap(tmp_path: Path) -> None:
    drawn = calibration_set(_pairs(tmp_path, 60), preprocessing=HOW, tokenize=_tokenize)
    calibrate = np.rint(drawn.calibrate.pixels[:, 0, 0, 0] * 255).astype(int)
    judge = np.rint(drawn.judge.pixels[:, 0, 0, 0] * 255).astype(int)
    assert (len(calibrate), len(judge)) == (30, 30)
    assert sorted([*calibrate, *judge]) == list(range(60))
    np.testing.assert_array_equal(drawn.calibrate.ids[:, 0] % 1000, calibrate)  # captions go with their pictures
    assert drawn.name == "greys"


def test_the_draw_goes_by_the_seed_and_is_bounded(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, 340)
    first, again, other = (
        calibration_set(pairs, preprocessing=HOW, tokenize=_tokenize, seed=seed) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.judge.ids, again.judge.ids)
    assert not np.array_equal(first.judge.ids, other.judge.ids)
    assert (len(first.calibrate.ids), len(first.judge.ids)) == (128, 192)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"greys has 31 pairs; at least 32 are needed"):
        calibration_set(_pairs(tmp_path, 31), preprocessing=HOW, tokenize=_tokenize)
