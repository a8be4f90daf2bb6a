"""Measure what INT8 costs an image tower with no layer left in float, before and after distillation for INT8.

python -m benchmarks.training.quantized_distillation STUDENT QUANTIZED... -o quantized-distillation.json

STUDENT is a run on the embedded data, such as the quickstart's `student`, and each QUANTIZED a run of
`distill --quantize int8 --student STUDENT`. Agreement and accuracy are measured on the 760 images of both test splits,
which are used for neither training nor calibration. Captions are embedded in float32, so that all differences come from
the image tower.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from benchmarks.publishing import here_and_now, print_record
from clip_rd_edge.bundle.encoder import Embeddings, label_embeddings
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.bundle.runs import DISTILLATION_FILE, model_folder, was_quantized_in_training
from clip_rd_edge.data import emoji
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.exporting.calibration import calibration_set
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.methods import RangeMethod, StaticQuantizer
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT
from clip_rd_edge.exporting.parity import Inputs, agreement, embed
from clip_rd_edge.exporting.towers import export_image_tower
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.structs import read_json

SPLITS = ("unseen style", "unseen concepts")
METHODS: tuple[RangeMethod, ...] = ("min-max", "percentile")


@dataclass(frozen=True)
class Version:
    """Image embeddings (760, 256), and the number of correctly classified images in each split."""

    embeddings: Embeddings
    correct: list[int]


class StudentVersions:
    """A student's image tower in float32 and in INT8."""

    def __init__(self, run: str, tasks: list[ZeroShotTask]) -> None:
        clip = load_clip(run)
        self.trunk: str = clip.model_cfg["vision_cfg"]["timm_model_name"]
        encoder = TorchEncoder(clip)
        labels = [label_embeddings(encoder, task.labels, clip.templates) for task in tasks]
        pixels = np.stack([preprocess(open_image(path), clip.preprocessing) for task in tasks for path in task.images])
        samples = calibration_set(emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=encoder.tokenize)

        def version(model: str | bytes) -> Version:
            embeddings = embed(open_session(model, threads=1), pixels)
            return Version(embeddings, count_correct(embeddings, labels, tasks))

        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare_for_quantization(export_image_tower(clip, Path(folder)), Path(folder))
            calibrate, rounded = samples.calibrate.pixels, None
            if not was_quantized_in_training(run):
                rounded = RoundedLayers(onnx.load(prepared), calibrate, max_level=MAX_WEIGHT[7])
            quantizer = StaticQuantizer(prepared, calibrate, rounded=rounded)
            self.layers = len(quantizer.layers)
            self.float32 = version(str(prepared))
            contents = {method: quantizer.quantize(method, quantizer.layers) for method in METHODS}
            # As in the exporter: one part of the calibration set determines the ranges, the other selects the method.
            held_out = samples.held_out.pixels
            reference = embed(open_session(str(prepared), threads=1), held_out)
            agreements = {method: int8_agreement(reference, content, held_out) for method, content in contents.items()}
        self.method = max(METHODS, key=lambda method: agreements[method])
        self.int8 = version(contents[self.method])


def int8_agreement(reference: Embeddings, content: bytes, pixels: Inputs) -> float:
    return agreement(reference, embed(open_session(content, threads=1), pixels)).centred_cosine


def count_correct(embeddings: Embeddings, labels: list[Embeddings], tasks: list[ZeroShotTask]) -> list[int]:
    counts, start = [], 0
    for task, task_labels in zip(tasks, labels, strict=True):
        rows = embeddings[start : start + len(task.images)]
        counts.append(int(np.sum((rows @ task_labels.T).argmax(axis=1) == np.asarray(task.targets))))
        start += len(task.images)
    return counts


class RunSettings(msgspec.Struct):
    """The settings of a run that are reported."""

    steps: int
    seed: int


def run_settings(run: str) -> RunSettings:
    folder = model_folder(run)
    assert folder is not None, f"{run} is not a run"
    return read_json(folder / DISTILLATION_FILE, RunSettings)


def row(name: str, model: StudentVersions, original: StudentVersions, images: int) -> dict[str, Any]:
    own, others = (agreement(m.float32.embeddings, model.int8.embeddings).centred_cosine for m in (model, original))
    drift = agreement(original.float32.embeddings, model.float32.embeddings).centred_cosine
    return {
        "model": name,
        "layers_in_int8": model.layers,
        "layers_in_float": 0,
        "ranges": model.method,
        "centred_cosine_int8_with_own_float32": own,
        "centred_cosine_int8_with_students_float32": others,
        "centred_cosine_float32_with_students_float32": drift,
        "right_float32": dict(zip(SPLITS, model.float32.correct, strict=True)),
        "right_int8": dict(zip(SPLITS, model.int8.correct, strict=True)),
        "accuracy_float32": sum(model.float32.correct) / images,
        "accuracy_int8": sum(model.int8.correct) / images,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("quantized", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    tasks = [emoji.zero_shot_task(split) for split in SPLITS]
    images = sum(len(task.images) for task in tasks)
    original = StudentVersions(args.student, tasks)
    rows = [row("post-training", original, original, images)]
    for run in args.quantized:
        settings = run_settings(run)
        name = f"distilled for INT8, {settings.steps} steps, seed {settings.seed}"
        rows.append(row(name, StudentVersions(run, tasks), original, images))
        print(msgspec.json.encode(rows[-1]).decode())
    result = {
        **here_and_now(),
        "student": original.trunk,
        "images": images,
        "rows": rows,
    }
    print_record(result, args.output)


if __name__ == "__main__":
    main()
