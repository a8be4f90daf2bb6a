"""Convert the image tower of every preset to a format for phones, compare it with PyTorch, and time it.

pip install '.[train,litert-torch]'      # or executorch, or coreml: each in an environment of its own
python -m benchmarks.devices.mobile litert -o benchmarks/results/MACHINE/litert.json \\
    --readme benchmarks/measurements/phones.md \\
    --bundles quickstart/bundles/fp32 quickstart/bundles/int8 litert/fp32 litert/int8

The presets' weights are random, so their table says nothing about accuracy. The format's runtime and ONNX Runtime take
turns, batch 1, one thread, by the processor time of that thread, so that other programs count little: compare the
ratio, not the milliseconds. Core ML runs on a Mac alone: what its packages declare is checked, and their sizes are
shown. Each preset's result is kept as it comes; the same command goes on from there.

With --bundles, a second table compares the towers of bundles of one model, on the first one's reference inputs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.publishing import here_and_now
from clip_rd_edge.benchmarking.report import write_between_markers
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.formats import FORMATS
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.bundle.reference import read_reference
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.formats.coreml import require_declared, write_package
from clip_rd_edge.exporting.formats.executorch import EXECUTORCH_TOOLS
from clip_rd_edge.exporting.formats.litert import LITERT_TOOLS, fp16_recipe, quantize
from clip_rd_edge.exporting.parity import Inputs, agreement, embed, hard_pixels
from clip_rd_edge.exporting.towers import IMAGE_INPUT, IMAGE_OUTPUT, export_image_tower
from clip_rd_edge.models.clip import ClipModel, evaluation_mode
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.names import preset_names
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.runtime.backends.one_input import open_litert
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.files import size_bytes, write_bytes
from clip_rd_edge.utils.structs import to_json

TOWER = Tower(file="image.onnx", input_name=IMAGE_INPUT, output_name=IMAGE_OUTPUT, precision="fp32")


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """A preset's image tower: its files in MB, max difference from PyTorch, and ms of processor time in both runtimes.

    What a format does not have is 0.

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
    ms: float = 0.0
    onnx_ms: float = 0.0


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A tower of a bundle: its file in MB, ms of processor time, and agreement with the first bundle's."""

    tower: str
    runtime: str
    precision: str
    size_mb: float
    ms: float
    max_difference: float
    centred_cosine: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The content of litert.json, executorch.json or coreml.json."""

    machine: str
    date: str
    format: str = "litert"
    rows: tuple[Converted, ...]
    bundles: tuple[Compared, ...] = ()


def processor_ms(calls: Mapping[str, Callable[[], object]], *, rounds: int = 40) -> dict[str, float]:
    """Return the median processor time of each call in milliseconds, one after the other in every round.

    Both runtimes compute on the calling thread if they have one.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if number >= 3:  # the first ones allocate
                times[name].append((time.thread_time() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def compare_bundles(folders: Sequence[Path]) -> tuple[Compared, ...]:
    """Compare the towers of bundles of one model with those of the first."""
    reference = read_reference(folders[0])
    assert reference is not None
    encoders = {folder: load(folder, threads=1) for folder in folders}
    rows = []
    for name in ("image", "text"):
        inputs: Any = reference.ids
        runs: dict[Path, Callable[[Any], Embeddings]] = {
            folder: encoder.encode_ids for folder, encoder in encoders.items()
        }
        if name == "image":
            size = encoders[folders[0]].manifest.preprocessing
            inputs = np.stack([preprocess(Image.fromarray(image), size) for image in reference.images])
            runs = {folder: encoder.encode_pixels for folder, encoder in encoders.items()}
        times = processor_ms({str(folder): partial(run, inputs[:1]) for folder, run in runs.items()})
        expected = runs[folders[0]](inputs)
        for folder, encoder in encoders.items():
            parity = agreement(expected, runs[folder](inputs))
            tower = encoder.manifest.towers[name]
            rows.append(
                Compared(
                    tower=name,
                    runtime=encoder.describe().runtime,
                    precision=tower.precision,
                    size_mb=(folder / tower.file).stat().st_size / 1e6,
                    ms=times[str(folder)],
                    max_difference=parity.max_difference,
                    centred_cosine=parity.centred_cosine,
                )
            )
    return tuple(rows)


def convert(preset: str, format: str) -> Converted:
    """Convert, compare and time one preset's image tower."""
    torch.manual_seed(0)
    clip = build_student(student_config(preset, embedding_size=256, text="tiny"), name=preset)
    use_all_layers(clip.model)
    pixels = hard_pixels(clip.preprocessing)
    with tempfile.TemporaryDirectory() as name, evaluation_mode(clip.model):
        try:
            if format == "coreml":
                return _packages(preset, clip, pixels, Path(name))
            tools = LITERT_TOOLS if format == "litert" else EXECUTORCH_TOOLS
            fp32 = tools.convert(clip, "image", TOWER, pixels)
            onnx = export_image_tower(clip, Path(name))
            sessions = {"here": tools.open(fp32, threads=1), "onnx": open_session(str(onnx), threads=1)}
        except ClipRdEdgeError as error:
            return Converted(preset=preset, error=str(error))
        embeddings = embed(sessions["here"], pixels)
        times = processor_ms({name: partial(embed, session, pixels[:1]) for name, session in sessions.items()})
        row = Converted(
            preset=preset,
            max_difference=agreement(TorchEncoder(clip).encode_pixels(pixels), embeddings).max_difference,
            fp32_mb=len(fp32) / 1e6,
            ms=times["here"],
            onnx_ms=times["onnx"],
        )
        if format != "litert":
            return row
        fp16 = quantize(fp32, fp16_recipe())
        cosine = agreement(embeddings, embed(open_litert(fp16, threads=1), pixels)).centred_cosine
        return msgspec.structs.replace(row, fp16_mb=len(fp16) / 1e6, fp16_cosine=cosine)


def use_all_layers(model: nn.Module) -> None:
    """Fill norms of zeros, with which timm's ResNets start: a converter folds what they multiply away."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and not norm.weight.any():
            nn.init.uniform_(norm.weight, 0.2, 0.5)


def _packages(preset: str, clip: ClipModel, pixels: Inputs, folder: Path) -> Converted:
    """Write Core ML packages in float32 and float16, and check what they declare."""
    sizes = []
    for half in (False, True):
        package = folder / f"{half}.mlpackage"
        write_package(clip, "image", TOWER, pixels, package, half=half)
        require_declared(package, TOWER, pixels, clip.embedding_size)
        sizes.append(size_bytes(package) / 1e6)
    return Converted(preset=preset, fp32_mb=sizes[0], fp16_mb=sizes[1])


def table(results: Results) -> str:
    """Return the tables as Markdown; a column that no row has a value for is left out."""
    title = FORMATS[results.format].title
    columns: dict[str, Callable[[Converted], str]] = {
        "max difference": lambda row: f"{row.max_difference:.1e}" if row.max_difference else "",
        "FP32, MB": lambda row: f"{row.fp32_mb:.1f}",
        "FP16, MB": lambda row: f"{row.fp16_mb:.1f}" if row.fp16_mb else "",
        "FP16, centred cosine": lambda row: f"{row.fp16_cosine:.6f}" if row.fp16_cosine else "",
        f"{title} / ONNX Runtime, ms of a core": lambda row: (
            f"{row.ms:.1f} / {row.onnx_ms:.1f} = {row.ms / row.onnx_ms:.2f}" if row.ms else ""
        ),
    }
    converted = [row for row in results.rows if not row.error]
    shown = {name: write for name, write in columns.items() if any(write(row) for row in converted)}
    lines = [["image tower", *(shown or ["result"])]]
    for row in results.rows:
        failed = [f"not converted: {row.error}", *["–"] * (len(lines[0]) - 2)]
        lines.append([row.preset, *(failed if row.error else (write(row) for write in shown.values()))])
    text = f"{results.machine}, {results.date}"
    if results.rows:
        text += f". Image towers of the presets, with random weights at 224 pixels:\n\n{markdown_table(lines)}"
    if not results.bundles:
        return text
    rows = [["tower", "runtime", "precision", "MB", "ms of a core", "max difference", "centred cosine"]]
    for tower in results.bundles:
        figures = [
            f"{tower.size_mb:.1f}",
            f"{tower.ms:.2f}",
            f"{tower.max_difference:.1e}",
            f"{tower.centred_cosine:.4f}",
        ]
        rows.append([tower.tower, tower.runtime, tower.precision, *figures])
    heading = "The quickstart's student, compared with its float32 ONNX bundle on the bundle's reference inputs:"
    return f"{text}\n\n{heading}\n\n{markdown_table(rows, left=(0, 1, 2))}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=("litert", "executorch", "coreml"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="Markdown file with markers for the table")
    parser.add_argument("--presets", nargs="*", choices=preset_names(), default=preset_names())
    parser.add_argument("--bundles", type=Path, nargs="+", default=[], help="bundles of one model, float32 ONNX first")
    args = parser.parse_args()
    rows: dict[str, Converted] = {}
    bundles: tuple[Compared, ...] = ()
    if args.output.is_file():
        known = msgspec.json.decode(args.output.read_bytes(), type=Results)
        rows, bundles = {row.preset: row for row in known.rows}, known.bundles
    if args.bundles:
        bundles = compare_bundles(args.bundles)
    results = Results(
        **here_and_now(),
        format=args.format,
        rows=(*rows.values(),),
        bundles=bundles,
    )
    write_bytes(args.output, to_json(results))
    for preset in args.presets:
        if preset not in rows:
            print(f"{preset}: converting", flush=True)
            rows[preset] = convert(preset, args.format)
        ordered = tuple(rows[name] for name in preset_names() if name in rows)
        results = msgspec.structs.replace(results, rows=ordered)
        write_bytes(args.output, to_json(results))
    print(table(results))
    if args.readme:
        write_between_markers(args.readme, args.format, table(results))


if __name__ == "__main__":
    main()
