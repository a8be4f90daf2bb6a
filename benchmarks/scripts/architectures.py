"""Not a test: latency of every student preset and two teachers at 224 pixels, batch 1, two threads, in every runtime.

    python benchmarks/scripts/architectures.py WORK --prepare    # files alone; the machine may be busy
    python benchmarks/scripts/architectures.py WORK \\
        -o benchmarks/results/MACHINE/architectures.json --readme benchmarks/README.md   # on a quiet machine

Weights are random: the figures are of latency alone. WORK may be that of towers.py, whose files are used.
Runtimes have thread pools that wait actively after a call, so that each is called some times in a row, the first of
them untimed, and ViT-B/16 in eager torch, the baseline of all ratios, takes its turn in every sitting.
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
from towers import Prepared, kind_of, model_of, prepare

from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.benchmarking.report.text import write_between_marks
from clip_rd_edge.benchmarking.results import Environment, this_environment
from clip_rd_edge.convert.int8.select import Measured, choose
from clip_rd_edge.convert.options import Budget
from clip_rd_edge.convert.parity import Agreement
from clip_rd_edge.exporters.onnx import evaluating, export_image_tower
from clip_rd_edge.models.clip import ImageTower, parameter_count
from clip_rd_edge.models.student import preset_names
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.io import new_folder, to_json, write_bytes
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

BASELINE = "baseline"
EAGER, COMPILED, ORT_FP32, ORT_INT8 = "torch", "torch.compile", "ORT FP32", "ORT INT8"
OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8 = "OpenVINO FP32", "OpenVINO BF16", "OpenVINO INT8"
RUNTIMES = (EAGER, COMPILED, ORT_FP32, ORT_INT8, OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8)


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in one runtime.

    Attributes:
        runtime: one of RUNTIMES.
        latency_ms: p50 at batch 1, the median over sittings.
        ratio: what the baseline takes over what this takes: median over sittings, least and greatest.
        made: what it is made of, where that was chosen, such as the way of quantising.
    """

    runtime: str
    latency_ms: float
    ratio: tuple[float, float, float]
    made: str = ""


class ArchitectureLatency(msgspec.Struct, frozen=True, kw_only=True):
    """An image tower in every runtime that runs it here; `skipped` says of the others why not."""

    name: str
    parameters: int
    timed: tuple[Timed, ...]
    skipped: dict[str, str]

    @property
    def best(self) -> Timed:
        """The fastest runtime."""
        return max(self.timed, key=lambda each: each.ratio[0])


class Architectures(msgspec.Struct, frozen=True, kw_only=True):
    """What one run measured; `baseline` in words, such as `ViT-B/16 in eager torch`."""

    environment: Environment
    baseline: str
    image_size: int
    threads: int
    weights: str
    rows: tuple[ArchitectureLatency, ...]


def summarise_runtimes(
    sittings: Sequence[Mapping[str, Milliseconds]], made: Mapping[str, str]
) -> tuple[tuple[Timed, ...], float]:
    """Figures of every runtime, and the baseline's p50.

    Args:
        sittings: latencies by runtime, and of BASELINE beside them.
        made: as in Timed, by runtime.
    """
    medians = {name: np.asarray([np.median(sitting[name]) for sitting in sittings]) for name in sittings[0]}
    baseline = medians.pop(BASELINE)
    timed = []
    for name, values in medians.items():
        ratios = baseline / values
        spread = (float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
        timed.append(Timed(runtime=name, latency_ms=float(np.median(values)), ratio=spread, made=made.get(name, "")))
    return tuple(timed), float(np.median(baseline))


def architectures_table(results: Architectures) -> str:
    """A Markdown table: a row an architecture, milliseconds a runtime, and the best one's ratio to the baseline."""
    lines = [
        ["image tower", "weights, M", *(f"{runtime}, ms" for runtime in RUNTIMES), f"best: {results.baseline} / it"],
    ]
    for row in results.rows:
        found = {each.runtime: f"{each.latency_ms:.2f}" for each in row.timed}
        middle, low, high = row.best.ratio
        best = f"{row.best.runtime}, {middle:.1f}× ({low:.1f} to {high:.1f})"
        times = [found.get(runtime, "–") for runtime in RUNTIMES]
        lines.append([row.name, f"{row.parameters / 1e6:.1f}", *times, best])
    return markdown_table(lines)


TEACHERS = ("ViT-B/16", "ViT-L/14")
NAMES = {"ViT-L/14": "ViT-L-14", "vit_tiny_16": "ViT-T/16"}  # those that towers.py has
IMAGE_SIZE, THREADS, SITTINGS, CALLS = 224, 2, 6, 8
SLOW_MS, FEW_CALLS = 150.0, 3  # a tower that takes longer is called less often
Call = Callable[[], object]


def tower_name(name: str) -> str:
    return NAMES.get(name, name)


def folder_of(work: Path, name: str) -> Path:
    return work / tower_name(name).replace("/", "-")


def prepare_files(work: Path, name: str) -> None:
    """Every file that is timed later: all precisions of a student, float32 of a teacher."""
    folder = folder_of(work, name)
    if (folder / "fp32.onnx").is_file():
        return
    print(f"{name}: preparing", flush=True)
    with new_folder(folder) as new:
        if name not in TEACHERS:
            prepare(tower_name(name), new)
            return
        clip = model_of(tower_name(name))
        with evaluating(clip.model):
            export_image_tower(clip, new).rename(new / "fp32.onnx")
        np.save(new / "one.npy", np.random.default_rng(0).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32))


def torch_call(tower: torch.nn.Module, one: np.ndarray) -> Call:
    pixels = torch.from_numpy(one)

    def call() -> object:
        with torch.inference_mode():
            return tower(pixels)

    return call


def session_call(session: Any, one: np.ndarray) -> Call:
    return partial(session.run, None, {session.get_inputs()[0].name: one})


def int8_of(work: Path, name: str, fp32: Call, one: np.ndarray) -> tuple[Call | None, str]:
    """What the exporter would ship for ONNX Runtime, by its own rule, timed here; None where that is float32."""
    folder = folder_of(work, name)
    candidates = msgspec.json.decode((folder / "prepared.json").read_bytes(), type=Prepared).candidates
    calls = {
        each.name: session_call(open_session(str(folder / each.file), threads=THREADS), one) for each in candidates
    }
    times = {label: burst(call) for label, call in {**calls, ORT_FP32: fp32}.items()}
    size = {each.name: (folder / each.file).stat().st_size for each in candidates}
    itself = Measured(ORT_FP32, times[ORT_FP32], Agreement(0.0, 1.0, 1.0, 1), (folder / "fp32.onnx").stat().st_size)
    tried = [Measured(each.name, times[each.name], each.of, size[each.name]) for each in candidates]
    chosen = choose(kind_of(tower_name(name)), itself, tried, budget=Budget()).name
    return (calls[chosen], chosen) if chosen else (None, "float32 is shipped: no INT8 is faster and accurate enough")


def burst(call: Call, *, warmup: int = 3) -> Milliseconds:
    """Some calls in a row, after untimed ones that wait for other pools to fall asleep."""
    first = time_in_turn({"": call}, rounds=1, warmup=warmup)[""]
    calls = FEW_CALLS if first[0] > SLOW_MS else CALLS
    return time_in_turn({"": call}, rounds=calls, warmup=0, least=calls)[""]


def measure(work: Path, name: str, baseline: Call) -> ArchitectureLatency:
    folder, skipped, made = folder_of(work, name), {}, {}
    one = np.load(folder / "one.npy")
    clip = model_of(tower_name(name))
    tower = ImageTower(clip.model.eval())
    fp32 = str(folder / "fp32.onnx")
    calls: dict[str, Call] = {
        EAGER: torch_call(tower, one),
        ORT_FP32: session_call(open_session(fp32, threads=THREADS), one),
        OPENVINO_FP32: session_call(open_openvino(fp32, threads=THREADS), one),
        OPENVINO_BF16: session_call(open_openvino(fp32, threads=THREADS, bf16=True), one),
    }
    try:
        compiled = torch_call(torch.compile(tower, dynamic=False), one)
        compiled()
        calls[COMPILED] = compiled
    except Exception as error:  # noqa: BLE001 — whatever keeps torch from compiling it is the result
        skipped[COMPILED] = (str(error).splitlines() or [type(error).__name__])[0]
    if (folder / "prepared.json").is_file():
        int8, made[ORT_INT8] = int8_of(work, name, calls[ORT_FP32], one)
        if int8 is None:
            skipped[ORT_INT8] = made.pop(ORT_INT8)
        else:
            calls[ORT_INT8] = int8
        calls[OPENVINO_INT8] = session_call(open_openvino(str(folder / "nncf.xml"), threads=THREADS), one)
        made[OPENVINO_INT8] = "NNCF"
    else:
        skipped |= dict.fromkeys((ORT_INT8, OPENVINO_INT8), "A teacher is not quantised here.")
    calls[BASELINE] = baseline
    sittings = [{label: burst(call) for label, call in calls.items()} for _ in range(SITTINGS)]
    timed, _ = summarise_runtimes(sittings, made)
    parameters = parameter_count(clip.model.visual)
    return ArchitectureLatency(name=name, parameters=parameters, timed=timed, skipped=skipped)


def baseline_call(work: Path) -> Call:
    one = np.load(folder_of(work, "ViT-B/16") / "one.npy")
    return torch_call(ImageTower(model_of("ViT-B/16").model.eval()), one)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="where files are kept")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--readme", type=Path, help="where the table goes, between its marks")
    parser.add_argument("--only", nargs="+", choices=[*TEACHERS, *preset_names()], default=[*TEACHERS, *preset_names()])
    parser.add_argument("--prepare", action="store_true", help="time nothing")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    # What --prepare compiled is kept.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(given.work.resolve() / "inductor"))
    for name in dict.fromkeys(("ViT-B/16", *given.only)):
        prepare_files(given.work, name)
        if given.prepare:
            torch_call(
                torch.compile(ImageTower(model_of(tower_name(name)).model.eval()), dynamic=False),
                one_of(given.work, name),
            )()
    if given.prepare:
        return
    baseline = baseline_call(given.work)
    rows = []
    for name in given.only:
        print(f"{name}: measuring", file=sys.stderr, flush=True)
        rows.append(measure(given.work, name, baseline))
        torch.compiler.reset()
    results = Architectures(
        environment=this_environment(),
        baseline="ViT-B/16 in eager torch",
        image_size=IMAGE_SIZE,
        threads=THREADS,
        weights="random",
        rows=tuple(rows),
    )
    table = architectures_table(results)
    print(table)
    if given.output:
        write_bytes(given.output, to_json(results))
    if given.readme:
        write_between_marks(given.readme, "architectures", table)


def one_of(work: Path, name: str) -> np.ndarray:
    return np.load(folder_of(work, name) / "one.npy")


if __name__ == "__main__":
    main()
