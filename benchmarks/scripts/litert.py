"""Convert the image tower of every preset to LiteRT, compare it with PyTorch, and time it beside ONNX Runtime.

pip install '.[train,litert-torch]'      # in an environment of its own
python benchmarks/scripts/litert.py -o benchmarks/results/MACHINE/litert.json --readme export/litert/README.md

Weights are random, so the table says nothing about accuracy. LiteRT and ONNX Runtime take turns, batch 1, one thread:
compare the ratio, not the milliseconds. Each preset's result is kept as it comes; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from pathlib import Path

import msgspec
import numpy as np
import torch

from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.benchmarking.report.text import write_between_markers
from clip_rd_edge.contract.bundle import Tower
from clip_rd_edge.convert.litert import fp16_recipe, quantize
from clip_rd_edge.convert.parity import agreement, embed, hard_pixels, latencies
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporters.litert import convert_tower
from clip_rd_edge.exporters.onnx import IMAGE_INPUT, IMAGE_OUTPUT, evaluating, export_image_tower
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.student import build_student, preset_names, student_config
from clip_rd_edge.runtime.backends.litert import open_litert
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.io import to_json, write_bytes
from clip_rd_edge.utils.timing import time_in_turn

MARKER = "litert"
TOWER = Tower(file="image.onnx", input_name=IMAGE_INPUT, output_name=IMAGE_OUTPUT, precision="fp32")


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """A preset's image tower: its files in MB, max difference from PyTorch, and ms (p10) in both runtimes.

    Attributes:
        error: why it could not be converted, or empty.
        fp16_cosine: mean centred cosine of float16 weights with float32.
    """

    preset: str
    error: str = ""
    max_difference: float = 0.0
    fp16_cosine: float = 0.0
    fp32_mb: float = 0.0
    fp16_mb: float = 0.0
    litert_ms: float = 0.0
    onnx_ms: float = 0.0


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The content of litert.json."""

    machine: str
    date: str
    rows: tuple[Converted, ...]


def convert(preset: str) -> Converted:
    """Convert, compare and time one preset's image tower."""
    torch.manual_seed(0)
    clip = build_student(student_config(preset, embedding_size=256, text="tiny"), name=preset)
    pixels = hard_pixels(clip.preprocessing)
    with tempfile.TemporaryDirectory() as name, evaluating(clip.model):
        onnx = export_image_tower(clip, Path(name))
        try:
            fp32 = convert_tower(clip, "image", TOWER, pixels)
            sessions = {"litert": open_litert(fp32, threads=1), "onnx": open_session(str(onnx), threads=1)}
        except ClipRdEdgeError as error:
            return Converted(preset=preset, error=str(error))
        embeddings = embed(sessions["litert"], pixels)
        fp16 = quantize(fp32, fp16_recipe())
        times = latencies(sessions, pixels, timer=lambda calls: time_in_turn(calls, rounds=40, max_seconds=20))
        return Converted(
            preset=preset,
            max_difference=agreement(TorchEncoder(clip).encode_pixels(pixels), embeddings).max_difference,
            fp16_cosine=agreement(embeddings, embed(open_litert(fp16, threads=1), pixels)).centred_cosine,
            fp32_mb=len(fp32) / 1e6,
            fp16_mb=len(fp16) / 1e6,
            litert_ms=float(np.percentile(times["litert"], 10)),
            onnx_ms=float(np.percentile(times["onnx"], 10)),
        )


def table(results: Results) -> str:
    """Return the table as Markdown."""
    lines = [["image tower", "max difference", "FP32, MB", "FP16, MB", "FP16, centred cosine", "LiteRT / ONNX Runtime"]]
    for row in results.rows:
        if row.error:
            lines.append([row.preset, f"not converted: {row.error}", "–", "–", "–", "–"])
            continue
        lines.append(
            [
                row.preset,
                f"{row.max_difference:.1e}",
                f"{row.fp32_mb:.1f}",
                f"{row.fp16_mb:.1f}",
                f"{row.fp16_cosine:.6f}",
                f"{row.litert_ms:.1f} / {row.onnx_ms:.1f} ms = {row.litert_ms / row.onnx_ms:.2f}",
            ]
        )
    return f"{results.machine}, {results.date}:\n\n{markdown_table(lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="Markdown file with markers for the table")
    parser.add_argument("--presets", nargs="+", choices=preset_names(), default=preset_names())
    args = parser.parse_args()
    rows: dict[str, Converted] = {}
    if args.output.is_file():
        rows = {row.preset: row for row in msgspec.json.decode(args.output.read_bytes(), type=Results).rows}
    for preset in args.presets:
        if preset not in rows:
            print(f"{preset}: converting", flush=True)
            rows[preset] = convert(preset)
        ordered = tuple(rows[name] for name in preset_names() if name in rows)
        results = Results(machine=machine_name(), date=date.today().isoformat(), rows=ordered)
        write_bytes(args.output, to_json(results))
    print(table(results))
    if args.readme:
        write_between_markers(args.readme, MARKER, table(results))


if __name__ == "__main__":
    main()
