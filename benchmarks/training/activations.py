"""Measure what INT8 gains a trained student's image tower, by its activations: accuracy, speed, and time by operator.

python -m benchmarks.training.activations RUN… -o activations.json
python -m benchmarks.training.activations RUN… --pixels 224 -o activations-224.json
python -m benchmarks.training.activations RUN… --pixels 224 --everything -o activations-224-everything.json

Each RUN is a student of the embedded data. Its tower is quantised as the exporter does it where accuracy allows:
convolutions statically, matrix products dynamically, nothing else. Accuracy is that on the 760 images of both test
splits, which are used for neither training nor calibration, at the size of the images that the student was trained on.
With --pixels, the same weights see larger images; then, agreement is that on a few held-out training images.

Latencies are the processor time of one thread in ONNX Runtime, which other programs lengthen little; float32 and INT8
of all runs take turns, and each figure is the 10th percentile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from benchmarks.publishing import add_output_options, here_and_now, publish
from benchmarks.training.quantized_distillation import SPLITS, count_correct, run_settings
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import label_embeddings
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.data import emoji
from clip_rd_edge.exporting.calibration import calibration_set
from clip_rd_edge.exporting.graph import prepare_for_quantization, silently, weighted_layers
from clip_rd_edge.exporting.int8.methods import StaticQuantizer, quantize_dynamically
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT
from clip_rd_edge.exporting.parity import Inputs, agreement, embed, p10
from clip_rd_edge.exporting.towers import IMAGE_INPUT, export_image_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.runtime.backends.onnxruntime import import_onnxruntime, open_session

PRECISIONS = ("fp32", "int8")
ROUNDS, PROFILED = 40, 30
FEW = 24  # images of a larger size, each of which takes as long as a dozen small ones
# What the operators of ONNX Runtime do; those that are not listed are `the rest`.
KINDS = {
    "convolutions": ("Conv", "FusedConv", "QLinearConv"),
    "SiLU": ("QuickGelu", "Sigmoid", "QLinearSigmoid", "QLinearMul"),
    "products with weights": ("Gemm", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    "attention": ("FusedMatMul", "Softmax"),
    "normalisation": ("LayerNormalization", "SkipLayerNormalization"),
    "moving and converting": (
        *("Transpose", "Reshape", "Split", "Squeeze", "Slice", "Concat", "QLinearConcat", "Shape"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ReorderInput", "ReorderOutput"),
    ),
}
REST = "the rest"


@dataclass(frozen=True)
class Files:
    """An image tower at one size of images: the content of its files by precision, and images to embed."""

    contents: dict[str, bytes]
    held_out: Inputs
    layers: int


class Calibration:
    """ONNX Runtime's calibration data reader."""

    def __init__(self, pixels: Inputs) -> None:
        self._samples = iter(pixels)

    def get_next(self) -> dict[str, Inputs] | None:
        sample = next(self._samples, None)
        return None if sample is None else {IMAGE_INPUT: sample[None]}


def quantize_everything(prepared: Path, calibrate: Inputs) -> bytes:
    """Return a tower with all operators in static INT8 that ONNX Runtime's own quantiser knows."""
    from onnxruntime.quantization import quantize_static

    path = prepared.with_name("everything.onnx")
    with silently():
        quantize_static(str(prepared), str(path), Calibration(calibrate), per_channel=True, reduce_range=True)
    return path.read_bytes()


def make_files(clip: ClipModel, count: int | None, *, everything: bool = False) -> Files:
    """Write a tower in both precisions, by means of `count` images, or of as many as the exporter uses."""
    tokenize = TorchEncoder(clip).tokenize
    samples = calibration_set(emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=tokenize)
    calibrate = samples.calibrate.pixels[:count]
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_for_quantization(export_image_tower(clip, Path(folder)), Path(folder))
        model = onnx.load(prepared)
        if everything:
            contents = {"fp32": prepared.read_bytes(), "int8": quantize_everything(prepared, calibrate)}
            return Files(contents, samples.held_out.pixels[:count], len(weighted_layers(model)))
        rounded = RoundedLayers(model, calibrate, max_level=MAX_WEIGHT[7])
        quantizer = StaticQuantizer(prepared, calibrate, rounded=rounded)
        convolutions = [node.name for node in weighted_layers(model, ("Conv",))]
        static = quantizer.quantize("percentile", convolutions) if len(convolutions) > 1 else prepared.read_bytes()
        int8 = quantize_dynamically(static, matrix_products=True, token_embeddings=False, per_token=False)
        contents = dict(zip(PRECISIONS, (prepared.read_bytes(), int8), strict=True))
        return Files(contents, samples.held_out.pixels[:count], len(weighted_layers(model)))


def times_in_turn(files: dict[str, Files]) -> dict[str, dict[str, float]]:
    """Return the 10th percentile of each tower's processor time in milliseconds, by run and precision."""
    sessions = {
        (run, precision): open_session(content, threads=1)
        for run, tower in files.items()
        for precision, content in tower.contents.items()
    }
    samples = defaultdict[tuple[str, str], list[float]](list)
    for _ in range(ROUNDS):
        for (run, precision), session in sessions.items():
            feed = {session.get_inputs()[0].name: files[run].held_out[:1]}
            session.run(None, feed)  # brings its weights back into the cache
            started = time.thread_time_ns()
            session.run(None, feed)
            samples[run, precision].append((time.thread_time_ns() - started) / 1e6)
    return {run: {name: p10(np.asarray(samples[run, name])) for name in PRECISIONS} for run in files}


def time_by_kind(content: bytes, pixels: Inputs) -> dict[str, float]:
    """Return the milliseconds that the operators of each kind take."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, {session.get_inputs()[0].name: pixels[:1]})
        events = json.loads(Path(session.end_profiling()).read_bytes())
    durations = defaultdict[tuple[str, str], list[float]](list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"], _kind(event["args"])].append(event["dur"] / 1e3)
    total = Counter[str]()
    for (_, kind), values in durations.items():
        total[kind] += p10(np.asarray(values))
    return {kind: round(total[kind], 3) for kind in (*KINDS, REST)}


def _kind(event: dict[str, Any]) -> str:
    operator, inputs = event["op_name"], event.get("input_type_shape", [])
    if operator == "MatMul":  # of two activations with heads, in attention; otherwise with weights
        shape = next(iter(inputs[-1].values())) if inputs else []
        return "attention" if len(shape) == 4 else "products with weights"
    return next((kind for kind, operators in KINDS.items() if operator in operators), REST)


def accuracy(clip: ClipModel, files: Files) -> dict[str, Any]:
    """Return the number of correct answers in each test split, by precision, and the agreement of INT8."""
    tasks = [emoji.zero_shot_task(split) for split in SPLITS]
    labels = [label_embeddings(TorchEncoder(clip), task.labels, clip.templates) for task in tasks]
    pixels = np.stack([preprocess(open_image(path), clip.preprocessing) for task in tasks for path in task.images])
    found = {name: embed(open_session(content, threads=1), pixels) for name, content in files.contents.items()}
    correct = {name: dict(zip(SPLITS, count_correct(rows, labels, tasks), strict=True)) for name, rows in found.items()}
    return {"correct": correct, "centred_cosine": agreement(found["fp32"], found["int8"]).centred_cosine}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--pixels", type=int, help="edge of the images; that of the student's own by default")
    parser.add_argument("--everything", action="store_true", help="also attention, its Softmax and sums in INT8")
    add_output_options(parser, "activations")
    args = parser.parse_args()
    rows, made = dict[str, dict[str, Any]](), dict[str, Files]()
    for run in args.runs:
        clip = load_clip(run)
        if args.pixels:
            size = (args.pixels, args.pixels)
            clip = replace(clip, preprocessing=msgspec.structs.replace(clip.preprocessing, size=size))
        files = make_files(clip, FEW if args.pixels else None, everything=args.everything)
        name = clip.model_cfg["vision_cfg"]["timm_model_name"]
        made[name] = files
        rows[name] = {
            "steps": run_settings(run).steps,
            "pixels": clip.preprocessing.size[0],
            "layers": files.layers,
            "bytes": {precision: len(content) for precision, content in files.contents.items()},
            **(few_agree(files) if args.pixels else accuracy(clip, files)),
            "ms_by_kind": {p: time_by_kind(files.contents[p], files.held_out) for p in PRECISIONS},
        }
    for name, milliseconds in times_in_turn(made).items():
        rows[name]["ms"] = milliseconds
    publish({**here_and_now(), "threads": 1, "students": rows}, table(rows), args)


def few_agree(files: Files) -> dict[str, float]:
    found = [embed(open_session(files.contents[precision], threads=1), files.held_out) for precision in PRECISIONS]
    return {"centred_cosine": agreement(*found).centred_cosine}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table, with the milliseconds of each kind of operator in float32 and INT8."""
    lines = [["student, px", *(f"{split}: FP32, INT8" for split in SPLITS), "centred cosine", "ms", "speed",
              *KINDS, REST]]  # fmt: skip
    for name, row in rows.items():
        correct, by_kind, ms = row.get("correct"), row["ms_by_kind"], row["ms"]
        answers = [", ".join(str(correct[p][split]) for p in PRECISIONS) if correct else "–" for split in SPLITS]
        lines.append([
            f"`{name}`, {row['pixels']}", *answers, f"{row['centred_cosine']:.4f}", _change(ms, 2),
            f"{ms['fp32'] / ms['int8']:.2f}×",
            *(_change({p: by_kind[p][kind] for p in PRECISIONS}, 1) for kind in (*KINDS, REST)),
        ])  # fmt: skip
    return markdown_table(lines)


def _change(values: dict[str, float], digits: int) -> str:
    return " → ".join(f"{values[precision]:.{digits}f}" for precision in PRECISIONS)


if __name__ == "__main__":
    main()
