"""Convert a float32 bundle to INT8: build candidates of each tower, measure them in turn, choose the one to ship."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from clip_rd_edge.bundle.formats import format_named
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ClipRdEdgeError, in_one_line
from clip_rd_edge.exporting.formats import Converted, Job
from clip_rd_edge.exporting.formats.onnx import write_fp16
from clip_rd_edge.exporting.int8.candidates import Backend, Float32Tower, onnx_candidates
from clip_rd_edge.exporting.int8.saturation import right_session
from clip_rd_edge.exporting.int8.trials import (
    QuantizedTower,
    Trial,
    cost_objection,
    keep_outcome,
    kept_outcome,
    nearest,
    outcome_folder,
    outcome_key,
    remarks,
)
from clip_rd_edge.exporting.parity import Agreement, agreement, embed, latencies, measurement, p10, top1_matches
from clip_rd_edge.exporting.plan import Budget
from clip_rd_edge.runtime.backends.onnxruntime import open_session, wrong_sums
from clip_rd_edge.runtime.encoder import warn
from clip_rd_edge.utils.files import disk_full_error, write_bytes
from clip_rd_edge.utils.timing import Clock, Milliseconds, sign_test

ORT = Backend("onnxruntime", open_session, onnx_candidates, write_fp16=write_fp16)
_FP32 = "float32"
# Candidates within this factor of the fastest count as equally fast. Latencies vary by some percent from run to run. A
# text is embedded once per query or label, and an image per frame, so accuracy may cost a text tower more.
_EQUALLY_FAST = {"image": 1.1, "text": 1.25}
# A loss of accuracy counts only if its probability by chance is below this.
_CHANCE = 0.1
# Every candidate is compared on a few held-out samples, where its error may be this many times the largest; the best of
# them on all.
_FEW, _TOLERANCE = 24, 1.3
_TIMING_SECONDS = 10.0
# Of a limited time: what the first float32 embeddings may take, and what is kept for comparing candidates.
_FOR_REFERENCE, _FOR_COMPARING = 0.15, 0.4


def write_int8(job: Job, backend: Backend) -> Converted:
    """Write the towers of a job's source in INT8.

    A tower falls back if INT8 makes it neither faster nor, at the same latency, smaller, or costs too much accuracy;
    its note records this.
    """
    if backend.name == ORT.name and (reason := wrong_sums()):
        warn(f"{reason}. INT8 is timed, and evaluated in float arithmetic, but its bundle gives wrong answers here.")
    clock = Clock() if job.plan.search_minutes is None else Clock(60 * job.plan.search_minutes)
    towers = [tower for tower in _towers(job, backend, clock) if tower.name in job.manifest.towers]
    found = {}
    for left, tower in zip(range(len(towers), 0, -1), towers, strict=True):
        key = outcome_key(tower, backend)
        if outcome := kept_outcome(key):
            job.reporter.note(
                f"{tower.name} tower: found before for this tower, these samples and this machine; to search again, "
                f"delete {outcome_folder() / key}"
            )
        else:
            timed = replace(tower, clock=Clock(clock.share(1 / left)))
            outcome = quantize_tower(timed, job.manifest.towers[tower.name], backend)
            keep_outcome(key, outcome)
        found[tower.name] = outcome
    _require_fallback(job, found)
    for remark in remarks(job, found, backend):
        job.reporter.note(remark)

    def write(name: str, tower: Tower) -> Tower:
        outcome, source, file = found[name], job.source / tower.file, job.folder / tower.file
        if outcome.model is not None:
            write_bytes(file, outcome.model)
        elif job.plan.fallback == "fp16" and backend.write_fp16:
            written = backend.write_fp16(job, name, tower)
            return msgspec.structs.replace(
                written, note=f"{written.precision}: {outcome.reason} {written.note}".rstrip()
            )
        else:
            shutil.copyfile(source, file)
        return outcome.tower

    converted = job.convert_towers(write, doing="writing the file", target=backend.name)
    return Converted(converted.manifest, tuple(trial for outcome in found.values() for trial in outcome.trials))


def _towers(job: Job, backend: Backend, clock: Clock) -> list[Float32Tower]:
    """Return both towers, with the answers that are correct: an image's own caption is the nearest.

    Without pairs, nobody knows what is correct, and candidates are judged by their agreement with float32 alone. If the
    time is limited, a slow tower has fewer held-out samples.
    """
    samples, threads = job.samples, job.plan.threads
    towers = [Float32Tower.of(job, name) for name in job.fp32.towers]
    sessions = [backend.open(str(tower.model), threads=threads) for tower in towers]
    seconds = [
        latencies({"": session}, tower.held_out, rounds=1, warmup=1)[""].sum() / 1e3
        for session, tower in zip(sessions, towers, strict=True)
    ]
    count = max(_FEW, int(min(clock.share(_FOR_REFERENCE) / sum(seconds), len(towers[0].held_out))))
    for number, session in enumerate(sessions):
        towers[number].reporter.update("embedding the held-out samples in float32", message=str(clock))
        held_out = towers[number].held_out[:count]
        towers[number] = replace(towers[number], held_out=held_out, reference=embed(session, held_out))
    if samples is None or not samples.paired:
        job.reporter.note("there are no pairs to evaluate INT8 on: it is judged by its agreement with float32 alone")
        return towers
    images, captions = (tower.reference for tower in towers)
    assert images is not None
    assert captions is not None
    of_images, of_captions = partial(top1_matches, captions=captions), partial(top1_matches, images)
    return [replace(towers[0], correct=of_images), replace(towers[1], correct=of_captions)]


def _require_fallback(job: Job, found: Mapping[str, QuantizedTower]) -> None:
    """Raise ClipRdEdgeError if a tower falls back and the user does not allow it."""
    falling_back = {tower: outcome for tower, outcome in found.items() if outcome.model is None}
    fallback = job.plan.fallback
    if not falling_back or fallback in ("fp32", "fp16") or (fallback is None and len(falling_back) < len(found)):
        return
    reasons = " ".join(f"{tower} tower: {outcome.reason}" for tower, outcome in falling_back.items())
    half = ", {fallback} fp16 half its size" if "fp16" in format_named(job.plan.format).precisions else ""
    raise ClipRdEdgeError(
        f"INT8 is not worth shipping for {job.manifest.name} on this machine: {reasons.rstrip('.')}.",
        hint=f"{{fallback}} fp32 ships float32, the best here{half}; with a lower {{min_agreement}} or a higher "
        "{max_loss}, INT8 may be less accurate",
    )


def quantize_tower(tower: Float32Tower, entry: Tower, backend: Backend = ORT) -> QuantizedTower:
    """Build and measure every INT8 candidate of a tower, and choose by the measurements on this machine."""
    threads, reporter, clock = tower.plan.threads, tower.reporter, tower.clock
    float32 = backend.open(str(tower.model), threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        prepared = replace(tower, model=backend.prepare(tower.model, Path(folder)))
        opened, left_out = _open_candidates(prepared, backend)
    reporter.update(f"timing {len(opened)} candidates and float32 in turn", message=str(clock))
    sessions = {_FP32: float32, **{name: candidate.session for name, candidate in opened.items()}}
    max_seconds = clock.share(_FOR_COMPARING, most=_TIMING_SECONDS)
    latencies_ms = latencies(sessions, tower.held_out, max_seconds=max_seconds)
    reference = embed(float32, tower.held_out) if tower.reference is None else tower.reference
    tower = replace(tower, reference=reference)
    same = agreement(reference, reference)
    fp32 = MeasuredCandidate(_FP32, latencies_ms[_FP32], same, tower.model.stat().st_size)
    few, measured = tower, {}
    if len(tower.held_out) > _FEW:  # by which no accuracy is judged
        few = replace(tower, held_out=tower.held_out[:_FEW], reference=reference[:_FEW], correct=None)
    for number, (name, candidate) in enumerate(opened.items(), 1):
        reporter.update("comparing candidates", number, len(opened), str(clock))
        measured[name] = _measured(name, candidate, latencies_ms[name], few, backend)
    budget = tower.plan.budget
    choice = choose(tower.name, fp32, list(measured.values()), budget=budget, left_out=left_out)
    while (best := choice.name) and measured[best].agreement.samples < same.samples:
        reporter.update(f"evaluating {best}", message=str(clock))
        measured[best] = _measured(best, opened[best], latencies_ms[best], tower, backend)
        choice = choose(tower.name, fp32, list(measured.values()), budget=budget, left_out=left_out)
    shipped, file = (measured[choice.name], opened[choice.name]) if choice.name else (fp32, None)
    figures = measurement(shipped.agreement, shipped.latencies_ms, reference_ms=fp32.latencies_ms, threads=threads)
    written = msgspec.structs.replace(
        entry,
        precision=f"int8 {choice.name}" if file else "fp32",
        note=choice.note,
        measured=figures,
        one_at_a_time=entry.one_at_a_time or (file is not None and file.one_at_a_time),
        instruction_sets=backend.instruction_sets(file.content) if file else (),
    )
    return QuantizedTower(file.content if file else None, written, choice.trials)


class _OpenCandidate(NamedTuple):
    """A candidate's file, and a session of it; `one_at_a_time` as in `bundle.manifest.Tower`."""

    content: bytes
    session: Any
    one_at_a_time: bool


def _open_candidates(tower: Float32Tower, backend: Backend) -> tuple[dict[str, _OpenCandidate], list[Trial]]:
    """Return the candidates to measure by name, and the others."""
    opened, left_out = dict[str, _OpenCandidate](), list[Trial]()
    for candidate in backend.candidates(tower):
        if opened and tower.clock.left < _FOR_COMPARING * tower.clock.seconds:
            tower.reporter.note(f"{tower.name} tower: no time is left to try more than {len(opened)} ways of INT8")
            break
        tower.reporter.update(candidate.name, message=str(tower.clock))
        verdict = ""
        try:
            content = candidate.make()
            made = _OpenCandidate(
                content, backend.open(content, threads=tower.plan.threads), backend.one_at_a_time(content)
            )
            verdict = "depends on the batch" if tower.plan.in_batches and made.one_at_a_time else ""
        except Exception as error:  # the quantiser raises many types; the other candidates are still tried
            if full := disk_full_error(error):
                raise full from error
            verdict = f"failed: {type(error).__name__}: {in_one_line(error)}"
        if verdict:
            left_out.append(Trial(tower=tower.name, name=candidate.name, verdict=verdict))
        else:
            opened[candidate.name] = made
    return opened, left_out


def _measured(
    name: str, candidate: _OpenCandidate, latencies_ms: Milliseconds, tower: Float32Tower, backend: Backend
) -> MeasuredCandidate:
    """Return what a candidate costs and how it answers, beside float32."""
    content, reference = candidate.content, tower.reference
    session = right_session(
        candidate.session, content, threads=tower.plan.threads, runtime=backend.name, sets=backend.instruction_sets
    )
    embeddings = embed(session, tower.held_out, batch_size=1 if candidate.one_at_a_time else None)
    assert reference is not None
    answers = {}
    if tower.correct:
        before, after = tower.correct(reference), tower.correct(embeddings)
        answers = {"lost": int((before & ~after).sum()), "gained": int((after & ~before).sum())}
    return MeasuredCandidate(name, latencies_ms, agreement(reference, embeddings), len(content), **answers)


@dataclass(frozen=True)
class MeasuredCandidate:
    """The measurements of a candidate, or of float32, whose agreement is with itself.

    Attributes:
        latencies_ms: of single runs, timed in turn with the other candidates.
        agreement: with float32 on the held-out samples.
        lost: number of held-out pairs that only float32 answers correctly, or None without pairs.
        gained: number of held-out pairs that only the candidate answers correctly.
    """

    name: str
    latencies_ms: Milliseconds
    agreement: Agreement
    size_bytes: int
    lost: int | None = None
    gained: int = 0

    @property
    def loss_points(self) -> float:
        """Loss of zero-shot accuracy, as in Trial."""
        return math.nan if self.lost is None else 100 * (self.lost - self.gained) / self.agreement.samples


class Choice(NamedTuple):
    """The candidate to ship, or None for float32 with the reason in `note`, and the table of all candidates."""

    name: str | None
    note: str
    trials: tuple[Trial, ...]


def choose(
    tower: str,
    fp32: MeasuredCandidate,
    tried: Sequence[MeasuredCandidate],
    *,
    budget: Budget,
    left_out: Sequence[Trial] = (),
) -> Choice:
    """Choose the smallest of the fastest candidates that are within the budget and worth shipping.

    A candidate is worth shipping if it is faster than float32, or much smaller and not slower. Among candidates of
    about the same size, the most accurate is chosen. Candidates are always less accurate than float32, so one that is
    also slower is never shipped.

    Args:
        tried: the candidates; one that was compared on fewer samples than float32 may disagree a little more.
        left_out: candidates that could not be measured, for the table, and the note if there is no other.
    """
    min_agreement = budget.min_agreement(tower)
    latency_ratios = {c.name: p10(c.latencies_ms) / p10(fp32.latencies_ms) for c in tried}
    size_ratios = {c.name: c.size_bytes / fp32.size_bytes for c in tried}
    objections = {}
    for c in tried:
        tolerance = 1.0 if c.agreement.samples == fp32.agreement.samples else _TOLERANCE
        too_far = 1 - c.agreement.centred_cosine > tolerance * (1 - min_agreement)
        reasons = (
            cost_objection(latency_ratios[c.name], size_ratios[c.name]),
            f"below {min_agreement}" if too_far else "",
            _loss_objection(c, budget.max_loss),
        )
        objections[c.name] = " and ".join(filter(None, reasons))
    good = [c for c in tried if not objections[c.name]]
    best = None
    if good:
        fastest = min(latency_ratios[c.name] for c in good)
        fast = [c for c in good if latency_ratios[c.name] <= _EQUALLY_FAST[tower] * fastest]
        best = min(fast, key=lambda c: (round(size_ratios[c.name], 1), -c.agreement.centred_cosine))
    trials = tuple(
        Trial(
            tower=tower,
            name=c.name,
            latency_ratio=latency_ratios[c.name],
            centred_cosine=c.agreement.centred_cosine,
            samples=c.agreement.samples,
            size_ratio=size_ratios[c.name],
            loss_points=c.loss_points,
            verdict="shipped" if c is best else objections[c.name] or "another is better",
        )
        for c in tried
    )
    note = "" if best else _float32_note(trials, left_out)
    return Choice(best.name if best else None, note, (*trials, *left_out))


def _loss_objection(candidate: MeasuredCandidate, max_loss: float) -> str:
    """Return an objection if a candidate loses more than rounding that gains answers as often (a sign test)."""
    lost, points = candidate.lost, candidate.loss_points
    if lost is None or points <= max_loss or sign_test(lost, candidate.gained) >= _CHANCE:
        return ""
    return f"loses {points:.1f} points"


def _float32_note(trials: Sequence[Trial], left_out: Sequence[Trial]) -> str:
    if not trials:
        first = f": {left_out[0].name} {left_out[0].verdict}" if left_out else ""
        return f"float32: the tower could not be converted to INT8{first}."
    best = nearest(trials)
    return (
        f"float32: none of {len(trials)} INT8 candidates is worth shipping; the nearest ({best.name}: {best.verdict}) "
        f"took {best.latency_ratio:.2f} times as long, with a centred cosine of {best.centred_cosine:.4f}."
    )
