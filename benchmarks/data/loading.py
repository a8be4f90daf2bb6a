"""Compare the loading of training batches with webdataset and torchvision, on one core, in turn.

    pip install webdataset
    python -m benchmarks.data.tuxpaint photos
    python -m benchmarks.data.loading photos -o benchmarks/results/MACHINE/loading.json \\
        --readme benchmarks/measurements/loading.md

Everything reads the same WebDataset shards, crops the same boxes, and delivers batches of 16 crops of 224 pixels as
normalised float32. What counts is processor time, from the shard to the tensors; no loader processes are involved.

    scaled                    student and teacher, which differ in mean and standard deviation
    full                      the same with --decode full
    webdataset                one model: webdataset, torchvision's crop and resize, ToTensor, Normalize, as in open_clip
    webdataset, two models    the same, with a second Normalize

Besides, the pixels of `full` are compared with those of `bundle.preprocess.resize_crop`, which resizes with Pillow, and
those of `scaled` with those of `full`.

Then, steps of 64 pairs that take STEP_S, as on a GPU, are fed by loader processes that take as long for an image as was
measured. Processes and steps are simulated, on a machine of CORES cores; how many processes there are is decided by the
package.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tarfile
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from benchmarks.publishing import add_output_options, here_and_now, publish, write_record
from clip_rd_edge.bundle.images import open_image, open_to_crop
from clip_rd_edge.bundle.preprocess import Preprocessing, fast_decode_edge, resize_crop
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.order import StepSampler, View
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.distillation import loader
from clip_rd_edge.distillation.loader import Batch, ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops, Normaliser, crop_levels

SIZES = ((512, 384), (1152, 864), (1536, 1024), (2592, 1944), (4032, 3024))
WAITING = (1152, 2592, 4032)  # widths of 1, 5 and 12 megapixels
STEP_S, STEP_PAIRS, CORES = 0.2, 64, 16
CROPS = Crops(scale=(0.9, 1.0), aspect_ratio=1.0, decode="scaled")
FULL = msgspec.structs.replace(CROPS, decode="full")
BATCH = 16
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


def ours(shard: Path, crops: Crops) -> Way:
    pairs = load_pairs(str(shard))
    dataset = ViewDataset(pairs, STUDENT, [TEACHER], crops=crops, seed=0)
    student, teacher = Normaliser(STUDENT, CPU), Normaliser(TEACHER, CPU)

    def load() -> Iterator[tuple[Tensor, ...]]:
        for batch in step_loader(
            dataset, StepSampler(pairs.groups, BATCH, seed=0, steps=range(len(pairs) // BATCH)), workers=0
        ):
            yield student(batch.student_pixels), teacher(batch.teacher_pixels[0])

    return load


def webdatasets(shard: Path, models: list[Preprocessing]) -> Way:
    import webdataset

    to_tensor = transforms.ToTensor()
    normalise = [transforms.Normalize(model.mean, model.std) for model in models]

    def transform(image: Image.Image, key: str) -> tuple[Tensor, ...]:
        # The box of the first view: by seed, epoch and index; of one caption the choice is drawn first.
        rng = np.random.default_rng((0, 0, int(key)))
        rng.integers(1)
        left, top, right, bottom = map(int, FULL.draw(image.size, rng))
        bicubic = transforms.InterpolationMode.BICUBIC
        crop = functional.resized_crop(image, top, left, bottom - top, right - left, list(STUDENT.size), bicubic)
        pixels = to_tensor(crop)
        return tuple(call(pixels) for call in normalise)

    def load() -> Iterator[tuple[Tensor, ...]]:
        samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("pilrgb")
        batch: list[tuple[Tensor, ...]] = []
        for key, image, _ in samples.to_tuple("__key__", "jpg", "txt"):
            batch.append(transform(image, key))
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


def compare_pixels(shard: Path) -> dict[str, dict[str, float]]:
    """Compare crops of `full` with those of Pillow, and those of `scaled` with those of `full`, in grey levels."""
    pairs: Samples = load_pairs(str(shard))
    differences: dict[str, list[npt.NDArray[np.int64]]] = {"full": [], "scaled": []}
    for index in range(len(pairs)):
        file = pairs.read(index).file
        assert file is not None
        image, box = open_to_crop(file, partial(FULL.draw, rng=np.random.default_rng(index)), min_edge=None)
        quick, own = open_to_crop(file, lambda size, box=box: box, min_edge=fast_decode_edge(STUDENT))
        if (times := image.width // quick.width) > 1:  # of the same box, which `scaled` rounds to its larger pixels
            left, top, right, bottom = (float(times * round(edge)) for edge in own)
            box = left, top, right, bottom
        (levels,), (scaled,) = crop_levels(image, box, [STUDENT]), crop_levels(quick, own, [STUDENT])
        for name, other in (("full", np.asarray(resize_crop(image, box, STUDENT))), ("scaled", scaled)):
            differences[name].append(np.abs(levels.astype(int) - other.astype(int)))
    return {
        name: {
            "mean": round(float(np.mean(values)), 3),
            "max": int(np.max(values)),
            "above_0": round(float(np.mean(np.greater(values, 0))), 5),
            "above_1": round(float(np.mean(np.greater(values, 1))), 5),
        }
        for name, values in differences.items()
    }


class Clock:
    """The time of a simulation, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def wait_for_data(seconds: float, *, workers: int) -> dict[str, object]:
    """Return what share of the last 30 steps waits for its batch, of their time, too, and how many loaders there are.

    Args:
        seconds: for an image on one core.
        workers: -1 for as many as the tool takes on a machine of CORES cores.
    """
    clock, notes, waits = Clock(), list[str](), list[float]()
    empty = torch.zeros(0, dtype=torch.uint8)

    def load(dataset: object, steps: Iterable[list[View]], count: int) -> Iterator[Batch]:
        """Load as torch does: each process in turn, and two batches ahead."""
        free, ready, asked = [clock.now] * count, deque[float](), enumerate(steps)

        def ask() -> None:
            for number, _ in itertools.islice(asked, 1):
                free[number % count] = max(free[number % count], clock.now) + STEP_PAIRS * seconds
                ready.append(free[number % count])

        for _ in range(2 * count):
            ask()
        while ready:
            clock.now = max(clock.now, ready.popleft())
            ask()
            yield Batch(empty, (), [])

    machine: dict[str, Any]
    machine = {"usable_cores": lambda: CORES, "most_workers": lambda batch: CORES - 1, "time": clock, "_load": load}
    with mock.patch.multiple(loader, **machine):
        asked = clock.now
        views = ([View(0, 0)] for _ in range(500))
        for _ in step_loader(None, views, workers=workers, note=notes.append):  # type: ignore[arg-type]
            waits.append(clock.now - asked)
            clock.now += STEP_S
            asked = clock.now
    last = np.asarray(waits[-30:])
    chosen = [int(note.rpartition(" ")[2]) for note in notes if "there will be" in note]
    return {
        "workers": workers if workers > 0 else (chosen or [CORES // 2])[-1],
        "chosen_by": "hand" if workers > 0 else "measured wait",
        "steps_that_wait": round(float((last > 0.1 * STEP_S).mean()), 2),
        "share_of_time": round(float(last.sum() / (last.sum() + len(last) * STEP_S)), 2),
        "notes": notes,
    }


def measure(size: tuple[int, int], photos: list[Path], rounds: int) -> dict[str, Any]:
    """Measure all ways of loading JPEGs of a size."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / f"{size[0]}.tar"
        file_bytes = write_shard(shard, photos[: len(photos) // 4] if size[0] > 2000 else photos, size)
        ways = {
            "scaled": ours(shard, CROPS),
            "full": ours(shard, FULL),
            "webdataset": webdatasets(shard, [STUDENT]),
            "webdataset, two models": webdatasets(shard, [STUDENT, TEACHER]),
        }
        seconds = time_ways(ways, rounds)
        one = {name: float(np.median(values)) for name, values in seconds.items()}
        ratios = {name: sorted(np.asarray(seconds[name]) / np.asarray(seconds["scaled"])) for name in ways}
        return {
            "size": size,
            "file_bytes": file_bytes,
            "ms_per_image": {name: round(1000 * value, 2) for name, value in one.items()},
            "speed_up": {
                name: [round(float(np.quantile(values, q)), 2) for q in (0, 0.5, 1)] for name, values in ratios.items()
            },
            "pixels": compare_pixels(shard),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path, help="the folder that tuxpaint.py wrote")
    parser.add_argument("--images", type=int, default=4 * BATCH, help="a quarter of them for 5 and 12 megapixels")
    parser.add_argument("--rounds", type=int, default=2)
    add_output_options(parser, "loading", required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    photos = sorted((arguments.photos / "images").iterdir())[: arguments.images]
    levels = STUDENT.size[0] * STUDENT.size[1] * 3
    result: dict[str, Any] = {
        **here_and_now(),
        "versions": {name: version(name) for name in ("pillow", "torch", "torchvision", "webdataset")},
        "images": len(photos),
        "rounds": arguments.rounds,
        "bytes_per_image": {"clip-rd-edge": levels, "float32 for two models": 2 * 4 * levels},
        "waiting": {"step_s": STEP_S, "pairs_per_step": STEP_PAIRS, "cores": CORES},
        "sizes": [],
    }
    rows: list[dict[str, Any]] = result["sizes"]
    if arguments.output.is_file():  # sizes that it has are not measured again
        rows += json.loads(arguments.output.read_text())["sizes"]
    for size in SIZES[len(rows) :]:
        rows.append(measure(size, photos, arguments.rounds))
        write_record(result, arguments.output)
    for row in rows:
        row["waiting"] = [
            {"decode": decode, **wait_for_data(row["ms_per_image"][decode] / 1000, workers=workers)}
            for decode in ("full", "scaled")
            for workers in ((2, -1) if row["size"][0] in WAITING else ())
        ]
    publish(result, markdown(rows), arguments)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| JPEG | scaled, ms an image | full | webdataset | its time / scaled | for two models | mean difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row['ms_per_image'][name]:.1f}" for name in ("scaled", "full", "webdataset")]
        for name in ("webdataset", "webdataset, two models"):
            low, middle, high = row["speed_up"][name]
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cells.append(f"{row['pixels']['scaled']['mean']:.2f} of 255")
        lines.append(f"| {row['size'][0]} × {row['size'][1]} | {' | '.join(cells)} |")
    lines += [
        "",
        "| JPEG | decode | 2 loaders: steps that wait, share of the time | the tool takes | then |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        for two, own in zip(row["waiting"][::2], row["waiting"][1::2], strict=True):
            waits = [f"{one['steps_that_wait']:.0%}, {one['share_of_time']:.0%}" for one in (two, own)]
            size = f"{row['size'][0]} × {row['size'][1]}"
            lines.append(f"| {size} | {two['decode']} | {waits[0]} | {own['workers']} | {waits[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
