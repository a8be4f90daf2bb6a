from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess, resize_crop
from clip_rd_edge.distillation.pixels import LARGE, Crops, Normaliser, crop_levels, crops_for

MODEL = Preprocessing(size=(224, 224), mean=(0.48, 0.45, 0.41), std=(0.26, 0.27, 0.28))
SIZES = [(1, 1), (3, 500), (500, 333), (1080, 1920)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_keep_the_share_that_was_asked_for_differ_in_aspect_ratio_and_reach_all_edges(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    rng, rounding = np.random.default_rng(0), 1 / LARGE
    boxes = np.asarray([Crops(scale=scale).draw(size, rng) for _ in range(500)]) / (*size, *size)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, change = widths * heights, np.log(widths / heights)
    assert scale[0] - rounding <= min(areas) <= max(areas) <= scale[1] + rounding
    assert np.mean(areas) == pytest.approx(np.mean(scale), abs=0.1 * (scale[1] - scale[0]) + rounding)
    assert np.abs(change).max() <= -np.log(scale[0]) + rounding
    assert np.abs(np.mean(change)) < 0.03
    assert np.std(change) > 0.02
    assert boxes[:, :2].min(axis=0) == pytest.approx([0, 0], abs=0.01)
    assert boxes[:, 2:].max(axis=0) == pytest.approx([1, 1], abs=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_crops_have_the_shape_of_the_input_and_reach_all_edges(size: tuple[int, int]) -> None:
    """So that photographs of any shape are trained on as they are evaluated, and not squeezed into the input."""
    height, width = 160, 320
    crops = crops_for(msgspec.structs.replace(MODEL, size=(height, width)), (0.9, 1.0), "full")
    rng = np.random.default_rng(0)
    boxes = np.asarray([crops.draw(size, rng) for _ in range(500)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert np.log(widths / heights * height / width) == pytest.approx(0, abs=-np.log(0.9) + 4 / LARGE)
    largest = min(size[0], size[1] * width / height) * min(size[1], size[0] * height / width)
    assert widths * heights / largest == pytest.approx(0.95, abs=0.05 + 4 / LARGE)
    assert (boxes[:, :2].min(axis=0) / size) == pytest.approx([0, 0], abs=0.01)
    assert (boxes[:, 2:].max(axis=0) / size) == pytest.approx([1, 1], abs=0.01)


def test_a_model_is_trained_on_squeezed_images_where_it_is_evaluated_on_them_and_only_there() -> None:
    squash, longest = (
        crops_for(msgspec.structs.replace(MODEL, resize_mode=mode), (1.0, 1.0), "full")
        for mode in ("squash", "longest")
    )
    assert squash.draw((300, 100), np.random.default_rng(0)) == (0, 0, 300, 100)
    left, top, right, bottom = longest.draw((300, 100), np.random.default_rng(0))
    assert right - left == bottom - top == 100


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Edges, gradients and grain, with values up to both ends of the range."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    sharp = np.asarray(patches.resize((width, height), Image.Resampling.NEAREST), dtype=np.float32)
    pixels = np.where(rng.random((height // 100 + 1, 1, 1)).repeat(100, 0)[:height] < 0.5, smooth, sharp)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


@pytest.mark.parametrize(
    ("size", "interpolation"), [((1536, 1024), "bilinear"), ((333, 500), "bicubic"), ((2000, 300), "bicubic")]
)
def test_large_crops_are_resized_as_by_pillow_to_a_grey_level(size: tuple[int, int], interpolation: str) -> None:
    model = msgspec.structs.replace(MODEL, interpolation=interpolation)
    image = photograph(*size)
    box = Crops(scale=(0.9, 1.0)).draw(size, np.random.default_rng(1))
    (levels,) = crop_levels(image, box, [model])
    difference = np.abs(levels.astype(int) - np.asarray(resize_crop(image, box, model)).astype(int))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize("size", [(224, 224), (32, 48)])
def test_the_device_normalises_exactly_as_the_shared_preprocessing_does(size: tuple[int, int]) -> None:
    model = msgspec.structs.replace(MODEL, size=size, resize_mode="squash")
    images = [photograph(80, 120, seed) for seed in range(3)]
    levels = [crop_levels(image, (0, 0, 80, 120), [model])[0] for image in images]
    batch = torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2)
    pixels = Normaliser(model, torch.device("cpu"))(batch)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for actual, image in zip(pixels, images, strict=True):
        np.testing.assert_array_equal(actual.numpy(), preprocess(image, model))
