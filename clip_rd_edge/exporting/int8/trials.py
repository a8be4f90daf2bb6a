"""What is found for a tower in INT8: its trials, and what is shipped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.bundle.formats import EXTERNAL_DATA_SUFFIX, format_named
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.exporting.int8.candidates import Backend, Float32Tower
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.utils.files import read_cached, sha256_of, write_cached
from clip_rd_edge.utils.host import installed_versions, instruction_sets, machine_name
from clip_rd_edge.utils.paths import cache_home

# A candidate is worth its loss of accuracy if it takes at most this share of float32's latency, or of its size.
_MAX_LATENCY_RATIO, _MAX_SIZE_RATIO = 0.95, 0.67
# Up to this factor a candidate is not slower: INT8 token embeddings halve a text tower's file and leave its latency
# unchanged, so two runs may disagree on which of the two is faster.
_NOT_SLOWER = 1.03
_MAX_KEPT_BYTES = 1 << 30  # of the outcomes of searches


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
        tower: its entry in the manifest; if float32 is shipped, its note has the reason, with figures.
        trials: all candidates that were tried, for a table.
    """

    model: bytes | None
    tower: Tower
    trials: tuple[Trial, ...]

    @property
    def reason(self) -> str:
        """Why it is float32."""
        return self.tower.note.removeprefix("float32: ")


def outcome_folder() -> Path:
    """Return where outcomes are kept, which may not exist yet."""
    return cache_home() / "int8"


def outcome_key(tower: Float32Tower, backend: Backend) -> str:
    """Return a digest of all that an outcome follows from: file, samples, right answers, limits, packages, machine."""
    digest = hashlib.sha256()
    for path in (tower.model, tower.model.with_name(f"{tower.model.name}{EXTERNAL_DATA_SUFFIX}")):
        digest.update(sha256_of(path).encode() if path.is_file() else b"")
    right = tower.correct(tower.reference) if tower.correct and tower.reference is not None else np.zeros(0)
    for array in (tower.calibrate, tower.held_out, right):
        digest.update(np.ascontiguousarray(array).tobytes())
    plan, versions = tower.plan, installed_versions(("clip-rd-edge", "onnxruntime", "onnx", "openvino"))
    limits = (
        plan.budget,
        plan.weight_bits,
        plan.threads,
        plan.in_batches,
        plan.adapts(tower.name),
        plan.search_minutes,
    )
    digest.update(repr((tower.name, backend.name, limits, versions, machine_name(), instruction_sets())).encode())
    return digest.hexdigest()


def kept_outcome(key: str) -> QuantizedTower | None:
    """Return the outcome of an earlier search, or None."""
    content = read_cached(outcome_folder() / key)
    if content is None:
        return None
    try:
        return msgspec.msgpack.decode(content, type=QuantizedTower)
    except msgspec.DecodeError:  # of another version
        return None


def keep_outcome(key: str, outcome: QuantizedTower) -> None:
    """Keep the outcome of a search that took minutes."""
    write_cached(outcome_folder() / key, msgspec.msgpack.encode(outcome), max_bytes=_MAX_KEPT_BYTES)


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
