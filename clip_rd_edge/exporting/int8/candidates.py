"""INT8 candidates: the ways of quantising a tower that are worth trying, and the layers that lose most.

To find those, each layer, or group of neighbours, is quantised alone; its error is 1 − the centred cosine of the
embeddings with float32's. That ranks the layers. Their errors need not add up: two layers may disturb each other, or
make up for each other. So the worst are left in float one after the other, until the error of all others together is
small enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.methods import (
    RANGE_METHODS,
    StaticQuantizer,
    quantize_dynamically,
    scales_per_batch,
    with_token_embeddings,
)
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT, instruction_sets, right_session
from clip_rd_edge.exporting.parity import Inputs, Matches, agreement, embed, latencies, p10
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.text import SILENT, Reporter
from clip_rd_edge.utils.timing import Clock

if TYPE_CHECKING:
    from clip_rd_edge.exporting.formats import Job

SENSITIVITY_SAMPLES = 16  # calibration samples that the errors are measured on
_MAX_SECONDS, _SHARE = 10.0, 0.15  # and of what is left of a limited time
# Shares of the max error that the INT8 layers may have on the calibration samples; a smaller share may be as fast.
_ERROR_SHARES = (0.9, 0.4, 0.1)
# If all layers together have at most this share of the max error, none is worth leaving in float, which takes space
# and time.
_SMALL_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Float32Tower:
    """A float32 tower to quantise.

    Attributes:
        calibrate: inputs to set ranges by, (N, 3, H, W) float32 or (N, T) int64.
        held_out: other inputs (M, …), which candidates are evaluated on.
        reference: embeddings (M, D) of `held_out` by the float32 file, if they are known already.
        correct: returns which held-out pairs (M,) the tower's embeddings of `held_out` match, given the other tower's;
            None without pairs, where nobody knows what is correct.
    """

    name: str
    model: Path
    calibrate: Inputs
    held_out: Inputs
    plan: Plan = field(default_factory=Plan)
    reference: Embeddings | None = None
    correct: Callable[[Embeddings], Matches] | None = None
    clock: Clock = field(default_factory=Clock)
    reporter: Reporter = SILENT

    @classmethod
    def of(cls, job: Job, name: str) -> Float32Tower:
        assert job.samples is not None
        calibrate, held_out = (
            samples.pixels if name == "image" else samples.ids
            for samples in (job.samples.calibrate, job.samples.held_out)
        )
        model, reporter = job.source / job.fp32.towers[name].file, job.reporter_of(name)
        return cls(name=name, model=model, calibrate=calibrate, held_out=held_out, plan=job.plan, reporter=reporter)

    @property
    def takes_ids(self) -> bool:
        return self.name == "text"

    @property
    def max_error(self) -> float:
        return 1 - self.plan.budget.min_agreement(self.name)

    def rounded(self) -> RoundedLayers | None:
        """Return the layers rounded by what each sees, or None if each weight is rounded to the nearest level."""
        if not self.plan.adapts(self.name):
            return None
        max_level = MAX_WEIGHT[self.plan.weight_bits]
        return RoundedLayers(onnx.load(self.model), self.calibrate, max_level=max_level)


@dataclass(frozen=True)
class Candidate:
    """One way of quantising a tower; `make` returns the content of the model file."""

    name: str
    make: Callable[[], bytes]


class Opener(Protocol):
    """Opens a model in a runtime, as an object with ONNX Runtime's `get_inputs()` and `run(names, feed)`."""

    def __call__(self, model: str | bytes, *, threads: int | None = None) -> Any: ...


@dataclass(frozen=True)
class Backend:
    """A runtime that towers are quantised for and measured in.

    Attributes:
        name: the target in the manifest.
        open, candidates: open a tower's file, and yield its INT8 candidates.
        prepare: writes a copy of a tower's file that candidates are made from into a folder; returns its path.
        one_at_a_time, instruction_sets: of the content of a candidate's file, as in `bundle.manifest.Tower`.
        write_fp16: writes a tower in float16, where that is what it falls back to.
    """

    name: str
    open: Opener
    candidates: Callable[[Float32Tower], Iterator[Candidate]]
    prepare: Callable[[Path, Path], Path] = prepare_for_quantization
    one_at_a_time: Callable[[bytes], bool] = scales_per_batch
    instruction_sets: Callable[[bytes], tuple[str, ...]] = instruction_sets
    write_fp16: Callable[[Job, str, Tower], Tower] | None = None


# Of the backends of LiteRT and ExecuTorch, whose files take one input at a time. Both multiply S8 by S8 and add in 32
# bits everywhere, so weights of 8 bits do not saturate on any processor.
ONE_INPUT: Mapping[str, Any] = {
    "prepare": lambda model, folder: model,
    "one_at_a_time": lambda content: True,
    "instruction_sets": lambda content: ("x86-64", "x86-64-vnni", "aarch64"),
}


def onnx_candidates(tower: Float32Tower) -> Iterator[Candidate]:
    """Yield candidates for ONNX Runtime that suit the layers of a tower, the most promising first.

    Convolutions are quantised statically: all of them, the robust ones, and those that INT8 makes no slower. If a tower
    has several layers that are matrix products, these are quantised dynamically. A tower with both combines the two.
    """
    graph, weight_bits = onnx.load(tower.model), tower.plan.weight_bits
    convolutions = [node.name for node in weighted_layers(graph, ("Conv",))]
    # A single convolution is the patch embedding of a ViT; a single matrix product is the projection of a CNN.
    has_products = len(weighted_layers(graph, ("MatMul", "Gemm"))) > 1
    if len(convolutions) > 1:
        quantizer = StaticQuantizer(tower.model, tower.calibrate, weight_bits=weight_bits, rounded=tower.rounded())
        layers = yield from static_candidates(quantizer, tower)
        robust = [layer for layer in layers if layer in convolutions]
        if robust:
            yield from _in_convolutions(quantizer, robust, tower, has_products=has_products)
    if not has_products:
        return
    make = partial(quantize_dynamically, tower.model, weight_bits=weight_bits, matrix_products=True)
    name = "dynamic with token embeddings" if tower.takes_ids else "dynamic"
    for suffix, per_token in ((", per-token", True), (", per-tensor", False)):
        yield Candidate(f"{name}{suffix}", partial(make, token_embeddings=tower.takes_ids, per_token=per_token))
    if tower.takes_ids:
        in_float = partial(make, token_embeddings=False, per_token=True)
        yield Candidate("dynamic, per-token, token embeddings in float", in_float)
        yield Candidate("token embeddings only", partial(with_token_embeddings, lambda: tower.model))


def static_candidates(quantizer: StaticQuantizer, tower: Float32Tower) -> Generator[Candidate, None, Sequence[str]]:
    """Yield static INT8 of all layers and of the robust ones; return the most that are robust."""
    first, *others = (
        Candidate(f"static, {method}", partial(quantizer.quantize, method, quantizer.layers))
        for method in RANGE_METHODS
    )
    yield first
    count = len(quantizer.layers)
    tower.reporter.update(f"measuring the INT8 error of {count} layers")
    samples, threads = tower.calibrate[:SENSITIVITY_SAMPLES], tower.plan.threads
    reference = embed(open_session(str(tower.model), threads=threads), samples)

    def error_of(layers: Sequence[str]) -> float:
        try:
            content = quantizer.quantize("percentile", layers)
            session = right_session(open_session(content, threads=threads), content, threads=threads)
            return int8_error(reference, embed(session, samples))
        except Exception:  # noqa: BLE001 — the library raises many types; layers that it cannot handle stay in float
            return math.inf

    robust = [quantizer.layers]
    if error_of(quantizer.layers) > _SMALL_SHARE * tower.max_error:
        max_seconds = tower.clock.share(_SHARE, most=_MAX_SECONDS)
        robust = robust_layers(quantizer.layers, error_of, max_error=tower.max_error, max_seconds=max_seconds)
    for layers in robust:
        if layers and len(layers) < count:
            name = f"static, percentile, {count - len(layers)} of {count} layers in float"
            yield Candidate(name, partial(quantizer.quantize, "percentile", layers))
    yield from others
    return robust[0]


def _in_convolutions(
    quantizer: StaticQuantizer, robust: Sequence[str], tower: Float32Tower, *, has_products: bool
) -> Iterator[Candidate]:
    """Yield static INT8 of all robust convolutions, and of those that it makes no slower.

    Matrix products are quantised dynamically; for a tower without any, the first has been tried already.
    """

    def make(convolutions: Sequence[str]) -> bytes:
        static = quantizer.quantize("percentile", convolutions)
        if not has_products:
            return static
        return quantize_dynamically(
            static, matrix_products=True, token_embeddings=False, per_token=False, weight_bits=tower.plan.weight_bits
        )

    suffix = ", dynamic in matrix products" if has_products else ""
    tower.reporter.update(f"timing {len(robust)} convolutions in INT8, group by group")
    if has_products:
        yield Candidate(f"static in {len(robust)} convolutions{suffix}", partial(make, robust))
    threads = tower.plan.threads
    no_slower = layers_no_slower(
        robust,
        lambda layers: open_session(quantizer.quantize("percentile", layers), threads=threads),
        tower.calibrate,
        max_seconds=tower.clock.share(_SHARE, most=_MAX_SECONDS),
    )
    if no_slower and len(no_slower) < len(robust):
        name = f"static in {len(no_slower)} convolutions that get no slower{suffix}"
        yield Candidate(name, partial(make, no_slower))


# Returns the error of a tower with only the given layers in INT8; infinite if they cannot be quantised.
ErrorOf = Callable[[Sequence[str]], float]
# Neighbouring layers, in the order of computation, and the error when they alone are quantised.
GroupError = tuple[tuple[str, ...], float]


def int8_error(reference: Embeddings, embeddings: Embeddings) -> float:
    """Return 1 − the centred cosine of embeddings in INT8 with those in float32, both (N, D)."""
    return 1 - agreement(reference, embeddings).centred_cosine


def robust_layers(
    layers: Sequence[str], error_of: ErrorOf, *, max_error: float, max_seconds: float = _MAX_SECONDS
) -> list[tuple[str, ...]]:
    """Return the layers to quantise for shares of the max error, in their order; the first entry has the most layers.

    Shares with the same layers, or with none, have one entry.

    Args:
        max_seconds: approximate limit of the processor time, once for the errors and once for the layers.
    """
    errors = group_errors(layers, error_of, max_seconds=max_seconds)
    return with_fewest_in_float(errors, error_of, [s * max_error for s in _ERROR_SHARES], max_seconds=max_seconds)


def group_errors(layers: Sequence[str], error_of: ErrorOf, *, max_seconds: float) -> list[GroupError]:
    """Measure the error of each layer, or of groups of neighbours if single layers would exceed `max_seconds`."""
    started = time.process_time()  # so that a busy machine does not make larger groups, and a larger file
    first = error_of(layers[:1])
    seconds = len(layers) * (time.process_time() - started)
    size = max(1, math.ceil(seconds / max_seconds)) if max_seconds else len(layers)
    groups = [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]
    return [(group, first if group == tuple(layers[:1]) else error_of(group)) for group in groups]


def layers_within(errors: Sequence[GroupError], max_error: float) -> tuple[str, ...]:
    """Return the layers to quantise, in their order: the best groups whose errors sum to at most `max_error`."""
    kept = sorted(range(len(errors)), key=lambda i: errors[i][1])
    while kept and sum(errors[i][1] for i in kept) > max_error:
        kept.pop()
    return tuple(layer for i in sorted(kept) for layer in errors[i][0])


def with_fewest_in_float(
    errors: Sequence[GroupError], error_of: ErrorOf, limits: Sequence[float], *, max_seconds: float
) -> list[tuple[str, ...]]:
    """Return the layers to quantise for the limits of their common error, in their order: all but the fewest worst.

    What is not found within `max_seconds` is decided by `layers_within`.
    """
    ranked = sorted(range(len(errors)), key=lambda i: errors[i][1])
    found: dict[float, tuple[str, ...]] = {}
    started = time.process_time()
    for count in range(len(ranked), 0, -1):
        layers = tuple(layer for i in sorted(ranked[:count]) for layer in errors[i][0])
        error = error_of(layers)
        found = {limit: layers for limit in limits if error <= limit} | found
        if len(found) == len(set(limits)) or time.process_time() - started > max_seconds:
            break
    return list(dict.fromkeys(found.get(limit) or layers_within(errors, limit) for limit in limits))


_GROUPS = 8
_NO_SLOWER = 1.01  # relative to float32: equal speed is enough, because INT8 weights take a quarter of the space
_NONE = "none"


def layers_no_slower(
    layers: Sequence[str], open_with: Callable[[Sequence[str]], Any], inputs: Inputs, *, max_seconds: float = 8.0
) -> tuple[str, ...]:
    """Return the layers of the groups that INT8 makes no slower, in their order.

    Args:
        inputs: model inputs; the first is timed.
        max_seconds: approximate limit of the time of running them.
    """
    size = math.ceil(len(layers) / _GROUPS)
    groups = {str(start): tuple(layers[start : start + size]) for start in range(0, len(layers), size)}
    sessions = {_NONE: open_with(())} | {name: open_with(group) for name, group in groups.items()}
    timed = latencies(sessions, inputs, rounds=30, max_seconds=max_seconds)
    latency_ms = {name: p10(times) for name, times in timed.items()}
    return tuple(
        layer for name, group in groups.items() if latency_ms[name] <= _NO_SLOWER * latency_ms[_NONE] for layer in group
    )
