"""An INT8 bundle from a float32 one. Never imports torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.convert.bundle import Converted, open_source
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.fp16 import probes_of, write_half
from clip_rd_edge.convert.int8.candidates import OPENVINO, ORT, Backend
from clip_rd_edge.convert.int8.search import QuantizedTower, TowerSamples, quantize_tower
from clip_rd_edge.convert.int8.select import nearest
from clip_rd_edge.convert.options import ExportRequest, Fallback
from clip_rd_edge.convert.parity import Answers, Inputs, embed, matched
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.utils.io import write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter


def write_int8(
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet,
    reporter: Reporter = SILENT,
) -> Converted:
    """Write the towers of the float32 bundle `source` in INT8 into `folder`.

    A tower that INT8 makes neither faster nor smaller at no cost in time, or too inaccurate, falls back, and its note
    says so.

    Args:
        request: its format decides which runtime the towers are for and measured in.
        calibration: what ranges are set by, and what candidates are judged by.

    Raises:
        UsageError: `source` is no float32 bundle, is damaged, or the calibration set was made for another model.
        ClipRdEdgeError: towers fall back that may not; it names the best alternative.
    """
    manifest = open_source(source, folder, calibration=calibration)
    backend = OPENVINO if request.format == "openvino" else ORT
    quantized = {
        samples.tower: quantize_tower(
            source / manifest.towers[samples.tower].file,
            samples,
            budget=request.budget,
            threads=request.threads,
            backend=backend,
            reporter=reporter,
        )
        for samples in _samples(source, manifest, calibration, backend, threads=request.threads)
    }
    fallback = request.fallback
    _require_allowed(manifest.name, quantized, fallback)
    made = {
        name: _written_half(quantized[name], tower, source, folder, probes=probes_of(source, manifest)[name])
        if fallback == "fp16" and quantized[name].model is None
        else _written(quantized[name], tower, source, folder)
        for name, tower in manifest.towers.items()
    }
    trials = tuple(trial for tower in quantized.values() for trial in tower.trials)
    return Converted(manifest.with_towers(made, target=backend.name), trials)


def _samples(
    source: Path, manifest: Manifest, calibration: CalibrationSet, backend: Backend, *, threads: int
) -> list[TowerSamples]:
    """Samples of both towers, judged by whether image and caption of a pair still find each other."""
    calibrate, judge = calibration.calibrate, calibration.judge
    inputs: dict[str, tuple[Inputs, Inputs]] = {
        "image": (calibrate.pixels, judge.pixels),
        "text": (calibrate.ids, judge.ids),
    }
    references = {
        name: embed(backend.open(str(source / tower.file), threads=threads), inputs[name][1])
        for name, tower in manifest.towers.items()
    }
    accuracy: dict[str, Callable[[Embeddings], Answers]] = {
        "image": partial(matched, captions=references["text"]),
        "text": partial(matched, references["image"]),
    }
    return [TowerSamples(name, *inputs[name], references[name], accuracy[name]) for name in manifest.towers]


def _require_allowed(name: str, quantized: Mapping[str, QuantizedTower], fallback: Fallback | None) -> None:
    """Refuse a bundle whose towers fall back though the user did not allow it."""
    left = {tower: made for tower, made in quantized.items() if made.model is None}
    allowed = fallback in ("fp32", "fp16") or (fallback is None and len(left) < len(quantized))
    if not left or allowed:
        return
    reasons = " ".join(f"{tower} tower: {made.note.removeprefix('float32: ')}" for tower, made in left.items())
    raise ClipRdEdgeError(
        f"INT8 is not worth shipping for {name} on this machine: {reasons.rstrip('.')}.", hint=_alternatives(left)
    )


def _alternatives(left: Mapping[str, QuantizedTower]) -> str:
    ways = ["--fallback fp32 ships float32, the best here", "--fallback fp16 half its size"]
    best = [nearest(trials) for made in left.values() if (trials := [t for t in made.trials if t.size_ratio > 0])]
    faster = [trial for trial in best if trial.latency_ratio < 1]
    if faster:
        least = min(math.floor(100 * trial.centred_cosine) / 100 for trial in faster)
        ways.append(f"--min-agreement {least} what came nearest")
    return ", ".join(ways)


def _written(quantized: QuantizedTower, tower: Tower, source: Path, folder: Path) -> Tower:
    if quantized.model is None:
        shutil.copy2(source / tower.file, folder / tower.file)
    else:
        write_bytes(folder / tower.file, quantized.model)
    return msgspec.structs.replace(
        tower,
        precision=quantized.precision,
        note=quantized.note,
        measured=quantized.measured,
        one_at_a_time=quantized.one_at_a_time,
    )


def _written_half(quantized: QuantizedTower, tower: Tower, source: Path, folder: Path, *, probes: Inputs) -> Tower:
    threads = quantized.measured.threads
    made = write_half(source, folder, tower, probes, threads=threads)
    why = quantized.note.removeprefix("float32: ")
    return msgspec.structs.replace(made, note=f"{made.precision}: {why} {made.note}".rstrip())
