"""What is seen in a data set before training: copies in any disguise, and a division that keeps them together."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clip_rd_edge.data.look import Seen, groups_of, hold_back, perceptual_hash, see_all

FLAT = np.zeros(256, np.float32)


def photograph(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Return an image with as much low detail as a photograph has."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two photographs; the first again byte for byte, renamed and recompressed in half the size; and a damaged file."""
    paths = [tmp_path / name for name in ("one.png", "other.png", "copy.png", "small.jpg", "torn.jpg")]
    photograph(0).save(paths[0])
    photograph(1).save(paths[1])
    paths[2].write_bytes(paths[0].read_bytes())
    photograph(0).resize((80, 60)).save(paths[3], quality=40)
    paths[4].write_bytes(b"\xff\xd8 torn")
    return paths


def test_copies_are_one_group_also_where_they_were_recompressed(files: list[Path]) -> None:
    seen = see_all(files)
    assert groups_of(seen) == [0, 1, 0, 0, 4]
    assert [bool(one.problem) for one in seen] == [False, False, False, False, True]
    assert seen[3].size == (80, 60)


def test_an_image_without_contrast_is_like_no_other() -> None:
    white, black = (perceptual_hash(Image.new("RGB", (50, 50), colour)) for colour in ("white", "black"))
    assert abs(float(white @ white)) < 1e-6
    assert abs(float(white @ black)) < 1e-6


def test_images_with_the_same_key_are_a_group() -> None:
    seen = [Seen(str(number), FLAT) for number in range(4)]
    assert groups_of(seen, ["a dog", "", "a dog", ""]) == [0, 1, 0, 3]


def test_copies_stay_on_one_side_and_each_class_keeps_half(files: list[Path]) -> None:
    seen = [Seen(hashlib.sha256(bytes([number % 256, number // 256])).hexdigest(), FLAT) for number in range(300)]
    groups = [number // 3 for number in range(300)]  # copies of three
    classes = ["common"] * 270 + ["rare"] * 27 + ["single"] * 3
    parts = hold_back(seen, groups, classes, 0.2)
    assert all(len(set(parts[start : start + 3])) == 1 for start in range(0, 300, 3))
    assert {"choose", "test"} <= set(parts)
    held = [part != "train" for part in parts]
    assert 54 <= sum(held[:270]) <= 57
    assert 6 <= sum(held[270:297]) <= 9
    assert not any(held[297:])  # its three images are one, in three copies


def test_the_same_images_are_held_back_when_others_join() -> None:
    digests = [f"{np.random.default_rng(number).integers(2**63):064x}" for number in range(220)]
    seen = [Seen(digest, FLAT) for digest in digests]
    fewer, more = (hold_back(seen[:count], range(count), [""] * count, 0.2) for count in (200, 220))
    held = [number for number in range(200) if fewer[number] != "train"]
    assert sum(more[number] != "train" for number in held) >= 0.9 * len(held)


def test_what_cannot_be_read_is_not_held_back(files: list[Path]) -> None:
    assert hold_back([see_all(files)[4]] * 9, range(9), [""] * 9, 0.5) == ["train"] * 9
