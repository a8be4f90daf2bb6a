"""How an image classifier and a sentence encoder are best stitched, and how well the result sees photographs.

    python -m benchmarks.data.tuxpaint photos
    python -m benchmarks.training.stitched_teacher photos -o benchmarks/results/MACHINE/stitched-teacher.json

EfficientNet-Lite0 and MiniLM-L6, from the packages of the extra `emoji`. Names and projection are chosen on the task
`choose`; the figures of the task `test` are for the choice alone.

With `--before` and `--after`, a stitched model before and after fine-tuning, the weights between the two are evaluated
on the photographs of `choose` and on the emoji of the test splits.

With `--models`, finished models such as a quickstart's `teacher-untuned`, `teacher` and `student` are evaluated on the
photographs of `test` and on the emoji, and nothing else is done; their figures are added to those in the output:

    python -m benchmarks.training.stitched_teacher photos --models quickstart/teacher-untuned quickstart/teacher \
        -o benchmarks/results/MACHINE/stitched-teacher.json

With `--seeds`, a stitched model of 112 pixels is taught emoji with each seed in the folder `--runs`, and a student with
the image tower of each, two of the six layers of its text tower and 7,500 of its tokens learns texts alone. All are
evaluated as with `--models`, with mean and standard deviation over the seeds. The same command resumes:

    python -m benchmarks.training.stitched_teacher photos --seeds 0 1 2 3 4 --runs sees \
        -o benchmarks/results/MACHINE/stitched-teacher.json

With `--labels`, the labels of the test tasks are written, one per line, for a bundle that knows them alone:

    python -m benchmarks.training.stitched_teacher photos --labels labels.txt
    clip-rd-edge export sees/teacher-0 --precision int8 --calibration emoji --labels labels.txt --no-text-tower -o int8
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.publishing import here_and_now, write_record
from clip_rd_edge.benchmarking.accuracy import evaluate
from clip_rd_edge.benchmarking.metrics import accuracy_interval
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.data.tasks import ZeroShotTask, load_task
from clip_rd_edge.models.classifiers import ImageClassifier, load_classifier
from clip_rd_edge.models.edit import interpolate_clip
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.stitch import (
    RIDGE,
    SentenceEncoder,
    class_embeddings,
    load_sentence_encoder,
    read_class_names,
    solve_projection,
)
from clip_rd_edge.pipeline import captions_and_nouns

EMOJI = ("unseen-style", "unseen-concepts")
CHOOSE_SIZE = 96
STITCH = "stitch tf_efficientnet_lite0 --names imagenet --text all-MiniLM-L6-v2 --image-size 112 --context-length 16"
TEACH = (
    "distill --data emoji --recipe clip --freeze-text --freeze-norms --freeze-image 6 --tuned-share 0.75 --steps 300 "
    "--batch-size 64 --lr 1e-3 --precision fp32"
)
TRIM = "trim --text-layers 2 --vocabulary 7500"
DISTIL = "distill --steps 1000 --batch-size 256 --lr 5e-4 --precision fp32"
SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
Score = dict[str, Any]


def names_of_imagenet() -> dict[str, Sequence[Sequence[str]]]:
    info = ImageNetInfo()
    full = [str(info.index_to_description(index)) for index in range(info.num_classes())]
    synonyms = [name.split(", ") for name in full]
    return {
        "first synonym": [names[:1] for names in synonyms],
        "synonyms in one text": [[name] for name in full],
        "mean of synonyms": synonyms,
        "mean of synonyms and description": read_class_names("imagenet"),
    }


def transposed(weight: Tensor, names: Tensor) -> Tensor:
    return (names - names.mean(0)).T @ (weight - weight.mean(0))


def procrustes(weight: Tensor, names: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(transposed(weight, names), full_matrices=False)
    return left @ right


PROJECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transposed: Tᵀ W": transposed,
    "Procrustes": procrustes,
    **{f"ridge {r:g}": (lambda w, t, r=r: solve_projection(w, t, ridge=r)) for r in (0.03, 0.1, RIDGE, 1.0, 3.0)},
}


@torch.no_grad()
def features(classifier: ImageClassifier, task: ZeroShotTask, size: int) -> Tensor:
    preprocessing = Preprocessing(size=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = []
    for start in range(0, len(task.images), 32):
        images = [open_image(path) for path in task.images[start : start + 32]]
        pixels = np.stack([preprocess(image, preprocessing) for image in images])
        batches.append(classifier.features(torch.from_numpy(pixels)))
    return torch.cat(batches)


def score(image: Tensor, text: Tensor, targets: Sequence[int]) -> Score:
    order = (normalize(image, dim=-1) @ text.T).argsort(dim=1, descending=True)[:, :5].numpy()
    hits = order == np.asarray(targets)[:, None]
    interval = accuracy_interval(hits[:, 0])
    return {
        "top1": float(hits[:, 0].mean()),
        "low": interval.low,
        "high": interval.high,
        "top5": float(hits.any(1).mean()),
    }


def stitched(photos: Path, sentences: SentenceEncoder, sizes: Sequence[int]) -> dict[str, list[Score]]:
    classifier = load_classifier("tf_efficientnet_lite0")
    weight = classifier.head.weight.detach()
    task = load_zero_shot(photos / "tasks" / "choose")
    image, labels = features(classifier, task, CHOOSE_SIZE), list(task.labels)
    choices = []
    for names, texts in names_of_imagenet().items():
        embeddings = class_embeddings(sentences, texts)
        for name, solve in PROJECTIONS.items():
            result = score(image @ solve(weight, embeddings).T, sentences.encode(labels), task.targets)
            choices.append({"names": names, "projection": name, "size": CHOOSE_SIZE, **result})
    task = load_zero_shot(photos / "tasks" / "test")
    projection = solve_projection(weight, class_embeddings(sentences, read_class_names("imagenet")))
    text = sentences.encode(list(task.labels))
    tested = [
        {"size": size, **score(features(classifier, task, size) @ projection.T, text, task.targets)} for size in sizes
    ]
    return {"choose": choices, "test": tested}


def between(before: Path, after: Path, photos: Path) -> list[Score]:
    """Evaluate the interpolation of two models by the share of the second."""
    start, end = load_clip(str(before)), load_clip(str(after))
    tasks = {"photographs": load_zero_shot(photos / "tasks" / "choose")}
    tasks |= {name: load_zero_shot(f"emoji:{name}") for name in EMOJI}
    rows = []
    for share in SHARES:
        encoder = TorchEncoder(interpolate_clip(start, end, share=share))
        rows.append({"share": share, **{name: top(encoder, task) for name, task in tasks.items()}})
    return rows


def test_tasks(photos: Path) -> dict[str, ZeroShotTask]:
    """Return the tasks by which finished models are judged."""
    return {
        "photographs": load_zero_shot(photos / "tasks" / "test"),
        **{name: load_zero_shot(f"emoji:{name}") for name in EMOJI},
    }


def finished(model: Path, photos: Path) -> Score:
    """Evaluate a finished model on the photographs of `test` and on the emoji."""
    encoder = TorchEncoder(load_clip(str(model)))
    tasks = test_tasks(photos)
    edge = encoder.describe().preprocessing.size[0]
    return {"model": model.name, "size": edge, **{name: top(encoder, task) for name, task in tasks.items()}}


def trained(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """Train what is missing in the folder; return the stitched model, and a teacher and a student per seed."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, start = folder / "nouns.txt", folder / "stitched"
    texts.write_text("\n".join(captions_and_nouns()) + "\n", encoding="utf-8")
    if not start.is_dir():
        command_line(STITCH, "-o", start)
    models = [start]
    for seed in seeds:
        teacher, student = folder / f"teacher-{seed}", folder / f"student-{seed}"
        command_line(TEACH, "--student", start, "--seed", seed, "-o", teacher, "--resume")
        trimmed = folder / f"trimmed-{seed}"
        if not trimmed.is_dir():
            command_line(TRIM, teacher, "--texts", texts, "-o", trimmed)
        given = ("--texts", texts, "--teacher", teacher, "--student", trimmed)
        command_line(DISTIL, *given, "--seed", seed, "-o", student, "--resume")
        models += [teacher, student]
    return models


def command_line(options: str, *more: object) -> None:
    subprocess.run([sys.executable, "-m", "clip_rd_edge", *options.split(), *map(str, more)], check=True)


def over_seeds(rows: Sequence[Score]) -> dict[str, Score]:
    """Return mean and standard deviation by the model's name without its seed and the task."""
    summary: dict[str, Score] = {}
    kinds = [(row["model"].rpartition("-")[0], row) for row in rows if row["model"].rpartition("-")[2].isdecimal()]
    for kind in sorted({kind for kind, _ in kinds}):
        own = [row for its_kind, row in kinds if its_kind == kind]
        summary[kind] = {"seeds": len(own)}
        for task in ("photographs", *EMOJI):
            for figure in ("top1", "top5"):
                values = [row[task][figure] for row in own]
                deviation = statistics.stdev(values) if len(values) > 1 else None
                summary[kind][f"{task} {figure}"] = {"mean": statistics.fmean(values), "sd": deviation}
    return summary


def top(encoder: TorchEncoder, task: ZeroShotTask) -> Score:
    result: Any = evaluate(encoder, msgspec.structs.replace(task, templates=("{}",)))
    interval = result.top1_interval
    return {"top1": result.top1, "low": interval.low, "high": interval.high, "top5": result.top5}


def load_zero_shot(name: str | Path) -> ZeroShotTask:
    task = load_task(str(name))
    assert isinstance(task, ZeroShotTask)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to stitch a classifier and a sentence encoder.")
    parser.add_argument("photos", type=Path, help="what tuxpaint.py wrote")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=(64, 96, 128, 160, 224), help="input sizes on the task test"
    )
    parser.add_argument("--before", type=Path, help="a stitched model")
    parser.add_argument("--after", type=Path, help="the same model, fine-tuned on emoji with --freeze-norms")
    parser.add_argument("--models", type=Path, nargs="+", help="finished models, which are evaluated alone")
    parser.add_argument("--seeds", type=int, nargs="+", help="train with these seeds, and evaluate")
    parser.add_argument("--runs", type=Path, default=Path("sees"), help="folder of what --seeds trains (default: sees)")
    parser.add_argument("--labels", type=Path, help="write the labels of the test tasks here, and do nothing else")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.labels:
        labels = dict.fromkeys(label for task in test_tasks(arguments.photos).values() for label in task.labels)
        arguments.labels.write_text("\n".join(labels) + "\n", encoding="utf-8")
        return
    if not arguments.output:
        parser.error("name an output: -o FILE")
    record: dict[str, Any] = {**here_and_now()}
    models = trained(arguments.runs, arguments.seeds) if arguments.seeds else arguments.models
    if models:
        if arguments.output.is_file():
            record = {**json.loads(arguments.output.read_text(encoding="utf-8")), **record}
        rows = {row["model"]: row for row in record.get("finished", [])}
        rows |= {model.name: finished(model, arguments.photos) for model in models}
        record["finished"] = list(rows.values())
        record["over_seeds"] = over_seeds(record["finished"])
        write_record(record, arguments.output)
        return
    record["stitched"] = stitched(
        arguments.photos, load_sentence_encoder("all-MiniLM-L6-v2", context_length=32), arguments.sizes
    )
    if arguments.before and arguments.after:
        record["interpolated"] = between(arguments.before, arguments.after, arguments.photos)
    write_record(record, arguments.output)


if __name__ == "__main__":
    main()
