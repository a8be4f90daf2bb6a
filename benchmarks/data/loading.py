"""Compare the loading of training batches with webdataset and torchvision, on one core, in turn.

    pip install webdataset
    python -m benchmarks.data.tuxpaint photos
    python -m benchmarks.data.loading photos -o benchmarks/results/MACHINE/loading.json \\
        --readme benchmarks/measurements/loading.md

Everything reads the same WebDataset shards and delivers batches of 64 crops of 224 pixels as normalised float32. What
counts is processor time, from the shard to the tensors; no loader processes are involved.

    clip-rd-edge              student and teacher, which differ in mean and standard deviation
    webdataset                one model: webdataset, RandomResizedCrop, ToTensor, Normalize, as in open_clip
    webdataset, two models    the same, with a second Normalize

Besides, the pixels are compared with those of `bundle.preprocess.resize_crop`, which resizes with Pillow.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import Preprocessing, resize_crop
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation.loader import ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops, Normaliser, crop_levels

SIZES = ((512, 384), (1536, 1024))
CROPS = Crops(scale=(0.9, 1.0), aspect_ratio=1.0)
BATCH = 64
CPU = torch.device("cpu")
STUDENT = Preprocessing(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TEACHER = msgspec.structs.replace(
    STUDENT, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
Way = Callable[[], Iterator[tuple[Tensor, ...]]]


def write_shard(path: Path, photos: list[Path], size: tuple[int, int]) -> int:
    """Write photographs as JPEGs of one size, with the grain of a camera; return the mean size of a file in bytes."""
    rng, total = np.random.default_rng(0), 0
    with tarfile.open(path, "w") as archive:
        for number, photo in enumerate(photos):
            image = ImageOps.fit(open_image(photo), size, Image.Resampling.LANCZOS)
            pixels = np.asarray(image, dtype=np.float32) + rng.normal(0, 4, (size[1], size[0], 1))
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            total += buffer.tell()
            for name, content in ((f"{number:04d}.jpg", buffer.getvalue()), (f"{number:04d}.txt", photo.stem.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return total // len(photos)


def ours(shard: Path) -> Way:
    pairs = load_pairs(str(shard))
    dataset = ViewDataset(pairs, STUDENT, [TEACHER], crops=CROPS, seed=0)
    student, teacher = Normaliser(STUDENT, CPU), Normaliser(TEACHER, CPU)

    def load() -> Iterator[tuple[Tensor, ...]]:
        for batch in step_loader(
            dataset, StepSampler(pairs.groups, BATCH, seed=0, start=0, stop=len(pairs) // BATCH), workers=0
        ):
            yield student(batch.student_pixels), teacher(batch.teacher_pixels[0])

    return load


def webdatasets(shard: Path, models: list[Preprocessing]) -> Way:
    import webdataset

    crop = transforms.RandomResizedCrop(
        STUDENT.size, scale=CROPS.scale, interpolation=transforms.InterpolationMode.BICUBIC
    )
    to_tensor = transforms.ToTensor()
    normalise = [transforms.Normalize(model.mean, model.std) for model in models]

    def transform(image: Image.Image) -> tuple[Tensor, ...]:
        pixels = to_tensor(crop(image))
        return tuple(call(pixels) for call in normalise)

    def load() -> Iterator[tuple[Tensor, ...]]:
        samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("pilrgb")
        batch: list[tuple[Tensor, ...]] = []
        for image, _ in samples.to_tuple("jpg", "txt"):
            batch.append(transform(image))
            if len(batch) == BATCH:
                yield tuple(torch.stack(column) for column in zip(*batch, strict=True))
                batch = []

    return load


def time_ways(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Return processor seconds per image of each way and round, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start, images = time.process_time(), 0
            for batch in way():
                assert batch[0].shape == (BATCH, 3, 224, 224)
                assert batch[0].dtype == torch.float32
                images += len(batch[0])
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - start) / images)
    return seconds


def compare_pixels(shard: Path) -> dict[str, float]:
    """Compare crops with those of Pillow: the largest difference in grey levels, and the shares above 0 and above 1."""
    pairs, differences = load_pairs(str(shard)), []
    for index in range(len(pairs)):
        image = pairs.read(index).image()
        box = CROPS.draw(image.size, np.random.default_rng(index))
        (levels,) = crop_levels(image, box, [STUDENT])
        differences.append(np.abs(levels.astype(int) - np.asarray(resize_crop(image, box, STUDENT)).astype(int)))
    values = np.stack(differences)
    return {"max": int(values.max()), "above_0": float((values > 0).mean()), "above_1": float((values > 1).mean())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path, help="the folder that tuxpaint.py wrote")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    add_output_options(parser, "loading", required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    photos = sorted((arguments.photos / "images").iterdir())[: arguments.images]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            shard = Path(folder) / f"{size[0]}.tar"
            file_bytes = write_shard(shard, photos, size)
            ways = {
                "clip-rd-edge": ours(shard),
                "webdataset": webdatasets(shard, [STUDENT]),
                "webdataset, two models": webdatasets(shard, [STUDENT, TEACHER]),
            }
            seconds = time_ways(ways, arguments.rounds)
            ratios = {name: sorted(np.asarray(seconds[name]) / np.asarray(seconds["clip-rd-edge"])) for name in ways}
            rows.append(
                {
                    "size": size,
                    "file_bytes": file_bytes,
                    "images_per_second": {
                        name: round(1 / float(np.median(values))) for name, values in seconds.items()
                    },
                    "speed_up": {
                        name: [round(float(np.quantile(values, q)), 2) for q in (0, 0.5, 1)]
                        for name, values in ratios.items()
                    },
                    "pixels": compare_pixels(shard),
                }
            )
            print(rows[-1])
    levels = STUDENT.size[0] * STUDENT.size[1] * 3
    result = {
        **here_and_now(),
        "versions": {name: version(name) for name in ("pillow", "torch", "torchvision", "webdataset")},
        "images": len(photos),
        "rounds": arguments.rounds,
        "sizes": rows,
        "bytes_per_image": {"clip-rd-edge": levels, "float32 for two models": 2 * 4 * levels},
    }
    publish(result, markdown(rows), arguments)


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| JPEG | ours, images per second | webdataset | its time / ours | for two models |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size, rates, ratios = row["size"], row["images_per_second"], row["speed_up"]
        assert isinstance(size, tuple)
        assert isinstance(rates, dict)
        assert isinstance(ratios, dict)
        cells = [f"{rates[name]:,}" for name in ("clip-rd-edge", "webdataset")]
        for name in ("webdataset", "webdataset, two models"):
            low, middle, high = ratios[name]
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {size[0]} × {size[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
