"""What is found for a tower in INT8: its trials, what is shipped, and what may suit better than that."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.bundle.formats import EXTERNAL_DATA_SUFFIX
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import install_command
from clip_rd_edge.exporting.formats import Job
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.candidates import Backend, Float32Tower
from clip_rd_edge.exporting.parity import agreement, embed, latencies, p10
from clip_rd_edge.utils.files import read_cached, sha256_of, write_cached
from clip_rd_edge.utils.host import FAST_BF16, installed_versions, instruction_sets, machine_name
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
    plan, versions = tower.plan, installed_versions(("clip-rd-edge", "onnxruntime", "onnx", "openvino", "nncf"))
    limits = plan.budget, plan.weight_bits, plan.threads, plan.in_batches, plan.adapts(tower.name), plan.search_minutes
    digest.update(repr((tower.name, backend.name, limits, versions, machine_name(), instruction_sets())).encode())
    return digest.hexdigest()


def kept_outcome(key: str) -> QuantizedTower | None:
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
    return max(trials, key=lambda t: (t.pays, t.centred_cosine if t.pays else -t.latency_ratio))


# An accurate candidate is named if it takes at most this share longer, with at most this share of the error.
_LITTLE_LONGER, _MUCH_NEARER = 1.15, 0.33
# OpenVINO is named below this share of the shipped tower's latency. BF16 takes 0.48 to 0.66 of that of float32 in
# ONNX Runtime (benchmarks/measurements/towers.md).
_FASTER, _USUAL_BF16 = 0.91, 0.6  # what is shipped takes 10 % longer
_SAMPLES = 24
_HERE = ("", "cpu-x86", "cpu-x86-vnni", "cpu-arm", "openvino")  # targets that may be this processor


def remarks(job: Job, found: Mapping[str, QuantizedTower], backend: Backend) -> Iterator[str]:
    """Yield sentences on what may suit the user better than what is shipped."""
    for name, outcome in found.items():
        if nearer := _nearer(outcome):
            yield f"{name} tower: {nearer}"
    plan = job.plan
    if plan.format in ("onnx", "openvino") and plan.layout == "bundle" and plan.target in _HERE:
        yield from _in_openvino(job, found, backend)


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
        f"{trial.name} has a centred cosine of {trial.centred_cosine:.4f} instead of {shipped.centred_cosine:.4f}, at "
        f"{trial.latency_ratio / shipped.latency_ratio:.2f} of the time: --min-agreement {limit:g}, for both towers"
    )


def _in_openvino(job: Job, found: Mapping[str, QuantizedTower], backend: Backend) -> Iterator[str]:
    """Yield a sentence for each tower that OpenVINO runs faster, and as accurately as was asked for."""
    has_bf16, plan = bool(FAST_BF16.intersection(instruction_sets())), job.plan
    bf16 = "--format openvino --precision bf16"
    if not find_spec("openvino"):
        # A text is embedded once; an image tower's time is what a device spends.
        ratio = next((trial.latency_ratio for trial in found["image"].trials if trial.verdict == "shipped"), 1.0)
        if has_bf16 and _FASTER * ratio > _USUAL_BF16:
            yield (
                f"this processor computes BF16, in which OpenVINO takes about half of float32's time: "
                f"{install_command('openvino')}, and export with {bf16}"
            )
        return
    from clip_rd_edge.runtime.backends.openvino import open_openvino

    for name, outcome in found.items():
        tower, open_there = Float32Tower.of(job, name), partial(open_openvino, threads=plan.threads)
        model, inputs = str(tower.model), tower.held_out[:_SAMPLES]
        job.reporter_of(name).update("timing OpenVINO")
        others = {"BF16": open_there(model, bf16=True)} if has_bf16 else {}
        if plan.format != "openvino":
            if outcome.model is not None:
                others["INT8"] = open_there(outcome.model)
            if name == "image" and (content := _symmetric(tower)):
                others["INT8 of its own"] = open_there(content)
        if not others:
            continue
        shipped = backend.open(outcome.model or model, threads=plan.threads)
        times = {way: p10(ms) for way, ms in latencies({"": shipped, **others}, inputs, max_seconds=4.0).items()}
        faster = [way for way in others if times[way] < _FASTER * times[""]]
        if not faster:
            continue
        reference = embed(backend.open(model, threads=plan.threads), inputs)
        for way in sorted(faster, key=times.__getitem__):
            ratio, cosine = times[way] / times[""], agreement(reference, embed(others[way], inputs)).centred_cosine
            if cosine >= plan.budget.min_agreement(name):
                size, command = (" and a file of float32's size", bf16) if way == "BF16" else ("", "--format openvino")
                yield (
                    f"{name} tower: in {way}, OpenVINO takes {ratio:.2f} of the time of what is shipped, with a "
                    f"centred cosine of {cosine:.4f}{size}: {command}"
                )
                break


def _symmetric(tower: Float32Tower) -> bytes | None:
    """Return a tower in the INT8 that OpenVINO mostly runs fastest, by few samples; None if it cannot be made."""
    from clip_rd_edge.exporting.formats.openvino import symmetric_int8  # which imports the search

    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare_for_quantization(tower.model, Path(folder))
            return symmetric_int8(prepared, tower.calibrate[:_SAMPLES], tower.plan.weight_bits)
    except Exception:  # noqa: BLE001 — the quantiser raises many types; an export for OpenVINO has the reason
        return None
