"""What ways of cropping photographs do to the accuracy of a teacher and a student that are trained on them.

    clip-rd-edge quickstart -o q
    python -m benchmarks.data.tuxpaint photos
    python -m benchmarks.data.crops_accuracy photos q choose --models student \
        -o benchmarks/results/MACHINE/crops-accuracy-choose.json
    python -m benchmarks.data.crops_accuracy photos q test --crops centre image input \
        -o benchmarks/results/MACHINE/crops-accuracy.json --readme benchmarks/measurements/crops.md
    python -m benchmarks.data.crops_accuracy photos q test --crops full scaled --models student --seeds 3 --steps 60 \
        -o benchmarks/results/MACHINE/decoding-accuracy.json --readme benchmarks/measurements/loading.md

Fine-tunes the quickstart's teacher (`clip`, text tower frozen) and its student (`clip-rd`, with the quickstart's
teacher) for each way and seed, on the photographs whose labels are not in the task, and evaluates on the task: five in
six of them are not square. The photographs are first reduced to a shorter edge of twice the input, so that decoding
does not take most of the time, but for the last two. Ways to crop:

    centre    torchvision's: an aspect ratio of 3:4 to 4:3, and where none fits, the centre crop that is nearest
    image     the image's own aspect ratio, changed a little; wide images are squeezed into a square
    between   an aspect ratio between the image's own and the input's
    input     the shipped one: the input's aspect ratio, changed a little, anywhere in the image; nothing is squeezed
    full      the shipped one, of photographs of full size, with --decode full
    scaled    the same with --decode scaled, which decodes these at a half or a quarter of their size

Runs that the output already has are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
from PIL import Image

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish, write_record
from clip_rd_edge.benchmarking.accuracy import zero_shot
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.preprocess import Box
from clip_rd_edge.data.tasks import ZeroShotTask, load_task
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.exporting.parity import agreement
from clip_rd_edge.utils.structs import read_json

EDGE = 128  # twice the quickstart's input
TEMPLATE = "a {}."  # like the captions
Crop = Callable[[Crops, tuple[int, int], np.random.Generator], Box]
shipped = Crops.draw


def centre(crops: Crops, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """torchvision's RandomResizedCrop."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*crops.scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def image_shaped(crops: Crops, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """The shipped crop for models whose evaluation shows the whole image."""
    return shipped(Crops(scale=crops.scale), size, rng)


def between(crops: Crops, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A crop of an aspect ratio between the image's own and a square's."""
    width, height = size
    return shipped(Crops(scale=crops.scale, aspect_ratio=(width / height) ** rng.uniform()), size, rng)


DECODINGS = ("full", "scaled")
CROPS: dict[str, Crop] = {"centre": centre, "image": image_shaped, "between": between, "input": shipped}
CROPS |= dict.fromkeys(DECODINGS, shipped)


class Run(msgspec.Struct, frozen=True):
    """A model on the task.

    Attributes:
        crop: how its training images were cropped; empty if it was not fine-tuned.
        agreement: mean centred cosine of its embeddings of the task's images with those of the quickstart's teacher.
    """

    model: str
    crop: str
    seed: int
    top1: float
    top5: float
    agreement: float


class Result(msgspec.Struct, frozen=True):
    """All runs on one task; `start` are the models before fine-tuning."""

    machine: str
    date: str
    task: str
    labels: int
    images: int
    pairs: int
    steps: int
    batch_size: int
    start: list[Run]
    runs: list[Run]


def reduce(file: Path, folder: Path) -> Path:
    """Write a photograph with a shorter edge of EDGE pixels, quick to read; return its path."""
    image = Image.open(file)
    scale = min(1.0, EDGE / min(image.size))
    path = folder / f"{file.stem}.bmp"
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS).save(path)
    return path


def load_photographs(photos: Path, name: str, folder: Path, *, of_full_size: bool) -> tuple[ZeroShotTask, Path]:
    """Return a task, and the table of all pairs whose images are not in it, with reduced photographs.

    Args:
        of_full_size: whether those of the table are not reduced.
    """
    task = load_task(str(photos / "tasks" / name))
    assert isinstance(task, ZeroShotTask)
    images = tuple(reduce(Path(str(image)), folder) for image in task.images)
    names = {image.stem for image in images}
    with (photos / "pairs.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if Path(row["filepath"]).stem not in names]
    table = folder / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["filepath", "title"])
        writer.writeheader()
        for row in rows:
            file = photos.resolve() / row["filepath"]
            writer.writerow({**row, "filepath": file if of_full_size else reduce(file, folder)})
    return msgspec.structs.replace(task, images=images, templates=(TEMPLATE,)), table


def train(quickstart: Path, model: str, data: Path, output: Path, *, steps: int, seed: int, decode: str) -> None:
    """Fine-tune the quickstart's teacher or student."""
    start = f"local-dir:{quickstart / model / 'student'}"
    common = {"data": str(data), "student": start, "output": output, "steps": steps, "seed": seed, "workers": 0}
    common |= {"batch_size": 32, "precision": "fp32", "checkpoint_every": steps, "decode": decode}
    if model == "teacher":
        edge.distill(**common, recipe="clip", learning_rate=1e-4, freeze_text=True)  # type: ignore[arg-type]
    else:
        teacher = f"local-dir:{quickstart / 'teacher' / 'student'}"
        edge.distill(**common, recipe="clip-rd", learning_rate=5e-4, teacher=teacher)  # type: ignore[arg-type]


class Evaluator:
    """Evaluates models on a task, and compares them with the quickstart's teacher."""

    def __init__(self, task: ZeroShotTask, teacher: Path) -> None:
        self.task = task
        self._reference = self._images(teacher)

    def __call__(self, model: Path, *, crop: str, seed: int) -> Run:
        answers = zero_shot(edge.load(model).encoder, self.task)
        return Run(
            model=model.name.partition("-")[0],
            crop=crop,
            seed=seed,
            top1=answers.score.top1,
            top5=answers.score.top5 or 0.0,
            agreement=agreement(self._reference, self._images(model)).centred_cosine,
        )

    def _images(self, model: Path) -> Embeddings:
        embeddings: Embeddings = edge.load(model).encode_images([str(image) for image in self.task.images])
        return embeddings


def markdown(result: Result, crops: Sequence[str]) -> str:
    """Return a table: scores per model and crop, and the change in agreement from the first crop, paired by seed."""
    rows = [["model", "crop", "top-1, %", "top-5, %", "agreement", f"agreement − that of `{crops[0]}`"]]
    for start in result.start:
        cells = [f"{100 * start.top1:.1f}", f"{100 * start.top5:.1f}", f"{start.agreement:.4f}"]
        rows.append([start.model, "not fine-tuned", *cells, ""])
        baseline: list[float] = []
        for crop in crops:
            runs = [run for run in result.runs if (run.model, run.crop) == (start.model, crop)]
            scores = [run.agreement for run in runs]
            cells = [_spread([100 * run.top1 for run in runs], 1), _spread([100 * run.top5 for run in runs], 1)]
            change = [score - reference for score, reference in zip(scores, baseline, strict=False)]
            rows.append([start.model, f"`{crop}`", *cells, _spread(scores, 4), _spread(change, 4, sign="+")])
            baseline = baseline or scores
    return markdown_table(rows, left=(0, 1))


def _spread(values: Sequence[float], digits: int, *, sign: str = "") -> str:
    """Return mean ± standard deviation; without the latter for a single value, and nothing for none."""
    if not values:
        return ""
    mean = f"{np.mean(values):{sign}.{digits}f}".replace("-", "−")
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="the folder that tuxpaint.py wrote")
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("task", choices=("choose", "test"))
    parser.add_argument("--crops", nargs="+", choices=CROPS, default=list(CROPS))
    parser.add_argument("--models", nargs="+", choices=("teacher", "student"), default=["teacher", "student"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    add_output_options(parser, "crops-accuracy", required=True)
    parser.add_argument("--marker", help="of the table in the Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        of_full_size = set(arguments.crops) <= set(DECODINGS)
        task, data = load_photographs(arguments.photos, arguments.task, scratch, of_full_size=of_full_size)
        evaluate = Evaluator(task, arguments.quickstart / "teacher")
        result = Result(
            **here_and_now(),
            task=arguments.task,
            labels=len(task.labels),
            images=len(task.images),
            pairs=len(data.read_text(encoding="utf-8").splitlines()) - 1,
            steps=arguments.steps,
            batch_size=32,
            start=[evaluate(arguments.quickstart / model, crop="", seed=0) for model in arguments.models],
            runs=[],
        )
        if arguments.output.is_file():
            result.runs.extend(read_json(arguments.output, Result).runs)
        finished = {(run.seed, run.model, run.crop) for run in result.runs}
        ways = itertools.product(range(arguments.seeds), arguments.models, arguments.crops)
        for seed, model, crop in ways:
            if (seed, model, crop) in finished:
                continue
            output = scratch / f"{model}-{crop}-{seed}"
            with mock.patch.object(Crops, "draw", CROPS[crop]):
                decode = crop if crop in DECODINGS else "full"
                train(arguments.quickstart, model, data, output, steps=arguments.steps, seed=seed, decode=decode)
            run = evaluate(output, crop=crop, seed=seed)
            result.runs.append(run)
            write_record(result, arguments.output)
            scores = f"top-1 {run.top1:.3f}, top-5 {run.top5:.3f}, agreement {run.agreement:.4f}"
            print(f"{model}, {crop}, seed {seed}: {scores}", flush=True)
    publish(result, markdown(result, arguments.crops), arguments)


if __name__ == "__main__":
    main()
