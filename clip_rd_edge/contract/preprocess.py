"""Image preprocessing: one implementation for training, evaluation and the device, so that they cannot diverge.

Arithmetic, rounding and resampling are bit-identical to open_clip's evaluation transform (torchvision on PIL images),
using only Pillow and numpy.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True):
    """Preprocessing parameters of a model, with the fields and values of open_clip's `preprocess_cfg`.

    Attributes:
        size: height and width of the input in pixels.
        mean, std: per channel, for pixel values scaled to [0, 1].
        resize_mode: `shortest` resizes the shorter edge and crops the centre, `longest` resizes the longer edge and
            pads with `fill_color`, `squash` ignores the aspect ratio.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0


def fast_decode_edge(preprocessing: Preprocessing) -> int:
    """Return a `min_edge` for `open_image` that costs a model little accuracy: twice its input size."""
    return 2 * max(preprocessing.size)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Convert an RGB image to the model's input, (3, H, W), bit-identical to open_clip's evaluation transform."""
    height, width = preprocessing.size
    resample = _resample(preprocessing)
    if preprocessing.resize_mode == "squash":
        return _normalise(image.resize((width, height), resample), preprocessing)
    old_width, old_height = image.size
    if preprocessing.resize_mode == "longest":
        ratio = max(old_height / height, old_width / width)
        new_size = (round(old_width / ratio), round(old_height / ratio))
    elif height == width:
        new_size = _shorter_edge_to(height, old_width, old_height)
    else:
        ratio = min(old_height / height, old_width / width)
        new_size = (round(old_width / ratio), round(old_height / ratio))
    if new_size != image.size:
        image = image.resize(new_size, resample)
    return _normalise(_crop_centre(image, preprocessing), preprocessing)


def preprocess_crop(image: Image.Image, box: Box, preprocessing: Preprocessing) -> Pixels:
    """Crop an RGB image to `box` (left, top, right, bottom in pixels) and resize it to the model's input, (3, H, W)."""
    height, width = preprocessing.size
    return _normalise(image.resize((width, height), _resample(preprocessing), box=box), preprocessing)


def to_uint8(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Undo the normalisation of preprocessed images: (N, 3, H, W) float32 to (N, H, W, 3) uint8."""
    mean, std = _mean_std(preprocessing)
    levels = (pixels * std + mean) * np.float32(255)
    images: npt.NDArray[np.uint8] = np.rint(levels).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return images


def _resample(preprocessing: Preprocessing) -> Image.Resampling:
    return Image.Resampling.BILINEAR if preprocessing.interpolation == "bilinear" else Image.Resampling.BICUBIC


def _shorter_edge_to(size: int, width: int, height: int) -> tuple[int, int]:
    # torchvision truncates the longer edge; rounding could differ by a pixel.
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _crop_centre(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Crop the centre, first padding an image that is smaller, as torchvision's center_crop does."""
    height, width = preprocessing.size
    if image.size == (width, height):
        return image
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(image.width, width), max(image.height, height)), (preprocessing.fill_color,) * 3)
        canvas.paste(image, (max(0, width - image.width) // 2, max(0, height - image.height) // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _mean_std(preprocessing: Preprocessing) -> tuple[Pixels, Pixels]:
    """Return mean and standard deviation, (3, 1, 1) each."""
    mean = np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    return mean, np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]


def _normalise(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    mean, std = _mean_std(preprocessing)
    # In place and with contiguous channels: several times faster than a single expression.
    normalised: Pixels = np.empty((3, image.height, image.width), dtype=np.float32)
    np.copyto(normalised, np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    normalised /= np.float32(255)
    normalised -= mean
    normalised /= std
    return normalised
