"""Not a test: latency of eight towers in ONNX Runtime and OpenVINO, batch 1, one thread, all variants in turn.

    python benchmarks/scripts/towers.py WORK --prepare       # files alone, some minutes; the machine may be busy
    python benchmarks/scripts/towers.py WORK -o benchmarks/results/MACHINE/towers.json \\
        --readme benchmarks/README.md                               # on a quiet machine; goes on where it was stopped

Weights are random, pictures and captions are the embedded data set's: the figures are of latency and size alone. Of
INT8 in ONNX Runtime every candidate of the exporter is timed beside float32 first, and the exporter's own rule chooses;
where none deserves it, INT8 is float32. `pip install nncf openvino` for OpenVINO's columns.
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

from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.benchmarking.report.text import write_between_marks
from clip_rd_edge.benchmarking.results import Environment, this_environment
from clip_rd_edge.convert.calibration import calibration_set
from clip_rd_edge.convert.graph import preprocessed, silently
from clip_rd_edge.convert.int8.candidates import ORT
from clip_rd_edge.convert.int8.select import Measured, choose
from clip_rd_edge.convert.options import Budget
from clip_rd_edge.convert.parity import Agreement, Inputs, agreement, embed, latencies
from clip_rd_edge.data.emoji import training_pairs
from clip_rd_edge.exporters.onnx import evaluating, export_image_tower, export_text_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import preprocessing_of
from clip_rd_edge.models.student import build_student, student_config
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.io import new_folder, to_json, write_bytes
from clip_rd_edge.utils.reporting import SILENT
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

ORT_FP32, ORT_INT8 = "ORT FP32", "ORT INT8"
OPENVINO = ("OpenVINO FP32", "OpenVINO BF16", "OpenVINO INT8 (NNCF)", "OpenVINO INT8 (our Q/DQ)")
VARIANTS = (ORT_FP32, ORT_INT8, *OPENVINO)


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in one runtime and precision.

    Attributes:
        name: one of VARIANTS.
        made: what it is made of, such as the way of quantising that was chosen.
        latency_ms: median over the repeats of each one's median, batch 1.
        speedup: ONNX Runtime's float32 latency divided by this one's: median over the repeats, least and greatest.
        size_bytes: of its file.
    """

    name: str
    made: str
    latency_ms: float
    speedup: tuple[float, float, float]
    size_bytes: int


class TowerLatencies(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in all variants; `best` is OpenVINO's best over ONNX Runtime's best, as `Variant.speedup`."""

    tower: str
    variants: tuple[Variant, ...]
    best: tuple[float, float, float]


class Towers(msgspec.Struct, frozen=True, kw_only=True):
    """What one run measured."""

    environment: Environment
    threads: int
    weights: str
    towers: tuple[TowerLatencies, ...]


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """A variant's file, before it is timed; `made` as in Variant."""

    path: str
    made: str
    size_bytes: int


def summarise(tower: str, made: Mapping[str, Made], repeats: Sequence[Mapping[str, Milliseconds]]) -> TowerLatencies:
    """The figures of a tower.

    Args:
        made: of each variant by its name.
        repeats: latencies of each variant in milliseconds, timed in turn within a repeat.
    """
    medians = {name: np.asarray([np.median(repeat[name]) for repeat in repeats]) for name in made}
    fp32 = medians[ORT_FP32]
    variants = tuple(
        Variant(
            name=name,
            made=of.made,
            latency_ms=float(np.median(medians[name])),
            speedup=_spread(fp32 / medians[name]),
            size_bytes=of.size_bytes,
        )
        for name, of in made.items()
    )
    # The best of each runtime by its median, so that a lucky repeat does not choose it.
    ort, openvino = (
        min((medians[name] for name in names if name in medians), key=lambda values: float(np.median(values)))
        for names in ((ORT_FP32, ORT_INT8), OPENVINO)
    )
    return TowerLatencies(tower=tower, variants=variants, best=_spread(ort / openvino))


def towers_table(results: Towers) -> str:
    """A Markdown table: a row a tower, a column a variant, `speedup (least to greatest)` over ONNX Runtime's FP32."""
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
                f"{int8.made}, {size:.2f}×",
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
CALIBRATE, JUDGE = 48, 32
THREADS, REPEATS = 1, 5
STATIC = "static, percentile"


class Candidate(msgspec.Struct):
    """A file of INT8 for ONNX Runtime, and how well it agrees with float32."""

    name: str
    file: str
    of: Agreement


class Prepared(msgspec.Struct):
    """Written last, so that a folder without it is unfinished."""

    candidates: list[Candidate]


def model_of(tower: str) -> ClipModel:
    """A model with random weights that has the tower."""
    torch.manual_seed(0)
    name = TOWERS.get(tower, tower)
    if not name.startswith("ViT-"):
        return build_student(student_config(name, embedding_size=512), name=tower)
    model = open_clip.create_model(name)
    config = open_clip.get_model_config(name)
    tokenizer = open_clip.get_tokenizer(name)
    return ClipModel(tower, model, tokenizer, preprocessing_of(model), config)


def samples_of(clip: ClipModel, tower: str) -> tuple[Inputs, Inputs]:
    """Inputs to calibrate on and to judge by."""
    drawn = calibration_set(training_pairs(), preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)
    kind = "ids" if tower == TEXT else "pixels"
    return getattr(drawn.calibrate, kind)[:CALIBRATE], getattr(drawn.judge, kind)[:JUDGE]


def prepare(tower: str, folder: Path) -> None:
    """Write every file that is timed later."""
    clip = model_of(tower)
    with evaluating(clip.model):
        model = (export_text_tower if tower == TEXT else export_image_tower)(clip, folder)
        calibrate, judge = samples_of(clip, tower)
    model = model.rename(folder / "fp32.onnx")
    np.save(folder / "one.npy", judge[:1])
    reference = embed(open_session(str(model)), judge)
    ways = ORT.ways(
        preprocessed(model, folder), calibrate, allowed_error=1 - least(tower), threads=THREADS, reporter=SILENT
    )
    made = []
    for number, way in enumerate(ways):
        path = folder / f"int8-{number}.onnx"
        path.write_bytes(way.make())
        made.append(Candidate(way.name, path.name, agreement(reference, embed(open_session(str(path)), judge))))
    static = next((each.file for each in made if each.name == STATIC), None)
    if static is None:  # the ways for ONNX Runtime have no static INT8 of towers made of products
        from clip_rd_edge.convert.int8.static import StaticQuantizer

        quantizer = StaticQuantizer(folder / f"preprocessed-{model.name}", calibrate)
        (folder / "static.onnx").write_bytes(quantizer.quantize("percentile", quantizer.layers))
    else:
        shutil.copy2(folder / static, folder / "static.onnx")
    quantize_by_nncf(model, calibrate, folder / "nncf.xml")
    write_bytes(folder / "prepared.json", to_json(Prepared(made)))


def quantize_by_nncf(model: Path, calibrate: Inputs, path: Path) -> None:
    """OpenVINO's own quantiser, with its settings for transformers where the tower attends."""
    import nncf
    import openvino

    attends = any(node.op_type == "Softmax" for node in onnx.load(model).graph.node)
    kind = nncf.ModelType.TRANSFORMER if attends else None
    with silently():
        data = nncf.Dataset([sample[None] for sample in calibrate])
        read = openvino.Core().read_model(model)
        openvino.save_model(nncf.quantize(read, data, model_type=kind, subset_size=len(calibrate)), path)


def kind_of(tower: str) -> str:
    return "text" if tower == TEXT else "image"


def least(tower: str) -> float:
    return Budget().min_agreement(kind_of(tower))


def shipped_by_ort(tower: str, folder: Path, one: Inputs) -> Made:
    """The exporter's choice among the candidates, timed here and now."""
    candidates = msgspec.json.decode((folder / "prepared.json").read_bytes(), type=Prepared).candidates
    files = {ORT_FP32: "fp32.onnx", **{each.name: each.file for each in candidates}}
    sessions = {name: open_session(str(folder / file), threads=THREADS) for name, file in files.items()}
    times = latencies(sessions, one, timer=lambda calls: time_in_turn(calls, rounds=40, max_seconds=12))
    size = {name: (folder / file).stat().st_size for name, file in files.items()}
    itself = Agreement(0.0, 1.0, 1.0, JUDGE)
    fp32 = Measured(ORT_FP32, times[ORT_FP32], itself, size[ORT_FP32])
    tried = [Measured(each.name, times[each.name], each.of, size[each.name]) for each in candidates]
    choice = choose(kind_of(tower), fp32, tried, budget=Budget())
    name = choice.name or ORT_FP32
    made = choice.name or "none: float32"
    return Made(path=str(folder / files[name]), made=made, size_bytes=size[name])


def measure(tower: str, folder: Path) -> TowerLatencies:
    """Time all variants of a tower in turn, REPEATS times, each with sessions of its own."""
    one = np.load(folder / "one.npy")
    fp32, nncf, static = folder / "fp32.onnx", folder / "nncf.xml", folder / "static.onnx"
    made = {
        ORT_FP32: _made(fp32, "float32"),
        ORT_INT8: shipped_by_ort(tower, folder, one),
        OPENVINO[0]: _made(fp32, "float32"),
        OPENVINO[1]: _made(fp32, "float32 with a bfloat16 hint"),
        OPENVINO[2]: _made(nncf, "all of it, by NNCF", nncf.with_suffix(".bin")),
        OPENVINO[3]: _made(static, "all layers, U8 and S8"),
    }
    repeats = []
    for _ in range(REPEATS):
        sessions = {name: open_variant(name, of.path) for name, of in made.items()}
        repeats.append(latencies(sessions, one, timer=lambda calls: time_in_turn(calls, rounds=30, max_seconds=5)))
    return summarise(tower, made, repeats)


def _made(path: Path, made: str, *others: Path) -> Made:
    return Made(path=str(path), made=made, size_bytes=sum(file.stat().st_size for file in (path, *others)))


def open_variant(name: str, path: str) -> Any:
    """A session of a variant."""
    if name in (ORT_FP32, ORT_INT8):
        return open_session(path, threads=THREADS)
    return open_openvino(path, threads=THREADS, bf16=name == OPENVINO[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="where files and what was measured are kept until all is done")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--readme", type=Path, help="where the table goes, between its marks")
    parser.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS))
    parser.add_argument("--prepare", action="store_true", help="time nothing")
    given = parser.parse_args()
    rows = []
    for tower in given.towers:
        folder = given.work / tower.replace("/", "-").replace(", ", "-").replace(" ", "-")
        if not (folder / "prepared.json").is_file():
            print(f"{tower}: preparing", flush=True)
            with new_folder(folder) as new:
                prepare(tower, new)
        if given.prepare:
            continue
        done = folder / "measured.json"
        if not done.is_file():
            print(f"{tower}: measuring", flush=True)
            write_bytes(done, to_json(measure(tower, folder)))
        rows.append(msgspec.json.decode(done.read_bytes(), type=TowerLatencies))
    if given.prepare:
        return
    results = Towers(environment=this_environment(), threads=THREADS, weights="random", towers=tuple(rows))
    table = towers_table(results)
    print(table)
    if given.output:
        write_bytes(given.output, to_json(results))
    if given.readme:
        write_between_marks(given.readme, "towers", table)


if __name__ == "__main__":
    main()
