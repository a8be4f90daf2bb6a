"""Measure the latency of all student presets and two teachers in every runtime: 224 pixels, batch 1, two threads.

    python -m benchmarks.devices.architectures WORK --prepare    # only prepares files; the machine may be busy
    python -m benchmarks.devices.architectures WORK \\
        -o benchmarks/results/MACHINE/architectures.json \\
        --readme benchmarks/measurements/architectures.md   # on a quiet machine

Weights are random: only latency is meaningful. WORK may be the folder of towers.py, whose files are reused. Thread
pools of some runtimes wait actively after a call, so each runtime is called several times in a row, and the first calls
are not timed. ViT-B/16 in eager torch, the baseline of all ratios, is timed in every repeat.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.devices.towers import Prepared, kind_of, model_of, prepare
from benchmarks.publishing import add_output_options, publish
from clip_rd_edge.benchmarking.results import Environment, this_environment
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.exporting.int8.search import MeasuredCandidate, choose
from clip_rd_edge.exporting.parity import Agreement
from clip_rd_edge.exporting.plan import Budget
from clip_rd_edge.exporting.towers import export_image_tower
from clip_rd_edge.models.clip import ImageTower, evaluation_mode, parameter_count
from clip_rd_edge.models.names import preset_names
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

BASELINE = "baseline"
EAGER, COMPILED, ORT_FP32, ORT_INT8 = "torch", "torch.compile", "ORT FP32", "ORT INT8"
OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8 = "OpenVINO FP32", "OpenVINO BF16", "OpenVINO INT8"
RUNTIMES = (EAGER, COMPILED, ORT_FP32, ORT_INT8, OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8)


class RuntimeLatency(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in one runtime.

    Attributes:
        runtime: one of RUNTIMES.
        latency_ms: p50 at batch 1, the median over repeats.
        ratio: the baseline's latency divided by this one's: median over repeats, min and max.
        method: how the file was made if there was a choice, such as the quantisation method.
    """

    runtime: str
    latency_ms: float
    ratio: tuple[float, float, float]
    method: str = msgspec.field(name="made", default="")


class ArchitectureLatency(msgspec.Struct, frozen=True, kw_only=True):
    """An image tower in every runtime that can run it here; `skipped` has the reasons for the others."""

    name: str
    parameters: int
    timed: tuple[RuntimeLatency, ...]
    skipped: dict[str, str]

    @property
    def best(self) -> RuntimeLatency:
        """The fastest runtime."""
        return max(self.timed, key=lambda result: result.ratio[0])


class Architectures(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one run; `baseline` is a description, such as `ViT-B/16 in eager torch`."""

    environment: Environment
    baseline: str
    image_size: int
    threads: int
    weights: str
    rows: tuple[ArchitectureLatency, ...]


def summarise_runtimes(
    repeats: Sequence[Mapping[str, Milliseconds]], methods: Mapping[str, str]
) -> tuple[tuple[RuntimeLatency, ...], float]:
    """Return the result of every runtime, and the baseline's p50.

    Args:
        repeats: latencies by runtime, with those of BASELINE.
        methods: see RuntimeLatency, by runtime.
    """
    medians = {name: np.asarray([np.median(repeat[name]) for repeat in repeats]) for name in repeats[0]}
    baseline = medians.pop(BASELINE)
    timed = []
    for name, values in medians.items():
        ratios = baseline / values
        spread = (float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
        latency_ms, method = float(np.median(values)), methods.get(name, "")
        timed.append(RuntimeLatency(runtime=name, latency_ms=latency_ms, ratio=spread, method=method))
    return tuple(timed), float(np.median(baseline))


def architectures_table(results: Architectures) -> str:
    """Build a Markdown table: one row per architecture, with its latency in every runtime and the best speed-up."""
    lines = [
        ["image tower", "weights, M", *(f"{runtime}, ms" for runtime in RUNTIMES), f"best: {results.baseline} / it"],
    ]
    for row in results.rows:
        latencies_ms = {result.runtime: f"{result.latency_ms:.2f}" for result in row.timed}
        middle, low, high = row.best.ratio
        best = f"{row.best.runtime}, {middle:.1f}× ({low:.1f} to {high:.1f})"
        times = [latencies_ms.get(runtime, "–") for runtime in RUNTIMES]
        lines.append([row.name, f"{row.parameters / 1e6:.1f}", *times, best])
    return markdown_table(lines)


TEACHERS = ("ViT-B/16", "ViT-L/14")
NAMES = {"ViT-L/14": "ViT-L-14", "vit_tiny_16": "ViT-T/16"}  # their names in towers.py
IMAGE_SIZE, THREADS, REPEATS, CALLS = 224, 2, 6, 8
SLOW_MS, FEW_CALLS = 150.0, 3  # towers slower than this are called less often
Call = Callable[[], object]


def tower_name(name: str) -> str:
    return NAMES.get(name, name)


def folder_of(work: Path, name: str) -> Path:
    return work / tower_name(name).replace("/", "-")


def prepare_files(work: Path, name: str) -> None:
    """Write all files that are timed later: every precision of a student, float32 of a teacher."""
    folder = folder_of(work, name)
    if (folder / "fp32.onnx").is_file():
        return
    print(f"{name}: preparing", flush=True)
    with new_folder(folder) as new:
        if name not in TEACHERS:
            prepare(tower_name(name), new)
            return
        clip = model_of(tower_name(name))
        with evaluation_mode(clip.model):
            export_image_tower(clip, new).rename(new / "fp32.onnx")
        np.save(new / "one.npy", np.random.default_rng(0).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32))


def torch_call(tower: torch.nn.Module, pixels: np.ndarray) -> Call:
    tensor = torch.from_numpy(pixels)

    def call() -> object:
        with torch.inference_mode():
            return tower(tensor)

    return call


def session_call(session: Any, pixels: np.ndarray) -> Call:
    return partial(session.run, None, {session.get_inputs()[0].name: pixels})


def int8_call(work: Path, name: str, fp32: Call, pixels: np.ndarray) -> tuple[Call | None, str]:
    """Return what the exporter's own rule would ship for ONNX Runtime; None if that is float32."""
    folder = folder_of(work, name)
    candidates = msgspec.json.decode((folder / "prepared.json").read_bytes(), type=Prepared).candidates
    calls = {c.name: session_call(open_session(str(folder / c.file), threads=THREADS), pixels) for c in candidates}
    times = {label: burst(call) for label, call in {**calls, ORT_FP32: fp32}.items()}
    sizes = {c.name: (folder / c.file).stat().st_size for c in candidates}
    fp32_size = (folder / "fp32.onnx").stat().st_size
    reference = MeasuredCandidate(ORT_FP32, times[ORT_FP32], Agreement(0.0, 1.0, 1.0, 1), fp32_size)
    tried = [MeasuredCandidate(c.name, times[c.name], c.agreement, sizes[c.name]) for c in candidates]
    choice = choose(kind_of(tower_name(name)), reference, tried, budget=Budget()).name
    if choice is None:
        return None, "float32 is shipped: no INT8 candidate is faster and accurate enough"
    return calls[choice], choice


def burst(call: Call, *, warmup: int = 3) -> Milliseconds:
    """Time several calls in a row, after untimed ones, during which the thread pools of other runtimes go idle."""
    first = time_in_turn({"": call}, rounds=1, warmup=warmup)[""]
    calls = FEW_CALLS if first[0] > SLOW_MS else CALLS
    return time_in_turn({"": call}, rounds=calls, warmup=0, min_rounds=calls)[""]


def measure(work: Path, name: str, baseline: Call) -> ArchitectureLatency:
    folder, skipped, methods = folder_of(work, name), {}, {}
    pixels = np.load(folder / "one.npy")
    clip = model_of(tower_name(name))
    tower = ImageTower(clip.model.eval())
    fp32 = str(folder / "fp32.onnx")
    calls: dict[str, Call] = {
        EAGER: torch_call(tower, pixels),
        ORT_FP32: session_call(open_session(fp32, threads=THREADS), pixels),
        OPENVINO_FP32: session_call(open_openvino(fp32, threads=THREADS), pixels),
        OPENVINO_BF16: session_call(open_openvino(fp32, threads=THREADS, bf16=True), pixels),
    }
    try:
        compiled = torch_call(torch.compile(tower, dynamic=False), pixels)
        compiled()
        calls[COMPILED] = compiled
    except Exception as error:  # noqa: BLE001 — any failure to compile is a result
        skipped[COMPILED] = (str(error).splitlines() or [type(error).__name__])[0]
    if (folder / "prepared.json").is_file():
        int8, methods[ORT_INT8] = int8_call(work, name, calls[ORT_FP32], pixels)
        if int8 is None:
            skipped[ORT_INT8] = methods.pop(ORT_INT8)
        else:
            calls[ORT_INT8] = int8
        calls[OPENVINO_INT8] = session_call(open_openvino(str(folder / "nncf.xml"), threads=THREADS), pixels)
        methods[OPENVINO_INT8] = "NNCF"
    else:
        skipped |= dict.fromkeys((ORT_INT8, OPENVINO_INT8), "Teachers are not quantised here.")
    calls[BASELINE] = baseline
    repeats = [{label: burst(call) for label, call in calls.items()} for _ in range(REPEATS)]
    timed, _ = summarise_runtimes(repeats, methods)
    parameters = parameter_count(clip.model.visual)
    return ArchitectureLatency(name=name, parameters=parameters, timed=timed, skipped=skipped)


def baseline_call(work: Path) -> Call:
    pixels = np.load(folder_of(work, "ViT-B/16") / "one.npy")
    return torch_call(ImageTower(model_of("ViT-B/16").model.eval()), pixels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="folder for prepared files")
    add_output_options(parser, "architectures")
    parser.add_argument("--only", nargs="+", choices=[*TEACHERS, *preset_names()], default=[*TEACHERS, *preset_names()])
    parser.add_argument("--prepare", action="store_true", help="only prepare the files")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    # Keeps the code that --prepare compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.work.resolve() / "inductor"))
    for name in dict.fromkeys(("ViT-B/16", *args.only)):
        prepare_files(args.work, name)
        if args.prepare:
            torch_call(
                torch.compile(ImageTower(model_of(tower_name(name)).model.eval()), dynamic=False),
                load_pixels(args.work, name),
            )()
    if args.prepare:
        return
    baseline = baseline_call(args.work)
    rows = []
    for name in args.only:
        print(f"{name}: measuring", file=sys.stderr, flush=True)
        rows.append(measure(args.work, name, baseline))
        torch.compiler.reset()
    results = Architectures(
        environment=this_environment(),
        baseline="ViT-B/16 in eager torch",
        image_size=IMAGE_SIZE,
        threads=THREADS,
        weights="random",
        rows=tuple(rows),
    )
    publish(results, architectures_table(results), args)


def load_pixels(work: Path, name: str) -> np.ndarray:
    return np.load(folder_of(work, name) / "one.npy")


if __name__ == "__main__":
    main()
