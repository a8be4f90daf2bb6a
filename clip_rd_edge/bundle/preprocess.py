"""Image preprocessing: one implementation for training, evaluation and the device, so that they cannot diverge.

Arithmetic, rounding and resampling are bit-identical to open_clip's evaluation transform (torchvision on PIL images),
using only Pillow and numpy.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from PIL import Image

from clip_rd_edge.utils.structs import CheckedStruct

Pixels = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]
Interpolation = Literal["bicubic", "bilinear"]


# Longest edge of a model's input in pixels, four times that of the largest model in open_clip. A limit, so that a
# manifest cannot ask for any amount of memory.
MAX_EDGE = 2048
_Edge = Annotated[int, Meta(ge=1, le=MAX_EDGE)]
_Deviation = Annotated[float, Meta(ge=1e-6)]


class Preprocessing(CheckedStruct, frozen=True, kw_only=True):
    """Preprocessing parameters of a model, with the fields and values of open_clip's `preprocess_cfg`.

    Attributes:
        size: height and width of the input in pixels.
        mean, std: per channel, for pixel values scaled to [0, 1].
        resize_mode: `shortest` resizes the shorter edge and crops the centre, `longest` resizes the longer edge and
            pads with `fill_color`, `squash` ignores the aspect ratio.
    """

    size: tuple[_Edge, _Edge]
    mean: tuple[float, float, float]
    std: tuple[_Deviation, _Deviation, _Deviation]
    interpolation: Interpolation = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: Annotated[int, Meta(ge=0, le=255)] = 0

    @property
    def evaluation_interpolation(self) -> Interpolation:
        """The interpolation of `preprocess`.

        For `shortest` to a size that is not square, open_clip passes none to its resize, which is then bicubic.
        """
        height, width = self.size
        return "bicubic" if self.resize_mode == "shortest" and height != width else self.interpolation

    def open_clip_cfg(self) -> dict[str, Any]:
        """Return open_clip's `preprocess_cfg`, in its order; a field that open_clip lacks has to be left out here."""
        return {"size": self.size, "mode": "RGB", **msgspec.to_builtins(self)}


def fast_decode_edge(preprocessing: Preprocessing) -> int:
    """Return a `min_edge` for `open_image` that costs a model little accuracy: twice its input size."""
    return 2 * max(preprocessing.size)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Convert an RGB image to the model's input, (3, H, W), bit-identical to open_clip's evaluation transform.

    If an image is long and narrow, only the part that the crop keeps is resized. Values then differ by at most one
    grey level, and from Pillow 13 on by more in noise, where it resizes the rows of one of the two first.
    """
    return _normalise(fit(image, preprocessing), preprocessing)


def fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize and crop an RGB image to the size of the model's input; one of this size stays as it is."""
    height, width = preprocessing.size
    resample = _resample(preprocessing.evaluation_interpolation)
    if preprocessing.resize_mode == "squash":
        return image.resize((width, height), resample)
    new_size = _resized(image.size, preprocessing)
    if new_size[0] * new_size[1] > _MAX_RESIZED * width * height:
        image, new_size = _crop_source(image, new_size, preprocessing), preprocessing.size[::-1]
    elif new_size != image.size:
        image = image.resize(new_size, resample)
    return _crop_centre(image, preprocessing)


def resize_crop(image: Image.Image, box: Box, preprocessing: Preprocessing) -> Image.Image:
    """Crop an RGB image to `box` (left, top, right, bottom in pixels) and resize the crop to the size of the input.

    As in torchvision, pixels outside of the box do not contribute, except for those that its edges cut through.
    """
    left, top = math.floor(box[0]), math.floor(box[1])
    crop = image.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
    height, width = preprocessing.size
    box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return crop.resize((width, height), _resample(preprocessing.interpolation), box=box)


def normalise_in_place(levels: Any, *, white: Any, mean: Any, std: Any) -> None:
    """Normalise pixel values from 0 to `white` (255), each channel by its mean and standard deviation.

    Args:
        levels: float32, an array of numpy or a tensor of torch; the others are of the same type, and broadcast to it.
    """
    # In place: several times faster than a single expression. In this order, as torchvision's ToTensor and Normalize.
    levels /= white
    levels -= mean
    levels /= std


def to_uint8(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Undo the normalisation of preprocessed images: (N, 3, H, W) float32 to (N, H, W, 3) uint8."""
    mean, std = _mean_std(preprocessing)
    levels = (pixels * std + mean) * np.float32(255)
    images: npt.NDArray[np.uint8] = np.rint(levels).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return images


def _resample(interpolation: Interpolation) -> Image.Resampling:
    return Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the width and height to which an image of this width and height is resized before the crop."""
    height, width = preprocessing.size
    old_width, old_height = size
    if preprocessing.resize_mode == "shortest" and height == width:
        # torchvision truncates the longer edge; rounding could differ by a pixel.
        if old_width <= old_height:
            return height, int(height * old_height / old_width)
        return int(height * old_width / old_height), height
    ratios = (old_height / height, old_width / width)
    ratio = max(ratios) if preprocessing.resize_mode == "longest" else min(ratios)
    # At least 1: `longest` would leave no pixel of a strip's short edge, and open_clip raises an error.
    return max(1, round(old_width / ratio)), max(1, round(old_height / ratio))


# Largest resized image, in multiples of the model's input. Beyond that, which is an aspect ratio of 16 for a square
# input, the crop is taken first: resizing a strip of 150,000 × 1 pixels (a PNG of 98 bytes) would take 22 GB.
_MAX_RESIZED = 16
_FILTER_SUPPORT = 2  # of the bicubic filter in pixels, on either side; bilinear has 1


def _crop_source(image: Image.Image, new_size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Resize only what the centre crop keeps of an image resized to `new_size`, for each edge that is cropped."""
    box, window, output = [0.0] * 4, [0] * 4, [0, 0]
    for axis, (length, new, size) in enumerate(zip(image.size, new_size, preprocessing.size[::-1], strict=True)):
        scale = length / new
        output[axis] = min(new, size)
        first = round((new - output[axis]) / 2) * scale
        last = first + output[axis] * scale
        # The filter reads pixels beyond the box. Cropping to them keeps the box's coordinates small: Pillow stores them
        # in single precision.
        margin = int(_FILTER_SUPPORT * max(1.0, scale)) + 2
        window[axis], window[axis + 2] = max(0, int(first) - margin), min(length, int(last) + margin)
        box[axis], box[axis + 2] = max(0.0, first - window[axis]), min(last, float(length)) - window[axis]
    part = image.crop((window[0], window[1], window[2], window[3]))
    resample = _resample(preprocessing.evaluation_interpolation)
    return part.resize((output[0], output[1]), resample, box=(box[0], box[1], box[2], box[3]))


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
    mean = np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    return mean, np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]


def _normalise(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    mean, std = _mean_std(preprocessing)
    normalised: Pixels = np.empty((3, image.height, image.width), dtype=np.float32)
    np.copyto(normalised, np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))  # contiguous channels, for speed
    normalise_in_place(normalised, white=np.float32(255), mean=mean, std=std)
    return normalised
