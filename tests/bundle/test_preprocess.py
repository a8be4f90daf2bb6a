"""Preprocessing is open_clip's, bit by bit, whatever the size of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess, to_uint8

MEAN, STD = (0.481, 0.457, 0.408), (0.268, 0.261, 0.275)
SIZES = [(64, 64), (72, 72), (31, 200), (200, 31), (65, 63), (500, 333), (10, 7), (1, 1), (224, 225)]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (48, 64), (65, 31)])
def test_preprocessing_is_bit_identical_to_open_clip(mode: Any, interpolation: Any, target: tuple[int, int]) -> None:
    transform = pytest.importorskip("open_clip.transform")
    size = target[0] if target[0] == target[1] else target
    cfg = transform.PreprocessCfg(size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    reference = transform.image_transform_v2(cfg, is_train=False)
    preprocessing = Preprocessing(size=target, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    others = np.random.default_rng(0).integers(9, 200, (20, 2))
    for width, height in (*SIZES, *map(tuple, others)):
        if mode == "longest" and target != (64, 64) and min(width, height) < 9:
            continue  # open_clip raises an error for a strip of which no pixel is left
        image = noise(int(width), int(height))
        np.testing.assert_array_equal(preprocess(image, preprocessing), reference(image).numpy())


def test_the_pixels_of_a_preprocessed_image_are_found_again() -> None:
    image = noise(64, 64)
    preprocessing = Preprocessing(size=(64, 64), mean=MEAN, std=STD)
    np.testing.assert_array_equal(to_uint8(preprocess(image, preprocessing)[None], preprocessing)[0], np.asarray(image))


STRIPS = [(150_000, 1), (1, 150_000), (100_000, 3), (7, 90_000), (40_000, 300), (20_000, 64), (64, 3_000)]


@pytest.mark.parametrize("size", STRIPS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (48, 65)])
def test_a_strip_is_cropped_before_it_is_resized(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: str, target: tuple[int, int]
) -> None:
    resized: list[int] = []
    original = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        resized.append(size[0] * size[1])
        return original(image, size, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize)
    preprocessing = Preprocessing(size=target, mean=MEAN, std=STD, interpolation=interpolation)  # type: ignore[arg-type]
    assert preprocess(Image.new("RGB", size, (9, 99, 200)), preprocessing).shape == (3, *target)
    assert max(resized) <= 16 * target[0] * target[1]


@pytest.mark.parametrize("size", [(1100, 64), (64, 1100), (2000, 50), (9, 700), (3000, 131), (1, 400), (70, 1500)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (48, 65)])
def test_a_strip_gets_the_values_of_resizing_all_of_it(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: str, target: tuple[int, int]
) -> None:
    original = Image.Image.resize

    def columns_first(image: Image.Image, size: tuple[int, int], resample: int, box: Any = None) -> Image.Image:
        """Always in this order: Pillow 13 resizes the rows first if that is faster, which rounds differently."""
        left, top, right, bottom = box or (0, 0, *image.size)
        columns = original(image, (size[0], image.height), resample, (left, 0, right, image.height))
        return original(columns, size, resample, (0, top, size[0], bottom))

    monkeypatch.setattr(Image.Image, "resize", columns_first)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    preprocessing = Preprocessing(
        size=target,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    cropped_first = preprocess(image, preprocessing)
    monkeypatch.setattr("clip_rd_edge.bundle.preprocess._MAX_RESIZED", 1e9)
    levels = np.abs(cropped_first - preprocess(image, preprocessing)) * 255
    assert levels.max() <= 1.01
    assert (levels > 0.5).mean() < 0.01


@pytest.mark.parametrize("size", [(150_000, 1), (1, 150_000), (500, 1)])
def test_padding_a_strip_keeps_at_least_one_row_of_it(size: tuple[int, int]) -> None:
    for target in ((64, 64), (48, 65)):
        preprocessing = Preprocessing(size=target, mean=MEAN, std=STD, resize_mode="longest")
        assert preprocess(Image.new("RGB", size), preprocessing).shape == (3, *target)
