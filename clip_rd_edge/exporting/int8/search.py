"""Quantise a float32 tower by search: build candidates, measure them all in turn, choose."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import Measurement
from clip_rd_edge.errors import ConfigError, first_line, in_one_line
from clip_rd_edge.exporting.int8.candidates import ORT, Backend, Candidate, CandidateRequest
from clip_rd_edge.exporting.int8.saturation import right_session
from clip_rd_edge.exporting.int8.select import MeasuredCandidate, Trial, choose
from clip_rd_edge.exporting.options import Budget, WeightBits
from clip_rd_edge.exporting.parity import BATCH_SIZE, Inputs, Matches, Timer, agreement, embed, latencies, measurement
from clip_rd_edge.utils.files import disk_full_error
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

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
