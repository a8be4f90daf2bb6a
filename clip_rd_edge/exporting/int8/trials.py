"""What is found for a tower in INT8: its trials, and what is shipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from clip_rd_edge.bundle.manifest import Tower

# A candidate is worth its loss of accuracy if it takes at most this share of float32's latency, or of its size.
_MAX_LATENCY_RATIO, _MAX_SIZE_RATIO = 0.95, 0.67
# Up to this factor a candidate is not slower: INT8 token embeddings halve a text tower's file and leave its latency
# unchanged, so two runs may disagree on which of the two is faster.
_NOT_SLOWER = 1.03


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One row in the table of candidates that were tried.

    Attributes:
        tower: `image` or `text`.
        name: the candidate's.
        latency_ratio: the candidate's latency (10th percentile) divided by float32's; below 1 is faster.
        centred_cosine: of its embeddings with float32's on held-out samples.
        samples: number of these; all if the candidate was the best so far.
        size_ratio: its file size divided by float32's.
        loss_points: loss of zero-shot accuracy on the held-out pairs, in points; below 0 is a gain. NaN without
            pairs, and if `samples` are few.
        verdict: `shipped`, or why not.
    """

    tower: str
    name: str
    latency_ratio: float = math.nan
    centred_cosine: float = math.nan
    samples: int = 0
    size_ratio: float = math.nan
    loss_points: float = math.nan
    verdict: str

    @property
    def measured(self) -> bool:
        """Whether the candidate was measured; the figures of one that failed or was left out are NaN."""
        return not math.isnan(self.latency_ratio)

    @property
    def pays(self) -> bool:
        """Whether the candidate is faster than float32, or much smaller and not slower."""
        return self.measured and not cost_objection(self.latency_ratio, self.size_ratio)


@dataclass(frozen=True)
class QuantizedTower:
    """The outcome of quantising a tower.

    Attributes:
        model: the file's content, or None if float32 is shipped.
        tower: its entry in the manifest; if float32 is shipped, its note says why, with figures.
        trials: all candidates that were tried, for a table.
    """

    model: bytes | None
    tower: Tower
    trials: tuple[Trial, ...]

    @property
    def reason(self) -> str:
        """Why it is float32."""
        return self.tower.note.removeprefix("float32: ")


def cost_objection(latency_ratio: float, size_ratio: float) -> str:
    """Return why a candidate would not pay even if it were exact, or an empty string."""
    if latency_ratio > _NOT_SLOWER:
        return "slower than float32"
    if latency_ratio > _MAX_LATENCY_RATIO and size_ratio > _MAX_SIZE_RATIO:
        return "not significantly faster or smaller than float32"
    return ""


def nearest(trials: Sequence[Trial]) -> Trial:
    """Return the trial that came nearest to being shipped: the most accurate of those that pay, else the fastest."""
    paying = [t for t in trials if t.pays]
    return max(paying, key=lambda t: t.centred_cosine) if paying else min(trials, key=lambda t: t.latency_ratio)
