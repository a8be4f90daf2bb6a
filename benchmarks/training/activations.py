"""Measure what INT8 gains a trained student's image tower, by its activations: accuracy, speed, and time by operator.

python -m benchmarks.training.activations RUN… -o activations.json --readme benchmarks/measurements/int8.md

Each RUN is a student of the embedded data. Its tower is quantised as the exporter does it where accuracy allows:
convolutions statically, matrix products dynamically, nothing else. Accuracy is that on the 760 images of both test
splits, which are used for neither training nor calibration. Speed is measured at the size of the images that the
student was trained on, and at a larger one, where the same weights see the same images enlarged.

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
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.methods import StaticQuantizer, quantize_dynamically
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT
from clip_rd_edge.exporting.parity import Inputs, agreement, embed, p10
from clip_rd_edge.exporting.towers import export_image_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.runtime.backends.onnxruntime import import_onnxruntime, open_session

PRECISIONS = ("fp32", "int8")
ROUNDS, PROFILED = 40, 30
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


def at_size(clip: ClipModel, size: int) -> ClipModel:
    return replace(clip, preprocessing=msgspec.structs.replace(clip.preprocessing, size=(size, size)))


def make_files(clip: ClipModel) -> Files:
    tokenize = TorchEncoder(clip).tokenize
    samples = calibration_set(emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=tokenize)
    calibrate = samples.calibrate.pixels
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_for_quantization(export_image_tower(clip, Path(folder)), Path(folder))
        model = onnx.load(prepared)
        rounded = RoundedLayers(model, calibrate, max_level=MAX_WEIGHT[7])
        quantizer = StaticQuantizer(prepared, calibrate, rounded=rounded)
        convolutions = [node.name for node in weighted_layers(model, ("Conv",))]
        static = quantizer.quantize("percentile", convolutions) if len(convolutions) > 1 else prepared.read_bytes()
        int8 = quantize_dynamically(static, matrix_products=True, token_embeddings=False, per_token=False)
        contents = dict(zip(PRECISIONS, (prepared.read_bytes(), int8), strict=True))
        return Files(contents, samples.held_out.pixels, len(weighted_layers(model)))


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
    parser.add_argument("--large", type=int, default=224, metavar="PIXELS")
    add_output_options(parser, "activations")
    args = parser.parse_args()
    rows = dict[str, dict[str, Any]]()
    sizes = dict[str, dict[str, Files]](small={}, large={})
    for run in args.runs:
        clip = load_clip(run)
        name = clip.model_cfg["vision_cfg"]["timm_model_name"]
        small, large = make_files(clip), make_files(at_size(clip, args.large))
        sizes["small"][name], sizes["large"][name] = small, large
        found = [embed(open_session(large.contents[p], threads=1), large.held_out) for p in PRECISIONS]
        rows[name] = {
            "steps": run_settings(run).steps,
            "pixels": clip.preprocessing.size[0],
            "layers": small.layers,
            "bytes": {precision: len(content) for precision, content in small.contents.items()},
            **accuracy(clip, small),
            "large_centred_cosine": agreement(*found).centred_cosine,
            "large_ms_by_kind": {p: time_by_kind(large.contents[p], large.held_out) for p in PRECISIONS},
        }
        print(name, json.dumps(rows[name]), flush=True)
    for size, files in sizes.items():
        for name, milliseconds in times_in_turn(files).items():
            rows[name][f"{size}_ms"] = milliseconds
    publish({**here_and_now(), "large_pixels": args.large, "students": rows}, table(rows, args.large), args)


def table(rows: dict[str, dict[str, Any]], large: int) -> str:
    """Return the results, and below them where the time goes, as Markdown tables."""
    pixels = next(iter(rows.values()))["pixels"]
    heading = ["student", *(f"{split}, FP32, INT8" for split in SPLITS), f"{pixels} px: centred cosine, ms, speed",
               f"{large} px: centred cosine, ms, speed"]  # fmt: skip
    lines = [heading]
    for name, row in rows.items():
        answers = [", ".join(str(row["correct"][p][split]) for p in PRECISIONS) for split in SPLITS]
        lines.append([
            f"`{name}`", *answers, _speed(row["centred_cosine"], row["small_ms"]),
            _speed(row["large_centred_cosine"], row["large_ms"]),
        ])  # fmt: skip
    kinds = [["student", *KINDS, REST]]
    for name, row in rows.items():
        by_kind = row["large_ms_by_kind"]
        kinds.append([f"`{name}`", *(f"{by_kind['fp32'][k]:.1f} → {by_kind['int8'][k]:.1f}" for k in (*KINDS, REST))])
    return f"{markdown_table(lines)}\n\n{markdown_table(kinds)}"


def _speed(cosine: float, milliseconds: dict[str, float]) -> str:
    before, after = (milliseconds[precision] for precision in PRECISIONS)
    return f"{cosine:.4f}, {before:.2f} → {after:.2f}, {before / after:.2f}×"


if __name__ == "__main__":
    main()
