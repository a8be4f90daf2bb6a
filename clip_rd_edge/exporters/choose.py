"""Which candidate is shipped: decided by measurement, and float32 where none deserves it. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from clip_rd_edge.exporters.parity import Agreement
from clip_rd_edge.runtime.timing import Milliseconds

# Candidates that are this close to the fastest count as equally fast: medians wander by some percent from run to run.
_NEARLY = 1.1


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table of what was tried.

    Attributes:
        tower: `image` or `text`.
        latency_ratio: of the candidate's median latency to float32's; below 1 is faster.
        centred_cosine: of its embeddings with float32's on the held-out samples.
        size_ratio: of its file's size to float32's.
        verdict: `shipped`, or why not.
    """

    tower: str
    name: str
    latency_ratio: float
    centred_cosine: float
    size_ratio: float
    verdict: str


@dataclass(frozen=True)
class Measured:
    """What was measured of a candidate (or of float32, whose `of` is with itself)."""

    name: str
    times: Milliseconds
    of: Agreement
    size_bytes: int


@dataclass(frozen=True)
class Choice:
    """The name of the candidate to ship, or None for float32 with the reason in `note`; and the table."""

    name: str | None
    note: str
    trials: tuple[Trial, ...]


def choose(tower: str, fp32: Measured, tried: Sequence[Measured], *, min_agreement: float) -> Choice:
    """The smallest of the nearly fastest candidates that hold an agreement and are faster than float32.

    Among those of about the same size it is the most accurate. A candidate is always less accurate than float32, so
    one that is slower, too, is never shipped.

    Args:
        fp32, tried: timed in turn, in one run.
        min_agreement: least centred cosine with float32.
    """
    ratios = {c.name: float(np.median(c.times) / np.median(fp32.times)) for c in tried}
    good = [c for c in tried if c.of.centred_cosine >= min_agreement and ratios[c.name] < 1]
    best = None
    if good:
        fastest = min(ratios[c.name] for c in good)
        near = [c for c in good if ratios[c.name] <= _NEARLY * fastest]
        best = min(near, key=lambda c: (round(c.size_bytes / fp32.size_bytes, 1), -c.of.centred_cosine))
    trials = tuple(
        Trial(
            tower=tower,
            name=c.name,
            latency_ratio=ratios[c.name],
            centred_cosine=c.of.centred_cosine,
            size_ratio=c.size_bytes / fp32.size_bytes,
            verdict="shipped" if c is best else _verdict(c, ratios[c.name], min_agreement),
        )
        for c in tried
    )
    return Choice(best.name if best else None, "" if best else _why_float(trials, min_agreement), trials)


def _verdict(candidate: Measured, ratio: float, min_agreement: float) -> str:
    reasons = []
    if ratio >= 1:
        reasons.append("not faster than float32")
    if candidate.of.centred_cosine < min_agreement:
        reasons.append(f"below {min_agreement}")
    return " and ".join(reasons) or "another is better"


def _why_float(trials: Sequence[Trial], min_agreement: float) -> str:
    if not trials:
        return "float32: no INT8 version could be made of it."
    # The one that came nearest: the most accurate of the faster ones, else the fastest.
    faster = [t for t in trials if t.latency_ratio < 1]
    nearest = max(faster, key=lambda t: t.centred_cosine) if faster else min(trials, key=lambda t: t.latency_ratio)
    return (
        f"float32: none of {len(trials)} INT8 versions was faster with a centred cosine of {min_agreement} or more; "
        f"the nearest ({nearest.name}) took {nearest.latency_ratio:.2f} times as long "
        f"at {nearest.centred_cosine:.4f}."
    )
