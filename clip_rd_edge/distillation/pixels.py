"""The way of an image's pixels in training: one random crop, resized once per size, and normalised on the device.

Up to the device, pixel values have 8 bits: a quarter of the memory and of the copying, and shared by models
that differ in mean and standard deviation alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from clip_rd_edge.bundle.preprocess import Box, Preprocessing, fast_decode_edge, normalise_in_place, resize_crop
from clip_rd_edge.settings.training import Decode
from clip_rd_edge.utils.structs import CheckedStruct

Levels = npt.NDArray[np.uint8]  # (H, W, 3)
# Max factor by which the aspect ratio of a crop is changed, as in torchvision for square images.
MAX_ASPECT_CHANGE = 4 / 3
# Crops with two edges of at least so many pixels are rounded to those, and resized by torch.
LARGE = 256


class Crops(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How training images are decoded and cropped.

    Attributes:
        scale: min and max share that a crop keeps of the area of the largest box with this aspect ratio.
        aspect_ratio: width over height, about which crops vary; None for each image's own.
        decode: `scaled` decodes a large JPEG at 1/2, 1/4 or 1/8 of its size, as a device does, as long as the crop
            keeps twice the pixels that the models see; `full` decodes every pixel.
    """

    scale: tuple[float, float]
    aspect_ratio: float | None = None
    decode: Decode = "full"

    def min_edge(self, models: Iterable[Preprocessing]) -> int | None:
        """Return how many pixels both edges of a crop keep when it is decoded for these models; None for all."""
        return max(map(fast_decode_edge, models)) if self.decode == "scaled" else None

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
        """Draw a crop box in an image of any shape.

        Its share of the area is uniform within `scale`. Its aspect ratio is changed by a factor whose logarithm is
        uniform among those with which the box fits, up to MAX_ASPECT_CHANGE; its position in the image is uniform. So
        every draw fits. torchvision's RandomResizedCrop limits the aspect ratio itself to 3:4 to 4:3: with the default
        scale, no such box fits into an image of 3:2, and its fallback is always the same centre crop.

        Args:
            size: width and height of the image in pixels.

        Returns:
            Left, top, right and bottom in pixels. They are whole numbers in a LARGE box, and fractions in a smaller
            one, where whole numbers would give few different crops.
        """
        width, height = size
        ratio = self.aspect_ratio or width / height
        area = rng.uniform(*self.scale)
        limit = min(math.log(MAX_ASPECT_CHANGE), math.log(1 / area))
        change = math.exp(rng.uniform(-limit, limit))
        w = min(width, height * ratio) * min(1.0, math.sqrt(area * change))
        h = min(height, width / ratio) * min(1.0, math.sqrt(area / change))
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        if min(w, h) >= LARGE:
            w, h = round(w), round(h)
            left, top = min(round(left), width - w), min(round(top), height - h)
        return left, top, min(width, left + w), min(height, top + h)


def crops_for(preprocessing: Preprocessing, scale: tuple[float, float], decode: Decode) -> Crops:
    """Return the crops to train a model on: they are squeezed where its evaluation squeezes images, and only there.

    An evaluation with `shortest` or `longest` squeezes nothing, so crops have the input's aspect ratio, as in the
    training of CLIP (Radford et al. 2021, section 2.4). With `squash`, they have the image's.
    """
    height, width = preprocessing.size
    ratio = None if preprocessing.resize_mode == "squash" else width / height
    return Crops(scale=scale, aspect_ratio=ratio, decode=decode)


def crop_levels(image: Image.Image, box: Box, models: Sequence[Preprocessing]) -> list[Levels]:
    """Crop an RGB image and resize the crop for each model, once per distinct size.

    A LARGE crop is resized by torch's version of Pillow's algorithm, which takes a quarter of the time. Its values are
    within one grey level of Pillow's, but for a few in a million on edges, where it is two.

    Returns:
        Grey levels, (H, W, 3) per model; models with the same size and interpolation share one array.
    """
    crop: Tensor | None = None
    resized: dict[tuple[tuple[int, int], str], Levels] = {}
    for model in models:
        key = (model.size, model.interpolation)
        if key in resized:
            continue
        left, top, right, bottom = box
        if min(right - left, bottom - top) < LARGE:
            resized[key] = np.asarray(resize_crop(image, box, model))
            continue
        if crop is None:
            window = np.asarray(image)[round(top) : round(bottom), round(left) : round(right)]
            crop = torch.from_numpy(window.copy()).permute(2, 0, 1)[None]
        levels = interpolate(crop, model.size, mode=model.interpolation, antialias=True)
        resized[key] = levels[0].permute(1, 2, 0).numpy()
    return [resized[model.size, model.interpolation] for model in models]


class Normaliser:
    """Normalises a batch's pixel values for a model, on the device that it runs on.

    The arithmetic is that of `bundle.preprocess.preprocess`, bit for bit on a CPU.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._device = device
        width = preprocessing.size[1]

        def constant(values: Sequence[float]) -> Tensor:
            # A whole row of pixels: torch is slow at broadcasting along channels that lie next to each other.
            row = torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1).expand(1, 3, 1, width)
            return row.contiguous(memory_format=torch.channels_last)

        self._white = constant((255.0, 255.0, 255.0))
        self._mean, self._std = constant(preprocessing.mean), constant(preprocessing.std)

    def __call__(self, levels: Tensor) -> Tensor:
        """Return the model's input: (B, 3, H, W) uint8 on the CPU to float32 on the device, in channels-last format."""
        levels = levels.to(self._device, non_blocking=True)
        pixels = levels.to(torch.float32, memory_format=torch.channels_last)
        normalise_in_place(pixels, white=self._white, mean=self._mean, std=self._std)
        return pixels
