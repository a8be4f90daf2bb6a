"""Select the candidate to ship by what was measured, or float32 if none is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from clip_rd_edge.exporting.options import Budget
from clip_rd_edge.exporting.parity import Agreement, p10
from clip_rd_edge.utils.timing import Milliseconds, sign_test

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
