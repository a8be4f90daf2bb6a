"""What a few images of each label bring: `clip-rd-edge teach` beside zero-shot and a plain linear probe.

    python -m benchmarks.training.taught everyday quickstart/teacher --work taught \
        -o benchmarks/results/MACHINE/taught.json --readme benchmarks/measurements/taught.md

Needs scikit-learn, for the probe and its digits, the extra `emoji`, and Debian's tuxpaint-stamps-default (`--deb`, or
fetched with apt-get). 1, 2, 4, 8 and 16 images of each label in five draws, on

    photographs   40 cut-out photographs of Tux Paint, each on 26 grounds: the object is the same, its surroundings vary
    emoji         40 emoji: taught in Twemoji's style, asked in OpenMoji's
    digits        scikit-learn's handwritten digits, of which 16 are taught and 98 are asked

The method's constants were chosen on `--choose`: other labels, and other images of the digits. `zero-shot` has the
labels' texts alone; `probe` is a logistic regression on the embeddings. `beside` teaches half of the labels, leaves the
others their texts, and gives the accuracy on the images of either half, with zero-shot's in brackets.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

import clip_rd_edge as edge
from benchmarks.data.tuxpaint import FRAMES, Stamp, compose, fetch, is_photograph, read_stamps, task_of
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.metrics import accuracy_interval, calibration_error
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import Scoring, label_embeddings
from clip_rd_edge.bundle.labels import LabelBank, Taught
from clip_rd_edge.bundle.reference import reference_images
from clip_rd_edge.data.emoji import concepts, draw_images
from clip_rd_edge.runtime.labels import NO_LABELS
from clip_rd_edge.runtime.taught import taught_bank

SHOTS, DRAWS, LABELS, EDGE = (1, 2, 4, 8, 16), 5, 40, 384
Rows = npt.NDArray[np.float32]


class Task(NamedTuple):
    """Images with their labels' numbers, those to teach with (`pool`) and those to ask."""

    name: str
    labels: list[str]
    images: list[Any]
    numbers: list[int]
    pool: list[bool]


class Embedded(NamedTuple):
    """A task's embeddings."""

    images: Rows
    numbers: npt.NDArray[np.int64]
    pool: npt.NDArray[np.bool_]
    texts: Rows
    none: Rows
    scoring: Scoring


def photographs(folder: Path, deb: Path | None, split: str) -> Task:
    """Compose the photographs once into a folder."""
    if not (folder / split).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            package = deb or fetch(Path(scratch))
            subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
            by_label: dict[str, list[Stamp]] = {}
            for stamp in read_stamps(Path(scratch) / "usr/share/tuxpaint/stamps"):
                if task_of(stamp.label) == split and is_photograph(stamp):
                    by_label.setdefault(stamp.label, []).append(stamp)
            for number, label in enumerate(sorted(by_label)[:LABELS]):
                (folder / split / label).mkdir(parents=True)
                for view in range(26):
                    stamp = by_label[label][view % len(by_label[label])]
                    cut_out = Image.open(stamp.path).convert("RGBA")
                    image = compose(cut_out, FRAMES[(number + view) % 6], np.random.default_rng((7, number, view)))
                    image.thumbnail((EDGE, EDGE))
                    image.save(folder / split / label / f"{view:02d}.jpg", quality=90)
    classes = sorted((folder / split).iterdir())
    files = [
        (path, number, at < 16)
        for number, inner in enumerate(classes)
        for at, path in enumerate(sorted(inner.iterdir()))
    ]
    return Task("photographs", [inner.name for inner in classes], *map(list, zip(*files, strict=True)))  # type: ignore[arg-type]


def emoji(split: str) -> Task:
    folder, unseen = draw_images(), [concept for concept in concepts() if concept.split == "unseen concepts"]
    chosen = unseen[(split == "test") : 2 * LABELS : 2]
    images, numbers, pool = [], [], []
    for number, concept in enumerate(chosen):
        for view in range(22):
            style = "twemoji" if view < 16 else "openmoji"
            images.append(turned(folder / style / f"{concept.code}.png", np.random.default_rng((number, view))))
            numbers.append(number)
            pool.append(view < 16)
    return Task("emoji", [concept.name for concept in chosen], images, numbers, pool)


def turned(path: Path, rng: np.random.Generator) -> Image.Image:
    """Return a drawing at some size, angle and place of a white square."""
    edge_ = int(rng.integers(48, 100))
    image = Image.open(path).convert("RGB").resize((edge_, edge_))
    image = image.rotate(float(rng.uniform(-20, 20)), fillcolor=(255, 255, 255), resample=Image.Resampling.BICUBIC)
    square = Image.new("RGB", (112, 112), (255, 255, 255))
    square.paste(image, tuple(rng.integers(0, 113 - edge_, 2).tolist()))
    return square


def digits(split: str) -> Task:
    from sklearn.datasets import load_digits

    data, names = load_digits(), ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    images, numbers, pool = [], [], []
    for digit in range(10):
        own = np.flatnonzero(data.target == digit)
        for at, index in enumerate(own[60:174] if split == "test" else own[:60]):
            levels = (255 - np.minimum(data.images[index] * 16, 255)).astype(np.uint8)
            images.append(Image.fromarray(levels).resize((128, 128), Image.Resampling.BICUBIC).convert("RGB"))
            numbers.append(digit)
            pool.append(at < 16)
    return Task("digits", [f"the digit {name}" for name in names], images, numbers, pool)


def embedded(model: str, task: Task, file: Path) -> Embedded:
    """Embed a task once into a file."""
    opened: edge.Model | None = None
    if not file.is_file():
        opened = edge.load(model, threads=1)
        description = opened.describe()
        texts = label_embeddings(opened.encoder, task.labels, description.templates)
        none = opened.encode_images(list(reference_images(description.preprocessing.size)))
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"images": opened.encode_images(task.images), "texts": texts, "none": none}
        np.savez(file, scale=description.logit_scale, bias=description.logit_bias or np.nan, **arrays)
    kept = np.load(file)
    bias = None if np.isnan(kept["bias"]) else float(kept["bias"])
    numbers, pool = np.array(task.numbers), np.array(task.pool)
    return Embedded(kept["images"], numbers, pool, kept["texts"], kept["none"], Scoring(float(kept["scale"]), bias))


def drawn(data: Embedded, shots: int, seed: int, labels: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the images to teach with: so many of each label."""
    rng = np.random.default_rng((seed, shots))
    pools = [np.flatnonzero((data.numbers == label) & data.pool) for label in labels]
    return np.concatenate([rng.permutation(pool)[:shots] for pool in pools])


def taught(
    data: Embedded, chosen: npt.NDArray[np.int64], labels: Sequence[int], others: Sequence[int]
) -> tuple[Rows, float]:
    """Return the rows of taught labels and of others, and the seconds that they took."""
    own = np.array([list(labels).index(number) for number in data.numbers[chosen]], np.int32)
    rows = np.concatenate([data.none, data.images[chosen]]).astype(np.float16)
    classes = np.concatenate([np.full(len(data.none), -1, np.int32), own])
    names = tuple(str(label) for label in labels)
    content = Taught(names, data.texts[list(labels)], np.zeros(len(names), np.bool_), rows, classes, "")
    beside = LabelBank(tuple(str(label) for label in others), data.texts[list(others)]) if len(others) else NO_LABELS
    started = time.perf_counter()
    bank, _ = taught_bank(content, beside, data.scoring)
    return bank.embeddings, time.perf_counter() - started


def measure(data: Embedded) -> dict[str, Any]:
    """Return mean, deviation and lowest accuracy over the draws, by shots and way."""
    count, asked = len(data.texts), ~data.pool
    images, truth = data.images[asked], data.numbers[asked]
    zero = (images @ data.texts.T).argmax(axis=1) == truth
    interval = accuracy_interval(zero)
    result: dict[str, Any] = {
        "labels": count, "asked": len(truth), "zero-shot": float(zero.mean()), "low": interval.low,
        "high": interval.high, "shots": {},
    }  # fmt: skip
    for shots in SHOTS:
        rows: dict[str, list[float]] = {}
        for seed in range(DRAWS):
            for name, value in one_draw(data, shots, seed, images, truth):
                rows.setdefault(name, []).append(value)
        result["shots"][shots] = {
            name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "min": min(values)}
            for name, values in rows.items()
        }
    return result


def one_draw(
    data: Embedded, shots: int, seed: int, images: Rows, truth: npt.NDArray[np.int64]
) -> Iterator[tuple[str, float]]:
    from sklearn.linear_model import LogisticRegression

    everything, count = range(len(data.texts)), len(data.texts)
    chosen = drawn(data, shots, seed, everything)
    rows, seconds = taught(data, chosen, everything, [])
    probabilities = data.scoring.probabilities(images, rows)
    hits = probabilities.argmax(axis=1) == truth
    yield "taught", float(hits.mean())
    yield "calibration error", calibration_error(probabilities.max(axis=1), hits)
    yield "seconds", seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = LogisticRegression(C=100, max_iter=500).fit(data.images[chosen], data.numbers[chosen])
    yield "probe", float((probe.predict(images) == truth).mean())
    order = np.random.default_rng(seed).permutation(count)
    half, others = order[: count // 2].tolist(), order[count // 2 :].tolist()
    rows, _ = taught(data, drawn(data, shots, seed, half), half, others)
    answers = np.array([*half, *others])[data.scoring.probabilities(images, rows).argmax(axis=1)]
    by_text = (images @ data.texts.T).argmax(axis=1)
    for name, part in (("half taught", half), ("half by texts", others)):
        own = np.isin(truth, part)
        yield name, float((answers == truth)[own].mean())
        yield f"{name}, zero-shot", float((by_text == truth)[own].mean())


def percent(figure: dict[str, float]) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['sd']:.1f}"


def table(record: dict[str, Any]) -> str:
    headings = ["model", "images", "zero-shot", "of each", "taught", "probe", "half taught", "others by text"]
    rows = []
    for model, tasks in record["models"].items():
        for task, result in tasks.items():
            for shots, figures in result["shots"].items():
                first = str(shots) == str(SHOTS[0])
                zero = f"{100 * result['zero-shot']:.1f} ({100 * result['low']:.1f} to {100 * result['high']:.1f})"
                half = [
                    f"{100 * figures[name]['mean']:.1f} ({100 * figures[f'{name}, zero-shot']['mean']:.1f})"
                    for name in ("half taught", "half by texts")
                ]
                ways = [percent(figures["taught"]), percent(figures["probe"]), *half]
                rows.append([model if first else "", task if first else "", zero if first else "", str(shots), *ways])
    return markdown_table([headings, *rows], left=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a few images of each label bring.")
    parser.add_argument("models", nargs="+", help="bundles, or anything that `load` takes")
    parser.add_argument("--work", type=Path, default=Path("taught"), help="folder of images and embeddings")
    parser.add_argument("--deb", type=Path, help="the file of Debian's package; default: fetched with apt-get")
    parser.add_argument("--choose", action="store_true", help="the labels that choices are made on")
    add_output_options(parser, "taught")
    arguments = parser.parse_args()
    split = "choose" if arguments.choose else "test"
    tasks = [photographs(arguments.work / "photographs", arguments.deb, split), emoji(split), digits(split)]
    record: dict[str, Any] = {**here_and_now(), "split": split, "draws": DRAWS, "models": {}}
    for model in arguments.models:
        name = Path(model).name
        files = {task.name: arguments.work / f"{name}-{split}-{task.name}.npz" for task in tasks}
        record["models"][name] = {task.name: measure(embedded(model, task, files[task.name])) for task in tasks}
        for task, result in record["models"][name].items():
            worst = min(figures["taught"]["min"] for figures in result["shots"].values())
            print(f"{name}, {task}: lowest of all draws {worst:.3f}, zero-shot from {result['low']:.3f}", flush=True)
    publish(record, table(record), arguments)


if __name__ == "__main__":
    main()
