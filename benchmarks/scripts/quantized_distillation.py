"""Not a test: what INT8 costs an image tower with no layer left in float, before and after distilling for it.

python benchmarks/scripts/quantized_distillation.py STUDENT QUANTIZED... -o quantized-distillation.json

STUDENT is a run on the embedded data, such as a quickstart's `student`, and each QUANTIZED a run of
`distill --quantize int8 --student STUDENT`. Agreement and accuracy are over the 760 pictures of both test splits, which
no training and no calibration saw; captions are embedded in float32, so that all differences are the image tower's.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.contract.checkpoint import DISTILLATION_FILE, model_folder
from clip_rd_edge.contract.encoder import Embeddings, label_embeddings
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.contract.task import ZeroShotTask
from clip_rd_edge.convert.calibration import calibration_set
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.static import RangeMethod, StaticQuantizer
from clip_rd_edge.convert.parity import Inputs, agreement, embed
from clip_rd_edge.data import emoji
from clip_rd_edge.exporters.onnx import export_image_tower
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.io import read_json

SPLITS = ("unseen style", "unseen concepts")
METHODS: tuple[RangeMethod, ...] = ("min-max", "percentile")


@dataclass(frozen=True)
class Version:
    """Image embeddings (760, 256), and how many pictures of each split they classify."""

    embeddings: Embeddings
    right: list[int]


class Measured:
    """A student's image tower in float32 and in INT8."""

    def __init__(self, run: str, tasks: list[ZeroShotTask]) -> None:
        clip = load_clip(run)
        self.trunk: str = clip.model_cfg["vision_cfg"]["timm_model_name"]
        encoder = TorchEncoder(clip)
        labels = [label_embeddings(encoder, task.labels, clip.templates) for task in tasks]
        pixels = np.stack([preprocess(open_image(path), clip.preprocessing) for task in tasks for path in task.images])
        drawn = calibration_set(emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=encoder.tokenize)

        def version(model: str | bytes) -> Version:
            embeddings = embed(open_session(model, threads=1), pixels)
            return Version(embeddings, right_answers(embeddings, labels, tasks))

        with tempfile.TemporaryDirectory() as folder:
            prepared = preprocessed(export_image_tower(clip, Path(folder)), Path(folder))
            quantizer = StaticQuantizer(prepared, drawn.calibrate.pixels)
            self.layers = len(quantizer.layers)
            self.float32 = version(str(prepared))
            contents = {method: quantizer.quantize(method, quantizer.layers) for method in METHODS}
            # Ranges are chosen as the exporter chooses: by pictures of the calibration set that set none.
            judge = drawn.judge.pixels
            reference = embed(open_session(str(prepared), threads=1), judge)
            agreements = {method: judged(reference, content, judge) for method, content in contents.items()}
        self.method = max(METHODS, key=lambda method: agreements[method])
        self.int8 = version(contents[self.method])


def judged(reference: Embeddings, content: bytes, pixels: Inputs) -> float:
    return agreement(reference, embed(open_session(content, threads=1), pixels)).centred_cosine


def right_answers(embeddings: Embeddings, labels: list[Embeddings], tasks: list[ZeroShotTask]) -> list[int]:
    found, start = [], 0
    for task, of_labels in zip(tasks, labels, strict=True):
        rows = embeddings[start : start + len(task.images)]
        found.append(int(np.sum((rows @ of_labels.T).argmax(axis=1) == np.asarray(task.targets))))
        start += len(task.images)
    return found


class Trained(msgspec.Struct):
    """What is said of a run."""

    steps: int
    seed: int


def trained(run: str) -> Trained:
    folder = model_folder(run)
    assert folder is not None, f"{run} is no run"
    return read_json(folder / DISTILLATION_FILE, Trained)


def row(name: str, of: Measured, original: Measured, pictures: int) -> dict[str, Any]:
    own, others = (agreement(m.float32.embeddings, of.int8.embeddings).centred_cosine for m in (of, original))
    drift = agreement(original.float32.embeddings, of.float32.embeddings).centred_cosine
    return {
        "model": name,
        "layers_in_int8": of.layers,
        "layers_in_float": 0,
        "ranges": of.method,
        "centred_cosine_int8_with_own_float32": own,
        "centred_cosine_int8_with_students_float32": others,
        "centred_cosine_float32_with_students_float32": drift,
        "right_float32": dict(zip(SPLITS, of.float32.right, strict=True)),
        "right_int8": dict(zip(SPLITS, of.int8.right, strict=True)),
        "accuracy_float32": sum(of.float32.right) / pictures,
        "accuracy_int8": sum(of.int8.right) / pictures,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("quantized", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    tasks = [emoji.zero_shot_task(split) for split in SPLITS]
    pictures = sum(len(task.images) for task in tasks)
    original = Measured(given.student, tasks)
    rows = [row("post-training", original, original, pictures)]
    for run in given.quantized:
        how = trained(run)
        name = f"distilled for INT8, {how.steps} steps, seed {how.seed}"
        rows.append(row(name, Measured(run, tasks), original, pictures))
        print(msgspec.json.encode(rows[-1]).decode())
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(),
        "student": original.trunk,
        "pictures": pictures,
        "rows": rows,
    }
    given.output.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    print(given.output.read_text())


if __name__ == "__main__":
    main()
