"""Which candidate is shipped: decided by measurement, and float32 where none deserves it. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from clip_rd_edge.convert.options import Budget
from clip_rd_edge.convert.parity import Agreement, lowest_tenth
from clip_rd_edge.utils.timing import Milliseconds

# Candidates that are this close to the fastest count as equally fast: latencies wander by some percent from run to run.
_NEARLY = 1.1
# A candidate is worth its loss of accuracy if it takes this share of float32's latency, or of its size, or less.
_WORTH_LATENCY, _WORTH_SIZE = 0.95, 0.67
# What takes no longer than this is not slower: a token table in INT8 halves a text tower's file and changes nothing in
# its time, so that two runs disagree on which of the two was faster.
_NOT_SLOWER = 1.03
# A loss of accuracy counts that chance brings about in fewer cases than this.
_CHANCE = 0.1


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table of what was tried.

    Attributes:
        tower: `image` or `text`.
        latency_ratio: of the candidate's latency (10th percentile) to float32's; below 1 is faster.
        centred_cosine: of its embeddings with float32's on the held-out samples.
        size_ratio: of its file's size to float32's.
        loss_points: of zero-shot accuracy on the held-out pairs; below 0 is a gain.
        verdict: `shipped`, or why not.
    """

    tower: str
    name: str
    latency_ratio: float
    centred_cosine: float
    size_ratio: float
    loss_points: float
    verdict: str


@dataclass(frozen=True)
class Measured:
    """What was measured of a candidate (or of float32, whose `of` is with itself).

    Attributes:
        lost, gained: answers on the held-out pairs that were right in float32 alone, and in the candidate alone.
    """

    name: str
    times: Milliseconds
    of: Agreement
    size_bytes: int
    lost: int = 0
    gained: int = 0

    @property
    def loss_points(self) -> float:
        """As in Trial."""
        return 100 * (self.lost - self.gained) / self.of.samples


@dataclass(frozen=True)
class Choice:
    """The name of the candidate to ship, or None for float32 with the reason in `note`; and the table."""

    name: str | None
    note: str
    trials: tuple[Trial, ...]


def choose(tower: str, fp32: Measured, tried: Sequence[Measured], *, budget: Budget) -> Choice:
    """The smallest of the nearly fastest candidates that hold the budget and are worth it.

    Worth it is what is faster than float32, or much smaller and not slower. Among those of about the same size it is
    the most accurate. A candidate is always less accurate than float32, so one that is slower, too, is never shipped.

    Args:
        fp32, tried: timed in turn, in one run.
        budget: what INT8 may cost.
    """
    min_agreement = budget.min_agreement(tower)
    ratios = {c.name: lowest_tenth(c.times) / lowest_tenth(fp32.times) for c in tried}
    sizes = {c.name: c.size_bytes / fp32.size_bytes for c in tried}
    verdicts = {c.name: _objections(c, ratios[c.name], sizes[c.name], min_agreement, budget.max_loss) for c in tried}
    good = [c for c in tried if not verdicts[c.name]]
    best = None
    if good:
        fastest = min(ratios[c.name] for c in good)
        near = [c for c in good if ratios[c.name] <= _NEARLY * fastest]
        best = min(near, key=lambda c: (round(sizes[c.name], 1), -c.of.centred_cosine))
    trials = tuple(
        Trial(
            tower=tower,
            name=c.name,
            latency_ratio=ratios[c.name],
            centred_cosine=c.of.centred_cosine,
            size_ratio=sizes[c.name],
            loss_points=c.loss_points,
            verdict="shipped" if c is best else verdicts[c.name] or "another is better",
        )
        for c in tried
    )
    return Choice(best.name if best else None, "" if best else _why_float(trials, min_agreement), trials)


def _objections(
    candidate: Measured, latency_ratio: float, size_ratio: float, min_agreement: float, max_loss: float
) -> str:
    """Why a candidate is not to be shipped, or an empty string."""
    reasons = []
    if latency_ratio > _NOT_SLOWER:
        reasons.append("slower than float32")
    elif latency_ratio > _WORTH_LATENCY and size_ratio > _WORTH_SIZE:
        reasons.append("hardly faster or smaller than float32")
    if candidate.of.centred_cosine < min_agreement:
        reasons.append(f"below {min_agreement}")
    if candidate.loss_points > max_loss and not _by_chance(candidate.lost, candidate.gained):
        reasons.append(f"loses {candidate.loss_points:.1f} points")
    return " and ".join(reasons)


def _by_chance(lost: int, gained: int) -> bool:
    """Whether rounding that spoils no more answers than it mends would lose as many of them (one-sided sign test)."""
    changed = lost + gained
    as_many = sum(math.comb(changed, count) for count in range(lost, changed + 1))
    chance: float = as_many / 2**changed
    return chance >= _CHANCE


def _why_float(trials: Sequence[Trial], min_agreement: float) -> str:
    if not trials:
        return "float32: no INT8 version could be made of it."
    best = nearest(trials)
    return (
        f"float32: none of {len(trials)} INT8 versions was faster, or smaller and not slower, by enough to be worth it "
        f"with a centred cosine of {min_agreement} or more; the nearest ({best.name}) took "
        f"{best.latency_ratio:.2f} times as long at {best.centred_cosine:.4f}."
    )


def nearest(trials: Sequence[Trial]) -> Trial:
    """The one that came nearest to being shipped: the most accurate of the faster ones, else the fastest."""
    faster = [t for t in trials if t.latency_ratio < 1]
    return max(faster, key=lambda t: t.centred_cosine) if faster else min(trials, key=lambda t: t.latency_ratio)
