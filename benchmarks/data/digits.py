"""Class folders to try `build` on: scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, as images of 64.

python -m benchmarks.data.digits digits
clip-rd-edge build digits --target cpu-x86 -o built
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EDGE = 64


def main() -> None:
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description="Write scikit-learn's digits into a folder for each class.")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--per-class", type=int, default=None, help="the first so many of each class (default: all)")
    arguments = parser.parse_args()
    output, left = arguments.output, dict.fromkeys(range(10), arguments.per_class or len(load_digits().target))
    digits = load_digits()
    for name in NAMES:
        (output / name).mkdir(parents=True)
    for number, (levels, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        left[target] -= 1
        if left[target] < 0:
            continue
        image = Image.fromarray((levels * 255 / 16).round().astype(np.uint8))
        image = image.resize((EDGE, EDGE), Image.Resampling.BICUBIC)
        image.save(output / NAMES[target] / f"{number:04d}.png")


if __name__ == "__main__":
    main()
