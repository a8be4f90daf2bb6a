"""Measure the latency of eight towers in ONNX Runtime and OpenVINO, batch 1, one thread, all variants in turn.

    python -m benchmarks.devices.towers WORK --prepare       # prepares files, some minutes; the machine may be busy
    python -m benchmarks.devices.towers WORK -o benchmarks/results/MACHINE/towers.json \\
        --readme benchmarks/measurements/towers.md    # on a quiet machine; resumes after an interruption

Weights are random, images and captions come from the embedded data set: only latency and size are meaningful. For INT8
in ONNX Runtime, every candidate of the exporter is first timed beside float32, and the exporter's own rule chooses. If
no candidate is worth it, INT8 is float32. `pip install nncf openvino` for the OpenVINO columns.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import open_clip
import torch

from benchmarks.publishing import add_output_options, publish
from clip_rd_edge.benchmarking.results import Environment, this_environment
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.data.emoji import training_pairs
from clip_rd_edge.exporting.calibration import calibration_set
from clip_rd_edge.exporting.graph import prepare_for_quantization, silently
from clip_rd_edge.exporting.int8.candidates import Float32Tower, onnx_candidates
from clip_rd_edge.exporting.int8.search import MeasuredCandidate, choose
from clip_rd_edge.exporting.parity import Agreement, Inputs, agreement, embed, latencies
from clip_rd_edge.exporting.plan import Budget, Plan
from clip_rd_edge.exporting.towers import export_image_tower, export_text_tower
from clip_rd_edge.models.clip import ClipModel, evaluation_mode
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import preprocessing_of
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.structs import to_json
from clip_rd_edge.utils.timing import Milliseconds

ORT_FP32, ORT_INT8 = "ORT FP32", "ORT INT8"
OPENVINO = ("OpenVINO FP32", "OpenVINO BF16", "OpenVINO INT8 (NNCF)", "OpenVINO INT8 (our Q/DQ)")
VARIANTS = (ORT_FP32, ORT_INT8, *OPENVINO)


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in one runtime and precision.

    Attributes:
        name: one of VARIANTS.
        method: how the file was made, such as the quantisation method that was chosen.
        latency_ms: median over the repeats' medians, batch 1.
        speedup: ONNX Runtime's float32 latency divided by this one's: median over the repeats, min and max.
        size_bytes: size of the file.
    """

    name: str
    method: str = msgspec.field(name="made")
    latency_ms: float
    speedup: tuple[float, float, float]
    size_bytes: int


class TowerLatencies(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in all variants; `best` is the speed-up of OpenVINO's best variant over ONNX Runtime's best."""

    tower: str
    variants: tuple[Variant, ...]
    best: tuple[float, float, float]


class Towers(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one run."""

    environment: Environment
    threads: int
    weights: str
    towers: tuple[TowerLatencies, ...]


class VariantFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file of a variant, before it is timed; `method` as in Variant."""

    path: str
    method: str
    size_bytes: int


def summarise(
    tower: str, files: Mapping[str, VariantFile], repeats: Sequence[Mapping[str, Milliseconds]]
) -> TowerLatencies:
    """Summarise the latencies of a tower.

    Args:
        files: the file of each variant, by name.
        repeats: latencies of each variant in milliseconds, timed in turn within a repeat.
    """
    medians = {name: np.asarray([np.median(repeat[name]) for repeat in repeats]) for name in files}
    fp32 = medians[ORT_FP32]
    variants = tuple(
        Variant(
            name=name,
            method=file.method,
            latency_ms=float(np.median(medians[name])),
            speedup=_spread(fp32 / medians[name]),
            size_bytes=file.size_bytes,
        )
        for name, file in files.items()
    )
    # The best variant of each runtime is chosen by its median, so that a lucky repeat does not decide.
    ort, openvino = (
        min((medians[name] for name in names if name in medians), key=lambda values: float(np.median(values)))
        for names in ((ORT_FP32, ORT_INT8), OPENVINO)
    )
    return TowerLatencies(tower=tower, variants=variants, best=_spread(ort / openvino))


def towers_table(results: Towers) -> str:
    """Build a Markdown table with one row per tower and one column per variant.

    Cells are `speedup (min to max)` over ONNX Runtime's FP32.
    """
    others = VARIANTS[1:]
    lines = [
        ["tower", "ORT FP32, ms", *others, "best OpenVINO / best ORT", "INT8 that ORT gets, and its size"],
    ]
    for row in results.towers:
        by_name = {variant.name: variant for variant in row.variants}
        fp32, int8 = by_name[ORT_FP32], by_name[ORT_INT8]
        size = int8.size_bytes / fp32.size_bytes
        lines.append(
            [
                row.tower,
                f"{fp32.latency_ms:.2f}",
                *(_cell(by_name[name].speedup) if name in by_name else "–" for name in others),
                _cell(row.best),
                f"{int8.method}, {size:.2f}×",
            ]
        )
    return markdown_table(lines, left=(0, len(lines[0]) - 1))


def _spread(values: Milliseconds) -> tuple[float, float, float]:
    return float(np.median(values)), float(values.min()), float(values.max())


def _cell(spread: tuple[float, float, float]) -> str:
    middle, low, high = spread
    return f"{middle:.2f}× ({low:.2f} to {high:.2f})"


TEXT = "text, 12 layers of 384"
TOWERS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilevit_xxs": "mobilevit_xxs",
    "mobilevit_s": "mobilevit_s",
    "mobilenetv4_conv_small": "mobilenetv4_conv_small",
    "ViT-T/16": "vit_tiny_16",
    "ViT-B/16": "ViT-B-16",
    TEXT: "resnet10t",
}
CALIBRATION_SAMPLES, HELD_OUT_SAMPLES = 48, 32
THREADS, REPEATS = 1, 5
WEIGHT_BITS = Plan().weight_bits
STATIC = "static, percentile"


class Candidate(msgspec.Struct):
    """An INT8 file for ONNX Runtime, and its agreement with float32."""

    name: str
    file: str
    agreement: Agreement = msgspec.field(name="of")


class Prepared(msgspec.Struct):
    """Content of prepared.json, which is written last and marks a folder as finished."""

    candidates: list[Candidate]


def model_of(tower: str) -> ClipModel:
    """Build a model with random weights that contains the tower."""
    torch.manual_seed(0)
    name = TOWERS.get(tower, tower)
    if not name.startswith("ViT-"):
        return build_student(student_config(name, embedding_size=512), name=tower)
    model = open_clip.create_model(name)
    config = open_clip.get_model_config(name)
    tokenizer = open_clip.get_tokenizer(name)
    return ClipModel(tower, model, tokenizer, preprocessing_of(model), config)


def samples_of(clip: ClipModel, tower: str) -> tuple[Inputs, Inputs]:
    """Return inputs for calibration, and held-out inputs for the agreement with float32."""
    samples = calibration_set(training_pairs(), preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)
    kind = "ids" if tower == TEXT else "pixels"
    return getattr(samples.calibrate, kind)[:CALIBRATION_SAMPLES], getattr(samples.held_out, kind)[:HELD_OUT_SAMPLES]


def prepare(tower: str, folder: Path) -> None:
    """Write all files that are timed later."""
    clip = model_of(tower)
    with evaluation_mode(clip.model):
        model = (export_text_tower if tower == TEXT else export_image_tower)(clip, folder)
        calibrate, held_out = samples_of(clip, tower)
    model = model.rename(folder / "fp32.onnx")
    np.save(folder / "one.npy", held_out[:1])
    reference = embed(open_session(str(model)), held_out)
    float32 = Float32Tower(
        name=kind_of(tower),
        model=prepare_for_quantization(model, folder),
        calibrate=calibrate,
        held_out=held_out,
        plan=Plan(threads=THREADS),
    )
    candidates = []
    for number, method in enumerate(onnx_candidates(float32)):
        path = folder / f"int8-{number}.onnx"
        path.write_bytes(method.make())
        candidates.append(
            Candidate(method.name, path.name, agreement(reference, embed(open_session(str(path)), held_out)))
        )
    static = next((candidate.file for candidate in candidates if candidate.name == STATIC), None)
    if static is None:  # the exporter has no static candidate for towers of matrix products
        from clip_rd_edge.exporting.int8.methods import StaticQuantizer

        quantizer = StaticQuantizer(folder / f"preprocessed-{model.name}", calibrate, weight_bits=WEIGHT_BITS)
        (folder / "static.onnx").write_bytes(quantizer.quantize("percentile", quantizer.layers))
    else:
        shutil.copy2(folder / static, folder / "static.onnx")
    quantize_with_nncf(model, calibrate, folder / "nncf.xml")
    write_bytes(folder / "prepared.json", to_json(Prepared(candidates)))


def quantize_with_nncf(model: Path, calibrate: Inputs, path: Path) -> None:
    """Quantise with NNCF, OpenVINO's own quantiser, using its transformer settings for towers with attention."""
    import nncf
    import openvino

    has_attention = any(node.op_type == "Softmax" for node in onnx.load(model).graph.node)
    kind = nncf.ModelType.TRANSFORMER if has_attention else None
    with silently():
        data = nncf.Dataset([sample[None] for sample in calibrate])
        network = openvino.Core().read_model(model)
        openvino.save_model(nncf.quantize(network, data, model_type=kind, subset_size=len(calibrate)), path)


def kind_of(tower: str) -> str:
    return "text" if tower == TEXT else "image"


def min_agreement(tower: str) -> float:
    return Budget().min_agreement(kind_of(tower))


def choose_for_ort(tower: str, folder: Path, pixels: Inputs) -> VariantFile:
    """Return the exporter's choice among the candidates, which are timed for it."""
    candidates = msgspec.json.decode((folder / "prepared.json").read_bytes(), type=Prepared).candidates
    files = {ORT_FP32: "fp32.onnx", **{candidate.name: candidate.file for candidate in candidates}}
    sessions = {name: open_session(str(folder / file), threads=THREADS) for name, file in files.items()}
    times = latencies(sessions, pixels, rounds=40, max_seconds=12)
    sizes = {name: (folder / file).stat().st_size for name, file in files.items()}
    perfect = Agreement(0.0, 1.0, 1.0, HELD_OUT_SAMPLES)
    fp32 = MeasuredCandidate(ORT_FP32, times[ORT_FP32], perfect, sizes[ORT_FP32])
    tried = [MeasuredCandidate(c.name, times[c.name], c.agreement, sizes[c.name]) for c in candidates]
    choice = choose(kind_of(tower), fp32, tried, budget=Budget())
    name = choice.name or ORT_FP32
    method = choice.name or "none: float32"
    return VariantFile(path=str(folder / files[name]), method=method, size_bytes=sizes[name])


def measure(tower: str, folder: Path) -> TowerLatencies:
    """Time all variants of a tower in turn, REPEATS times, each time with new sessions."""
    pixels = np.load(folder / "one.npy")
    fp32, nncf, static = folder / "fp32.onnx", folder / "nncf.xml", folder / "static.onnx"
    files = {
        ORT_FP32: _variant_file(fp32, "float32"),
        ORT_INT8: choose_for_ort(tower, folder, pixels),
        OPENVINO[0]: _variant_file(fp32, "float32"),
        OPENVINO[1]: _variant_file(fp32, "float32 with a bfloat16 hint"),
        OPENVINO[2]: _variant_file(nncf, "all of it, by NNCF", nncf.with_suffix(".bin")),
        OPENVINO[3]: _variant_file(static, "all layers, U8 and S8"),
    }
    repeats = []
    for _ in range(REPEATS):
        sessions = {name: open_variant(name, file.path) for name, file in files.items()}
        repeats.append(latencies(sessions, pixels, rounds=30, max_seconds=5))
    return summarise(tower, files, repeats)


def _variant_file(path: Path, method: str, *others: Path) -> VariantFile:
    size_bytes = sum(file.stat().st_size for file in (path, *others))
    return VariantFile(path=str(path), method=method, size_bytes=size_bytes)


def open_variant(name: str, path: str) -> Any:
    """Open a session of a variant."""
    if name in (ORT_FP32, ORT_INT8):
        return open_session(path, threads=THREADS)
    return open_openvino(path, threads=THREADS, bf16=name == OPENVINO[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="folder for prepared files and intermediate results")
    add_output_options(parser, "towers")
    parser.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS))
    parser.add_argument("--prepare", action="store_true", help="only prepare the files")
    args = parser.parse_args()
    rows = []
    for tower in args.towers:
        folder = args.work / tower.replace("/", "-").replace(", ", "-").replace(" ", "-")
        if not (folder / "prepared.json").is_file():
            print(f"{tower}: preparing", flush=True)
            with new_folder(folder) as new:
                prepare(tower, new)
        if args.prepare:
            continue
        result = folder / "measured.json"
        if not result.is_file():
            print(f"{tower}: measuring", flush=True)
            write_bytes(result, to_json(measure(tower, folder)))
        rows.append(msgspec.json.decode(result.read_bytes(), type=TowerLatencies))
    if args.prepare:
        return
    results = Towers(environment=this_environment(), threads=THREADS, weights="random", towers=tuple(rows))
    publish(results, towers_table(results), args)


if __name__ == "__main__":
    main()
