"""Convert a float32 bundle to INT8."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.formats import FORMATS, Format
from clip_rd_edge.bundle.manifest import Tower, read_manifest
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.conversion import ConvertedBundle, start_conversion
from clip_rd_edge.exporting.formats.litert import LITERT_BACKEND, write_litert_fp16_tower
from clip_rd_edge.exporting.formats.onnx import write_fp16_tower
from clip_rd_edge.exporting.int8.candidates import OPENVINO, ORT, Backend
from clip_rd_edge.exporting.int8.search import QuantizedTower, TowerSamples, quantize_tower
from clip_rd_edge.exporting.int8.select import nearest
from clip_rd_edge.exporting.options import ExportRequest
from clip_rd_edge.exporting.parity import Inputs, Matches, embed, hard_inputs, top1_matches
from clip_rd_edge.runtime.backends.int8_kernels import wrong_sums
from clip_rd_edge.runtime.backends.providers import warn
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

_MIN_CORRECT = 0.05  # share of the held-out pairs that float32 has to answer before a loss says anything
_BACKENDS: dict[Format, Backend] = {"openvino": OPENVINO, "litert": LITERT_BACKEND}


def write_int8(
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet,
    backend: Backend | None = None,
    reporter: Reporter = SILENT,
) -> ConvertedBundle:
    """Write the towers of the float32 bundle `source` in INT8 into `folder`.

    A tower falls back if INT8 makes it neither faster nor, at the same latency, smaller, or costs too much accuracy;
    its note says so.

    Args:
        source: the float32 bundle.
        folder: where the files are written.
        request: its format decides which runtime the towers are quantised for and measured in.
        calibration: samples to set ranges by, and held-out samples to evaluate candidates on.
        backend: that runtime, if its candidates are not made from the files alone; None takes the format's.
        reporter: shows progress.
    """
    manifest = start_conversion(source, folder, request, calibration=calibration)
    backend = backend or _BACKENDS.get(request.format, ORT)
    if backend is ORT and (reason := wrong_sums()):
        warn(f"{reason}. INT8 is timed, and evaluated in float arithmetic, but its bundle gives wrong answers here.")
    quantized = {
        samples.tower: quantize_tower(
            source / manifest.towers[samples.tower].file,
            samples,
            budget=request.budget,
            weight_bits=request.weight_bits,
            threads=request.threads,
            backend=backend,
            reporter=reporter,
        )
        for samples in _tower_samples(source, calibration, backend, request, reporter=reporter)
        if samples.tower in manifest.towers
    }
    _require_fallback(manifest.name, quantized, request)
    in_fp16 = {name for name, outcome in quantized.items() if outcome.model is None and request.fallback == "fp16"}
    inputs = hard_inputs(source, manifest) if in_fp16 else {}
    towers = {
        name: _write_fp16_fallback(quantized[name], tower, inputs[name], source, folder, request.format)
        if name in in_fp16
        else _write_tower(quantized[name], tower, source, folder)
        for name, tower in manifest.towers.items()
    }
    trials = tuple(trial for tower in quantized.values() for trial in tower.trials)
    return ConvertedBundle(manifest.with_towers(towers, target=backend.name), trials)


def _tower_samples(
    source: Path, calibration: CalibrationSet, backend: Backend, request: ExportRequest, *, reporter: Reporter
) -> list[TowerSamples]:
    """Return the samples of both towers; an answer is correct if an image's own caption is the nearest.

    Without pairs, nobody knows what is correct, and candidates are judged by their agreement with float32 alone.
    """
    towers = read_manifest(source).towers
    calibrate, held_out = calibration.calibrate, calibration.held_out
    inputs: dict[str, tuple[Inputs, Inputs]] = {
        "image": (calibrate.pixels, held_out.pixels),
        "text": (calibrate.ids, held_out.ids),
    }
    references = {
        name: embed(backend.open(str(source / tower.file), threads=request.threads), inputs[name][1])
        for name, tower in towers.items()
    }
    correct: dict[str, Callable[[Embeddings], Matches]] = {
        "image": partial(top1_matches, captions=references["text"]),
        "text": partial(top1_matches, references["image"]),
    }
    samples = [
        TowerSamples(name, *inputs[name], references[name], adapt=request.adapts(name), in_batches=request.in_batches)
        for name in towers
    ]
    if not calibration.paired:
        reporter.say("there are no pairs to evaluate INT8 on: it is judged by its agreement with float32 alone")
        return samples
    share, chance = correct["image"](references["image"]).mean(), 1 / len(np.unique(held_out.ids, axis=0))
    if share <= max(_MIN_CORRECT, chance):
        reporter.say(
            f"float32 answers {share:.1%} of the held-out pairs, and guessing {chance:.1%}: the points that INT8 loses "
            "say nothing"
        )
    return [replace(of_tower, correct=correct[of_tower.tower]) for of_tower in samples]


def _require_fallback(name: str, quantized: Mapping[str, QuantizedTower], request: ExportRequest) -> None:
    """Raise ClipRdEdgeError if a tower falls back and the user does not allow it."""
    falling_back = {tower: outcome for tower, outcome in quantized.items() if outcome.model is None}
    fallback = request.fallback
    allowed = fallback in ("fp32", "fp16") or (fallback is None and len(falling_back) < len(quantized))
    if not falling_back or allowed:
        return
    reasons = " ".join(
        f"{tower} tower: {outcome.note.removeprefix('float32: ')}" for tower, outcome in falling_back.items()
    )
    raise ClipRdEdgeError(
        f"INT8 is not worth shipping for {name} on this machine: {reasons.rstrip('.')}.",
        hint=_alternatives(falling_back, request),
    )


def _alternatives(falling_back: Mapping[str, QuantizedTower], request: ExportRequest) -> str:
    """Return what to do, with the budget that ships INT8 where one does: in all towers if no fallback is allowed."""
    options = ["{fallback} fp32 ships float32, the best here"]
    if "fp16" in FORMATS[request.format].precisions:
        options.append("{fallback} fp16 ships half its size")
    measured = [[t for t in outcome.trials if t.measured] for outcome in falling_back.values()]
    best = [trial for trials in measured if trials and (trial := nearest(trials)).pays and trial.centred_cosine >= 0]
    budget = request.budget
    if best and (request.fallback is None or len(best) == len(falling_back)):
        changes = []
        if any(trial.centred_cosine < budget.min_agreement(trial.tower) for trial in best):
            cosine = min(trial.centred_cosine for trial in best)
            changes.append(f"{{min_agreement}} {math.floor(100 * cosine) / 100}")
        loss = max(trial.loss_points for trial in best)
        if loss > budget.max_loss:
            changes.append(f"{{max_loss}} {math.ceil(10 * loss) / 10}")
        options.append(f"{' '.join(changes)} ships the nearest INT8 candidate")
    return ", ".join(options)


def _write_tower(quantized: QuantizedTower, tower: Tower, source: Path, folder: Path) -> Tower:
    if quantized.model is None:
        shutil.copyfile(source / tower.file, folder / tower.file)
    else:
        write_bytes(folder / tower.file, quantized.model)
    return msgspec.structs.replace(
        tower,
        precision=quantized.precision,
        note=quantized.note,
        measured=quantized.measured,
        one_at_a_time=quantized.one_at_a_time or tower.one_at_a_time,
        instruction_sets=quantized.instruction_sets,
    )


def _write_fp16_fallback(
    quantized: QuantizedTower, tower: Tower, inputs: Inputs, source: Path, folder: Path, format: Format
) -> Tower:
    write = write_litert_fp16_tower if format == "litert" else write_fp16_tower
    written = write(source, folder, tower, inputs, threads=quantized.measured.threads)
    reason = quantized.note.removeprefix("float32: ")
    return msgspec.structs.replace(written, note=f"{written.precision}: {reason} {written.note}".rstrip())
