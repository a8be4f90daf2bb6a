"""Inputs that bring out what breaks a tower: hard texts, and pictures of extreme contrast. Never imports torch."""

from __future__ import annotations

import numpy as np

from clip_rd_edge.contract.preprocess import Pixels, Preprocessing

# Short, long, too long, none at all, and what tokenizers trip over: texts that towers and tokenizers are compared on.
PROBES = (
    "a photo of a cat",
    "",
    "two dogs, running through tall grass at the edge of a lake",
    "it's 1984 &amp; they'll  meet — don't you?",
    "Überraschung! 猫と犬 👩‍🚀 café",
    "red",
    "!<end_of_text> <end_of_text> <start_of_text>",
    "word " * 300,
)


def hard_pixels(how: Preprocessing) -> Pixels:
    """Preprocessed pictures (8, 3, H, W) that reach the ends of what a picture can hold.

    White, black, red, checks of 1 and of 16 pixels, noise at full contrast, noise in the middle, a gradient.
    """
    height, width = how.size
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    pictures = np.stack(
        [
            np.ones((3, height, width)),
            np.zeros((3, height, width)),
            np.stack([np.ones((height, width)), np.zeros((height, width)), np.zeros((height, width))]),
            np.broadcast_to((rows + columns) % 2, (3, height, width)),
            np.broadcast_to((rows // 16 + columns // 16) % 2, (3, height, width)),
            rng.integers(0, 2, (3, height, width)),
            rng.uniform(0, 1, (3, height, width)),
            np.broadcast_to(columns / max(width - 1, 1), (3, height, width)),
        ]
    )
    mean, std = (np.asarray(values)[:, None, None] for values in (how.mean, how.std))
    pixels: Pixels = ((pictures - mean) / std).astype(np.float32)
    return pixels
