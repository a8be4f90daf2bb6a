"""Convert a float32 bundle to INT8: build candidates of each tower, measure them in turn, choose the one to ship."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.formats import FORMATS, Format
from clip_rd_edge.bundle.manifest import Measurement, Tower, read_manifest
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, first_line, in_one_line
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.conversion import ConvertedBundle, start_conversion
from clip_rd_edge.exporting.int8.candidates import OPENVINO, ORT, Backend, Candidate, CandidateRequest
from clip_rd_edge.exporting.int8.saturation import right_session
from clip_rd_edge.exporting.parity import (
    BATCH_SIZE,
    Agreement,
    Inputs,
    Matches,
    Timer,
    agreement,
    embed,
    hard_inputs,
    latencies,
    measurement,
    p10,
    top1_matches,
)
from clip_rd_edge.exporting.plan import Budget, ExportRequest, WeightBits
from clip_rd_edge.runtime.backends.onnxruntime import wrong_sums
from clip_rd_edge.runtime.encoder import warn
from clip_rd_edge.utils.files import disk_full_error, write_bytes
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter
from clip_rd_edge.utils.timing import Milliseconds, sign_test, time_in_turn

_FP32 = "float32"


@dataclass(frozen=True)
class QuantizedTower:
    """The outcome of quantising a tower.

    Attributes:
        model: the file's content, or None if float32 is shipped.
        precision: as in `bundle.manifest.Tower`.
        note: why it is float32, with figures, or empty.
        measured: the measurements of what is shipped.
        trials: all candidates that were tried, for a table.
        one_at_a_time, instruction_sets: as in `bundle.manifest.Tower`.
    """

    model: bytes | None
    precision: str
    note: str
    measured: Measurement
    trials: tuple[Trial, ...]
    one_at_a_time: bool = False
    instruction_sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class TowerSamples:
    """Inputs of one tower.

    Attributes:
        tower: `image` or `text`.
        calibrate: inputs to set ranges by, (N, 3, H, W) float32 or (N, T) int64.
        held_out: other inputs (M, …), which candidates are evaluated on.
        reference: embeddings (M, D) of `held_out` by the float32 file, if they are known already.
        correct: returns which held-out pairs (M,) the tower's embeddings of `held_out` match, given the other tower's;
            None without pairs, where nobody knows what is correct.
        adapt: see `exporting.int8.candidates.CandidateRequest`.
        in_batches: leave out candidates whose embeddings depend on the other inputs of a batch.
    """

    tower: str
    calibrate: Inputs
    held_out: Inputs
    reference: Embeddings | None = None
    correct: Callable[[Embeddings], Matches] | None = None
    adapt: bool = True
    in_batches: bool = False


def quantize_tower(
    model: Path,
    samples: TowerSamples,
    *,
    budget: Budget = Budget(),  # noqa: B008 — frozen
    threads: int = 1,
    weight_bits: WeightBits = 7,
    backend: Backend = ORT,
    reporter: Reporter = SILENT,
    timer: Timer = time_in_turn,
) -> QuantizedTower:
    """Build and measure every INT8 candidate of a tower, and choose by the measurements on this machine.

    Args:
        model: the float32 file.
        samples: calibration and held-out inputs of the tower.
        budget: the accuracy that INT8 may cost.
        threads: number of threads when measuring latency.
        weight_bits: of INT8 weights; see `exporting.int8.saturation`.
        backend: the runtime that the tower is quantised for and measured in.
        reporter: shows progress.
        timer: times calls in turn.
    """
    tower, inputs = samples.tower, samples.held_out
    reporter = PrefixedReporter(reporter, f"{tower} tower: ")
    float32 = backend.open(str(model), threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        request = CandidateRequest(
            model=backend.prepare(model, Path(folder)),
            samples=samples.calibrate,
            adapt=samples.adapt,
            max_error=1 - budget.min_agreement(tower),
            weight_bits=weight_bits,
            threads=threads,
            reporter=reporter,
        )
        opened, left_out = _open_candidates(request, samples, backend)
    reporter.update(f"timing {len(opened)} candidates and float32 in turn")
    sessions = {_FP32: float32, **{name: candidate.session for name, candidate in opened.items()}}
    latencies_ms = latencies(sessions, inputs, timer=timer)
    reporter.update(f"evaluating {len(opened)} candidates")
    embeddings = embed(float32, inputs) if samples.reference is None else samples.reference
    reference = _Reference(embeddings, samples.correct(embeddings) if samples.correct else None)
    fp32 = MeasuredCandidate(_FP32, latencies_ms[_FP32], agreement(embeddings, embeddings), model.stat().st_size)
    measured = {
        name: _measured(name, candidate, latencies_ms[name], samples, reference, backend=backend, threads=threads)
        for name, candidate in opened.items()
    }
    choice = choose(tower, fp32, list(measured.values()), budget=budget, left_out=left_out)
    shipped, file = (measured[choice.name], opened[choice.name]) if choice.name else (fp32, None)
    return QuantizedTower(
        model=file.content if file else None,
        precision=f"int8 {choice.name}" if file else "fp32",
        note=choice.note,
        measured=measurement(shipped.agreement, shipped.latencies_ms, reference_ms=fp32.latencies_ms, threads=threads),
        trials=choice.trials,
        one_at_a_time=file.one_at_a_time if file else False,
        instruction_sets=backend.instruction_sets(file.content) if file else (),
    )


@dataclass(frozen=True)
class _OpenCandidate:
    """A candidate's file, and a session of it; `one_at_a_time` as in `bundle.manifest.Tower`."""

    content: bytes
    session: Any
    one_at_a_time: bool


def _open_candidates(
    request: CandidateRequest, samples: TowerSamples, backend: Backend
) -> tuple[dict[str, _OpenCandidate], list[Trial]]:
    """Return the candidates to measure by name, and the others."""
    opened, left_out = dict[str, _OpenCandidate](), list[Trial]()
    for candidate in backend.candidates(request):
        request.reporter.update(candidate.name)
        result = _open_candidate(candidate, backend, request.threads)
        if isinstance(result, str):
            left_out.append(_trial_left_out(samples.tower, candidate, f"failed: {result}"))
        elif samples.in_batches and result.one_at_a_time:
            left_out.append(_trial_left_out(samples.tower, candidate, "depends on the batch"))
        else:
            opened[candidate.name] = result
    return opened, left_out


def _open_candidate(candidate: Candidate, backend: Backend, threads: int) -> _OpenCandidate | str:
    """Return the candidate's file and a session of it, or the reason why it failed."""
    try:
        content = candidate.make()
        session = backend.open(content, threads=threads)
    except ConfigError as error:
        return first_line(error)
    except Exception as error:  # the quantiser raises many types; the other candidates are still tried
        if full := disk_full_error(error):
            raise full from error
        return f"{type(error).__name__}: {in_one_line(error)}"
    return _OpenCandidate(content, session, backend.one_at_a_time(content))


def _trial_left_out(tower: str, candidate: Candidate, verdict: str) -> Trial:
    return Trial(
        tower=tower,
        name=candidate.name,
        latency_ratio=float("nan"),
        centred_cosine=float("nan"),
        size_ratio=float("nan"),
        loss_points=float("nan"),
        verdict=verdict,
    )


@dataclass(frozen=True)
class _Reference:
    """Float32's embeddings of the held-out inputs (M, D), and the pairs (M,) that they match, None without pairs."""

    embeddings: Embeddings
    correct: Matches | None


def _measured(
    name: str,
    candidate: _OpenCandidate,
    latencies_ms: Milliseconds,
    samples: TowerSamples,
    reference: _Reference,
    *,
    backend: Backend,
    threads: int,
) -> MeasuredCandidate:
    """Return what a candidate costs and how it answers, beside float32."""
    content = candidate.content
    session = right_session(
        candidate.session, content, threads=threads, runtime=backend.name, sets=backend.instruction_sets
    )
    embeddings = embed(session, samples.held_out, batch_size=1 if candidate.one_at_a_time else BATCH_SIZE)
    answers = {}
    if samples.correct and reference.correct is not None:
        correct = samples.correct(embeddings)
        answers["lost"] = int((reference.correct & ~correct).sum())
        answers["gained"] = int((correct & ~reference.correct).sum())
    return MeasuredCandidate(name, latencies_ms, agreement(reference.embeddings, embeddings), len(content), **answers)


# Candidates within this factor of the fastest count as equally fast. Latencies vary by some percent from run to run. A
# text is embedded once per query or label, and an image per frame, so accuracy may cost a text tower more.
_EQUALLY_FAST = {"image": 1.1, "text": 1.25}
# A candidate is worth its loss of accuracy if it takes at most this share of float32's latency, or of its size.
_MAX_LATENCY_RATIO, _MAX_SIZE_RATIO = 0.95, 0.67
# Up to this factor a candidate is not slower: INT8 token embeddings halve a text tower's file and leave its latency
# unchanged, so two runs may disagree on which of the two is faster.
_NOT_SLOWER = 1.03
# A loss of accuracy counts only if its probability by chance is below this.
_CHANCE = 0.1


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One row in the table of candidates that were tried.

    Attributes:
        tower: `image` or `text`.
        name: the candidate's.
        latency_ratio: the candidate's latency (10th percentile) divided by float32's; below 1 is faster.
        centred_cosine: of its embeddings with float32's on the held-out samples.
        size_ratio: its file size divided by float32's.
        loss_points: loss of zero-shot accuracy on the held-out pairs, in points; below 0 is a gain. NaN without
            pairs.
        verdict: `shipped`, or why not.
    """

    tower: str
    name: str
    latency_ratio: float
    centred_cosine: float
    size_ratio: float
    loss_points: float
    verdict: str

    @property
    def measured(self) -> bool:
        """Whether the candidate was measured; the figures of one that failed or was left out are NaN."""
        return not math.isnan(self.latency_ratio)

    @property
    def pays(self) -> bool:
        """Whether the candidate is faster than float32, or much smaller and not slower."""
        return self.measured and not _cost_objection(self.latency_ratio, self.size_ratio)


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


@dataclass(frozen=True)
class Choice:
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
        tower: `image` or `text`.
        fp32: float32, timed in turn with the candidates.
        tried: the candidates.
        budget: the accuracy that INT8 may cost.
        left_out: candidates that could not be measured, for the table, and the note if there is no other.
    """
    min_agreement = budget.min_agreement(tower)
    latency_ratios = {c.name: p10(c.latencies_ms) / p10(fp32.latencies_ms) for c in tried}
    size_ratios = {c.name: c.size_bytes / fp32.size_bytes for c in tried}
    objections = {
        c.name: _objections(c, latency_ratios[c.name], size_ratios[c.name], min_agreement, budget.max_loss)
        for c in tried
    }
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
            size_ratio=size_ratios[c.name],
            loss_points=c.loss_points,
            verdict="shipped" if c is best else objections[c.name] or "another is better",
        )
        for c in tried
    )
    note = "" if best else _float32_note(trials, left_out)
    return Choice(best.name if best else None, note, (*trials, *left_out))


def _objections(
    candidate: MeasuredCandidate, latency_ratio: float, size_ratio: float, min_agreement: float, max_loss: float
) -> str:
    """Return why a candidate cannot be shipped, or an empty string."""
    reasons = [_cost_objection(latency_ratio, size_ratio)]
    if candidate.agreement.centred_cosine < min_agreement:
        reasons.append(f"below {min_agreement}")
    lost, loss_points = candidate.lost, candidate.loss_points
    if lost is not None and loss_points > max_loss and not _explained_by_chance(lost, candidate.gained):
        reasons.append(f"loses {loss_points:.1f} points")
    return " and ".join(filter(None, reasons))


def _cost_objection(latency_ratio: float, size_ratio: float) -> str:
    """Return why a candidate would not pay even if it were exact, or an empty string."""
    if latency_ratio > _NOT_SLOWER:
        return "slower than float32"
    if latency_ratio > _MAX_LATENCY_RATIO and size_ratio > _MAX_SIZE_RATIO:
        return "not significantly faster or smaller than float32"
    return ""


def _explained_by_chance(lost: int, gained: int) -> bool:
    """Return whether rounding that loses and gains answers equally often may lose this many (one-sided sign test)."""
    return sign_test(lost, gained) >= _CHANCE


def _float32_note(trials: Sequence[Trial], left_out: Sequence[Trial]) -> str:
    if not trials:
        first = f": {left_out[0].name} {left_out[0].verdict}" if left_out else ""
        return f"float32: the tower could not be converted to INT8{first}."
    best = nearest(trials)
    return (
        f"float32: none of {len(trials)} INT8 candidates is worth shipping; the nearest ({best.name}: {best.verdict}) "
        f"took {best.latency_ratio:.2f} times as long, with a centred cosine of {best.centred_cosine:.4f}."
    )


def nearest(trials: Sequence[Trial]) -> Trial:
    """Return the trial that came nearest to being shipped: the most accurate of those that pay, else the fastest."""
    paying = [t for t in trials if t.pays]
    return max(paying, key=lambda t: t.centred_cosine) if paying else min(trials, key=lambda t: t.latency_ratio)


_MIN_CORRECT = 0.05  # share of the held-out pairs that float32 has to answer before a loss says anything
_BACKENDS: dict[Format, Backend] = {"openvino": OPENVINO}


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
        name: _write_fp16_fallback(quantized[name], tower, inputs[name], source, folder, backend)
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
    quantized: QuantizedTower, tower: Tower, inputs: Inputs, source: Path, folder: Path, backend: Backend
) -> Tower:
    written = backend.write_fp16(source, folder, tower, inputs, threads=quantized.measured.threads)
    reason = quantized.note.removeprefix("float32: ")
    return msgspec.structs.replace(written, note=f"{written.precision}: {reason} {written.note}".rstrip())
