"""Bundles in FP32, FP16 and INT8 of every preset, of students that were trained for some steps: for emulate.py.

    python -m benchmarks.devices.preset_bundles -o students
    python -m benchmarks.devices.emulate students/*/* -o benchmarks/results/MACHINE/emulated.json

Some steps make a student whose embeddings differ from image to image, so that wrong answers of a kernel show; they say
nothing about accuracy. What is complete is kept, so the same command goes on.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import clip_rd_edge as edge
from clip_rd_edge.data import emoji
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.models.names import preset_names

PRECISIONS = ("fp32", "fp16", "int8")


def make_bundles(preset: str, folder: Path, steps: int) -> None:
    """Train a preset without a teacher, and export it into `folder` in each precision; INT8 may fall back to FP32."""
    run = folder.parent / f".{preset}"
    if not (run / "student").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        edge.distill(
            data="emoji", recipe="clip", student=preset, output=run, steps=steps, batch_size=32,
            learning_rate=2e-3, image_size=64, context_length=16, embedding_size=256, text="tiny", seed=0,
        )  # fmt: skip
    labels = [concept.name for concept in emoji.concepts()]
    for precision in PRECISIONS:
        if not (folder / precision).is_dir():
            fallback = {"fallback": "fp32"} if precision == "int8" else {}
            edge.export(run, folder / precision, precision=precision, labels=labels, **fallback)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every preset for some steps, and export it.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder per preset is made here")
    parser.add_argument("--presets", nargs="+", choices=preset_names(), default=preset_names())
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    for preset in arguments.presets:
        print(preset, flush=True)
        try:
            make_bundles(preset, arguments.output / preset, arguments.steps)
        except ClipRdEdgeError as error:
            print(f"{preset}: {error}", flush=True)


if __name__ == "__main__":
    main()
