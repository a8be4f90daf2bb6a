"""What the measurements of an INT8 export say beyond its choice: other limits, and BF16 where that is faster here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from clip_rd_edge.bundle.formats import format_named
from clip_rd_edge.exporting.formats import Job
from clip_rd_edge.exporting.int8.candidates import Backend
from clip_rd_edge.exporting.int8.trials import QuantizedTower, nearest
from clip_rd_edge.exporting.parity import agreement, embed, latencies, p10
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.installation import install_command
from clip_rd_edge.utils.host import FAST_BF16, instruction_sets

# An accurate candidate is named if it takes at most this share longer, with at most this share of the error.
_LITTLE_LONGER, _MUCH_NEARER = 1.15, 0.33
# BF16 in OpenVINO is named below this share of the shipped tower's latency. It takes 0.48 to 0.66 of that of float32 in
# ONNX Runtime (benchmarks/measurements/towers.md).
_FASTER, _USUAL_BF16 = 0.9, 0.6
_SAMPLES = 24
_HERE = ("", "cpu-x86", "cpu-x86-vnni", "cpu-arm", "openvino")  # targets that may be this processor


def remarks(job: Job, found: Mapping[str, QuantizedTower], backend: Backend) -> Iterator[str]:
    """Yield sentences on what may suit the user better than what is shipped.

    Args:
        found: by tower.
        backend: the runtime that INT8 was measured in.
    """
    for name, outcome in found.items():
        if nearer := _nearer(outcome):
            yield f"{name} tower: {nearer}"
    plan = job.plan
    if plan.format in ("onnx", "openvino") and plan.layout == "bundle" and plan.target in _HERE:
        yield from _in_bf16(job, found, backend)


def _nearer(outcome: QuantizedTower) -> str:
    """Return a sentence on a candidate that is much more accurate than the shipped one and takes little longer."""
    shipped = next((trial for trial in outcome.trials if trial.verdict == "shipped"), None)
    if shipped is None:
        return ""
    nearer = [
        trial
        for trial in outcome.trials
        if trial.pays
        and trial.latency_ratio <= _LITTLE_LONGER * shipped.latency_ratio
        and 1 - trial.centred_cosine <= _MUCH_NEARER * (1 - shipped.centred_cosine)
    ]
    if not nearer:
        return ""
    trial = min(nearer, key=lambda trial: trial.latency_ratio)
    errors = [max(1 - each.centred_cosine, 1e-6) for each in (trial, shipped)]
    limit = 1 - float(f"{math.sqrt(errors[0] * errors[1]):.0e}")  # between the two
    return (
        f"{trial.name} has a centred cosine of {trial.centred_cosine:.4f}, and not {shipped.centred_cosine:.4f}, at "
        f"{trial.latency_ratio / shipped.latency_ratio:.2f} of the time: --min-agreement {limit:g}, for both towers"
    )


def _in_bf16(job: Job, found: Mapping[str, QuantizedTower], backend: Backend) -> Iterator[str]:
    if not FAST_BF16.intersection(instruction_sets()):
        return
    command, threads = "--format openvino --precision bf16", job.plan.threads
    if not find_spec("openvino"):
        # A text is embedded once; an image tower's time is what a device spends.
        ratio = next((trial.latency_ratio for trial in found["image"].trials if trial.verdict == "shipped"), 1.0)
        if _FASTER * ratio > _USUAL_BF16:
            yield (
                f"this processor computes BF16, in which OpenVINO takes about half of float32's time: "
                f"{install_command('openvino')}, and export with {command}"
            )
        return
    from clip_rd_edge.runtime.backends.openvino import open_openvino

    assert job.samples is not None
    for name, outcome in found.items():
        job.reporter_of(name).update("timing BF16 in OpenVINO")
        model = str(job.source / job.fp32.towers[name].file)
        inputs = (job.samples.held_out.pixels if name == "image" else job.samples.held_out.ids)[:_SAMPLES]
        bf16 = open_openvino(model, threads=threads, bf16=True)
        shipped = backend.open(outcome.model or model, threads=threads)
        times = latencies({"bf16": bf16, "shipped": shipped}, inputs, max_seconds=4.0)
        ratio = p10(times["bf16"]) / p10(times["shipped"])
        if ratio < _FASTER:
            parity = agreement(embed(backend.open(model, threads=threads), inputs), embed(bf16, inputs))
            yield (
                f"{name} tower: in BF16, OpenVINO takes {ratio:.2f} of the time of what is shipped, with a centred "
                f"cosine of {parity.centred_cosine:.4f} and a file of float32's size: {command}"
            )


def alternatives(falling_back: Mapping[str, QuantizedTower], plan: Plan) -> str:
    """Return what to do, with the budget that ships INT8 where one does: in all towers if no fallback is allowed."""
    options = ["{fallback} fp32 ships float32, the best here"]
    if "fp16" in format_named(plan.format).precisions:
        options.append("{fallback} fp16 ships half its size")
    measured = [[t for t in outcome.trials if t.measured] for outcome in falling_back.values()]
    best = [trial for trials in measured if trials and (trial := nearest(trials)).pays and trial.centred_cosine >= 0]
    budget = plan.budget
    if best and (plan.fallback is None or len(best) == len(falling_back)):
        changes = []
        if any(trial.centred_cosine < budget.min_agreement(trial.tower) for trial in best):
            cosine = min(trial.centred_cosine for trial in best)
            changes.append(f"{{min_agreement}} {math.floor(100 * cosine) / 100}")
        loss = max(trial.loss_points for trial in best)
        if loss > budget.max_loss:
            changes.append(f"{{max_loss}} {math.ceil(10 * loss) / 10}")
        options.append(f"{' '.join(changes)} ships the nearest INT8 candidate")
    return ", ".join(options)
