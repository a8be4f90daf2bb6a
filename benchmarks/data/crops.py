"""Compare the boxes of training crops with those of torchvision's RandomResizedCrop, for images of twelve shapes.

python -m benchmarks.data.crops -o benchmarks/results/MACHINE/crops.json --readme benchmarks/measurements/crops.md

Draws only; no image is read. Both get the default range of areas, and torchvision its default aspect ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torchvision.transforms import RandomResizedCrop

from benchmarks.publishing import add_output_options, publish
from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.pixels import Crops

CROPS = Crops(scale=load_recipe("clip-rd").crop_scale, aspect_ratio=1.0)
SIZES = (
    (72, 72), (224, 224), (1000, 1000), (640, 480), (480, 640), (512, 384), (500, 333), (1500, 1000), (1000, 1500),
    (1280, 720), (1920, 1080), (2400, 1000),
)  # fmt: skip
DRAWS = 2000
Boxes = npt.NDArray[np.float64]  # left, top, right, bottom in pixels, (N, 4)


def ours(size: tuple[int, int]) -> Boxes:
    rng = np.random.default_rng(0)
    return np.asarray([CROPS.draw(size, rng) for _ in range(DRAWS)])


def torchvisions(size: tuple[int, int]) -> Boxes:
    torch.manual_seed(0)
    image = torch.empty(1, size[1], size[0])
    draws = [RandomResizedCrop.get_params(image, list(CROPS.scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    return np.asarray([(left, top, left + width, top + height) for top, left, height, width in draws], dtype=np.float64)


def describe(boxes: Boxes, size: tuple[int, int]) -> dict[str, object]:
    """Return how the boxes are distributed; areas and positions are fractions of the image."""
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / (size[0] * size[1])
    ratio = (right - left) / (bottom - top)
    _, counts = np.unique(boxes, axis=0, return_counts=True)
    centre_x, centre_y = (left + right) / 2 / size[0], (top + bottom) / 2 / size[1]

    def quantiles(values: npt.NDArray[np.float64]) -> list[float]:
        return [round(float(value), 3) for value in np.quantile(values, (0.05, 0.5, 0.95))]

    return {
        "distinct": len(counts),
        "most_frequent": float(counts.max() / DRAWS),
        "area": quantiles(area),
        "aspect_ratio": quantiles(ratio),
        "centre_x": quantiles(centre_x),
        "centre_y": quantiles(centre_y),
        "views_of_eight": len(np.unique(boxes[:8], axis=0)),
    }


def markdown(rows: list[dict[str, object]]) -> str:
    """Return the table; in each cell torchvision's figure, then ours."""
    lines = [
        "| image | distinct boxes of 2,000 | different views of 8 | area kept | aspect ratio |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        theirs, mine = row["torchvision"], row["clip-rd-edge"]
        assert isinstance(theirs, dict)
        assert isinstance(mine, dict)
        cells = [f"{theirs[key]:,} → {mine[key]:,}" for key in ("distinct", "views_of_eight")]
        for key in ("area", "aspect_ratio"):
            (low, middle, high), (my_low, my_middle, my_high) = theirs[key], mine[key]
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f}) → {my_middle:.2f} ({my_low:.2f}–{my_high:.2f})")
        lines.append(f"| {row['size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    add_output_options(parser, "crops", required=True)
    arguments = parser.parse_args()
    draw: dict[str, Callable[[tuple[int, int]], Boxes]] = {"torchvision": torchvisions, "clip-rd-edge": ours}
    rows: list[dict[str, object]] = [
        {
            "size": f"{width} × {height}",
            **{name: describe(call((width, height)), (width, height)) for name, call in draw.items()},
        }
        for width, height in SIZES
    ]
    result = {"scale": CROPS.scale, "draws": DRAWS, "torchvision": torchvision.__version__, "rows": rows}
    publish(result, markdown(rows), arguments)


if __name__ == "__main__":
    main()
