"""INT8 candidates: the ways of quantising a tower that are worth trying, and the layers that lose most.

To find those, each layer, or group of neighbours, is quantised alone; its error is 1 − the centred cosine of the
embeddings with float32's. That ranks the layers. Their errors need not add up: two layers may disturb each other, or
make up for each other. So the worst are left in float one after the other, until the error of all others together is
small enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import onnx

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.exporting.formats.onnx import write_fp16_tower
from clip_rd_edge.exporting.graph import file_content, norm_nodes, prepare_for_quantization, silently, weighted_layers
from clip_rd_edge.exporting.int8.methods import (
    RANGE_METHODS,
    StaticQuantizer,
    measure_ranges,
    quantize_dynamically,
    quantize_symmetrically,
    quantized_inputs,
    scales_per_batch,
)
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT, instruction_sets, right_session
from clip_rd_edge.exporting.parity import Inputs, Timer, agreement, embed, latencies, p10
from clip_rd_edge.exporting.plan import WeightBits
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.reporting import Reporter
from clip_rd_edge.utils.timing import time_in_turn

# If all layers together have at most this share of the max error, none is worth leaving in float, which takes space
# and time.
_SMALL_SHARE = 0.4


@dataclass(frozen=True)
class Candidate:
    """One way of quantising a tower; `make` returns the content of the model file."""

    name: str
    make: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class CandidateRequest:
    """A float32 tower to make INT8 candidates of.

    Attributes:
        model: its file, as `Backend.prepare` has written it.
        samples: inputs to calibrate on, (N, 3, H, W) float32 or (N, T) int64.
        adapt: round weights and correct biases by what each layer sees; see `exporting.int8.rounding`.
        max_error: 1 − the min centred cosine.
        weight_bits: of the weights that a layer multiplies; see `exporting.int8.saturation`.
        threads: number of threads when running the tower.
        reporter: shows progress.
    """

    model: Path
    samples: Inputs
    max_error: float
    weight_bits: WeightBits
    threads: int
    reporter: Reporter
    adapt: bool = True

    @property
    def takes_ids(self) -> bool:
        """Whether this is a text tower."""
        return self.samples.ndim == 2

    def rounded(self) -> RoundedLayers | None:
        """Return the layers with rounded weights, or None if each weight is rounded to the nearest level."""
        if not self.adapt:
            return None
        return RoundedLayers(onnx.load(self.model), self.samples, max_level=MAX_WEIGHT[self.weight_bits])


def candidates(request: CandidateRequest) -> Iterator[Candidate]:
    """Yield candidates that suit the layers of a tower.

    Convolutions are quantised statically: all of them, the robust ones, and those that INT8 makes no slower. If a tower
    has several layers that are matrix products, these are quantised dynamically. A tower with both combines the two.
    """
    model, samples, weight_bits = request.model, request.samples, request.weight_bits
    graph = onnx.load(model)
    convolutions = [node.name for node in weighted_layers(graph, ("Conv",))]
    products = weighted_layers(graph, ("MatMul", "Gemm"))
    # A single convolution is the patch embedding of a ViT; a single matrix product is the projection of a CNN.
    if len(convolutions) > 1:
        quantizer = StaticQuantizer(model, samples, weight_bits=weight_bits, rounded=request.rounded())
        layers = yield from _static(quantizer, request)
        robust = [layer for layer in layers if layer in convolutions]
        if robust:
            request.reporter.update(f"timing {len(robust)} convolutions in INT8, group by group")
            dynamic = partial(quantize_dynamically, weight_bits=weight_bits) if len(products) > 1 else None
            yield from _mixed(quantizer, robust, samples, dynamic=dynamic, threads=request.threads)
    if len(products) > 1:
        yield from _dynamic(model, takes_ids=request.takes_ids, weight_bits=weight_bits)


def _static(quantizer: StaticQuantizer, request: CandidateRequest) -> Generator[Candidate, None, Sequence[str]]:
    """Yield static INT8 of all layers and of the robust ones; return the most that are robust."""
    for method in RANGE_METHODS:
        yield Candidate(f"static, {method}", partial(quantizer.quantize, method, quantizer.layers))
    count = len(quantizer.layers)
    request.reporter.update(f"measuring the INT8 error of {count} layers")
    robust = _robust_layers(quantizer, request)
    for layers in robust:
        if layers and len(layers) < count:
            name = f"static, percentile, {count - len(layers)} of {count} layers in float"
            yield Candidate(name, partial(quantizer.quantize, "percentile", layers))
    return robust[0]


def _robust_layers(quantizer: StaticQuantizer, request: CandidateRequest) -> list[tuple[str, ...]]:
    """Return the layers whose common error is within each share of the max error: all of them if it is small anyway."""
    samples, threads = request.samples[:SENSITIVITY_SAMPLES], request.threads

    def embed_with(layers: Sequence[str]) -> Embeddings | None:
        try:
            content = quantizer.quantize("percentile", layers)
            return embed(right_session(open_session(content, threads=threads), content, threads=threads), samples)
        except Exception:  # noqa: BLE001 — the library raises many types; layers that it cannot handle stay in float
            return None

    reference = embed(open_session(str(request.model), threads=threads), samples)
    if group_error(quantizer.layers, embed_with, reference).error <= _SMALL_SHARE * request.max_error:
        return [quantizer.layers]
    return robust_layers(quantizer.layers, embed_with, reference, max_error=request.max_error)


def _mix(quantizer: StaticQuantizer, convolutions: Sequence[str], *, dynamic: Callable[..., bytes] | None) -> bytes:
    """Return static INT8 of these convolutions, with INT8 of the matrix products by `dynamic` if there is one."""
    static = quantizer.quantize("percentile", convolutions)
    if dynamic is None:
        return static
    return dynamic(static, matrix_products=True, token_embeddings=False, per_token=False)


def _mixed(
    quantizer: StaticQuantizer,
    robust: Sequence[str],
    samples: Inputs,
    *,
    dynamic: Callable[..., bytes] | None,
    threads: int,
) -> Iterator[Candidate]:
    """Yield static INT8 of all robust convolutions, and of those that it makes no slower.

    For a tower without matrix products, `_static` has already tried the first.
    """
    mix = partial(_mix, quantizer, dynamic=dynamic)
    suffix = ", dynamic in matrix products" if dynamic else ""
    if dynamic:
        yield Candidate(f"static in {len(robust)} convolutions{suffix}", partial(mix, robust))
    no_slower = layers_no_slower(robust, lambda layers: open_session(mix(layers), threads=threads), samples)
    if no_slower and len(no_slower) < len(robust):
        name = f"static in {len(no_slower)} convolutions that get no slower{suffix}"
        yield Candidate(name, partial(mix, no_slower))


def _dynamic(model: Path, *, takes_ids: bool, weight_bits: WeightBits) -> Iterator[Candidate]:
    make = partial(quantize_dynamically, model, weight_bits=weight_bits)
    name = "dynamic with token embeddings" if takes_ids else "dynamic"
    for suffix, per_token in ((", per-token", True), (", per-tensor", False)):
        yield Candidate(
            f"{name}{suffix}",
            partial(make, matrix_products=True, token_embeddings=takes_ids, per_token=per_token),
        )
    if takes_ids:
        yield Candidate(
            "dynamic, per-token, token embeddings in float",
            partial(make, matrix_products=True, token_embeddings=False, per_token=True),
        )
        yield Candidate("token embeddings only", partial(_with_token_embeddings, lambda: model))


def _with_token_embeddings(make: Callable[[], Path | bytes]) -> bytes:
    return quantize_dynamically(make(), matrix_products=False, token_embeddings=True, per_token=False)


def nncf_is_installed() -> bool:
    """Return whether NNCF is installed (`pip install nncf`)."""
    return find_spec("nncf") is not None


def quantize_by_nncf(model: Path, samples: Inputs, weight_bits: WeightBits) -> bytes:
    """Return a float32 model with the Q/DQ that NNCF inserts for OpenVINO, as file content.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        samples: inputs (N, …) that the ranges are measured on.
        weight_bits: 7 is NNCF's overflow fix, in all layers.
    """
    import nncf

    graph = onnx.load(model)
    name = graph.graph.input[0].name
    # A tower with at most one convolution, the patch embedding, is a transformer. MobileViT loses more with those
    # settings.
    kind = None if len(weighted_layers(graph, ("Conv",))) > 1 else nncf.ModelType.TRANSFORMER
    with silently():
        data = nncf.Dataset([{name: sample[None]} for sample in samples])
        fix = nncf.OverflowFix.ENABLE if weight_bits == 7 else nncf.OverflowFix.DISABLE
        settings = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
        in_float = nncf.IgnoredScope(names=sorted(norm_nodes(graph.graph)))  # it would round the final norm, too
        quantized = nncf.quantize(
            graph,
            data,
            model_type=kind,
            subset_size=len(samples),
            ignored_scope=in_float,
            advanced_parameters=settings,
        )
    return file_content(quantized)


class Opener(Protocol):
    """Opens a model in a runtime, as an object with ONNX Runtime's `get_inputs()` and `run(names, feed)`."""

    def __call__(self, model: str | bytes, *, threads: int | None = None) -> Any:
        """Open the model with this path or content."""
        ...


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
    candidates: Callable[[CandidateRequest], Iterator[Candidate]]
    prepare: Callable[[Path, Path], Path] = prepare_for_quantization
    one_at_a_time: Callable[[bytes], bool] = scales_per_batch
    instruction_sets: Callable[[bytes], tuple[str, ...]] = instruction_sets
    write_fp16: Callable[..., Tower] = write_fp16_tower


def one_input_backend(
    name: str, open: Opener, candidates: Callable[[CandidateRequest], Iterator[Candidate]], **rest: Any
) -> Backend:
    """Return the backend of LiteRT or ExecuTorch, whose files take one input at a time; arguments as for `Backend`."""
    # Both multiply S8 by S8 and add in 32 bits everywhere, so weights of 8 bits do not saturate on any processor.
    every_processor = ("x86-64", "x86-64-vnni", "aarch64")
    return Backend(
        name,
        open,
        candidates,
        prepare=lambda model, folder: model,
        one_at_a_time=lambda content: True,
        instruction_sets=lambda content: every_processor,
        **rest,
    )


def openvino_candidates(request: CandidateRequest) -> Iterator[Candidate]:
    """Yield candidates with U8 and with S8 activations: OpenVINO has fast kernels for both, but S8 is not always right.

    If NNCF is installed, its Q/DQ is tried too: it is sometimes faster and mostly less accurate. Dynamic INT8 is not
    tried, because OpenVINO computes it in float. Each candidate of a text tower has its token embeddings in INT8, too,
    but for one, in case that they are what loses most.
    """
    model, samples, weight_bits, rounded = request.model, request.samples, request.weight_bits, request.rounded()
    quantizer = StaticQuantizer(model, samples, weight_bits=weight_bits, rounded=rounded)
    symmetric = Candidate("symmetric, percentile", partial(_symmetric, model, samples, weight_bits, rounded))
    of_layers = [*_static(quantizer, request), symmetric]
    if nncf_is_installed():
        of_layers.append(Candidate("NNCF", partial(quantize_by_nncf, model, samples, weight_bits)))
    if not request.takes_ids:
        yield from of_layers
        return
    for candidate in of_layers:
        make = partial(_with_token_embeddings, candidate.make)
        yield Candidate(f"{candidate.name}, and token embeddings", make)
    yield Candidate(f"{symmetric.name}, token embeddings in float", symmetric.make)
    yield Candidate("token embeddings only", partial(_with_token_embeddings, lambda: model))


def _symmetric(model: Path, samples: Inputs, weight_bits: WeightBits, rounded: RoundedLayers | None) -> bytes:
    graph = onnx.load(model)
    ranges = measure_ranges(graph, quantized_inputs(graph), samples)
    quantized = quantize_symmetrically(graph, ranges, max_weight=MAX_WEIGHT[weight_bits], rounded=rounded)
    return file_content(quantized)


ORT = Backend("onnxruntime", open_session, candidates)
OPENVINO = Backend("openvino", open_openvino, openvino_candidates)


# Returns the embeddings (N, D) of a tower with only the given layers in INT8, or None if they cannot be quantised.
EmbedWith = Callable[[Sequence[str]], Embeddings | None]

SENSITIVITY_SAMPLES = 16  # calibration samples that the errors are measured on
_MAX_SECONDS = 15.0
# Shares of the max error that the INT8 layers may have on the calibration samples; a smaller share may be as fast.
_ERROR_SHARES = (0.9, 0.4, 0.1)


def robust_layers(
    layers: Sequence[str],
    embed_with: EmbedWith,
    reference: Embeddings,
    *,
    max_error: float,
) -> list[tuple[str, ...]]:
    """Return the layers to quantise for shares of the max error, in their order; the first are the most.

    Shares with the same layers, or with none, have one entry.

    Args:
        layers: names, in the order of computation.
        embed_with: see `EmbedWith`.
        reference: the embeddings (N, D) in float32.
        max_error: 1 − the min centred cosine.
    """
    errors = group_errors(layers, embed_with, reference, max_seconds=_MAX_SECONDS)
    limits = [share * max_error for share in _ERROR_SHARES]
    return with_fewest_in_float(errors, embed_with, reference, limits, max_seconds=_MAX_SECONDS)


@dataclass(frozen=True)
class GroupError:
    """Neighbouring layers, and the error when they alone are quantised."""

    layers: tuple[str, ...]
    error: float


def group_errors(
    layers: Sequence[str],
    embed_with: EmbedWith,
    reference: Embeddings,
    *,
    max_seconds: float,
) -> list[GroupError]:
    """Measure the error of each layer, or of groups of neighbours if single layers would exceed `max_seconds`.

    Args:
        layers, embed_with, reference: as for `robust_layers`.
        max_seconds: approximate limit of the processor time of all measurements.
    """
    started = time.process_time()  # so that a busy machine does not make larger groups, and a larger file
    first = group_error(layers[:1], embed_with, reference)
    size = max(1, math.ceil(len(layers) * (time.process_time() - started) / max_seconds))
    if size == 1:
        return [first, *(group_error(layers[i : i + 1], embed_with, reference) for i in range(1, len(layers)))]
    groups = (layers[start : start + size] for start in range(0, len(layers), size))
    return [group_error(group, embed_with, reference) for group in groups]


def group_error(layers: Sequence[str], embed_with: EmbedWith, reference: Embeddings) -> GroupError:
    """Measure the error of some layers together, infinite if they cannot be quantised; for arguments, see above."""
    embeddings = embed_with(layers)
    error = math.inf if embeddings is None else 1 - agreement(reference, embeddings).centred_cosine
    return GroupError(tuple(layers), error)


def layers_within(errors: Sequence[GroupError], max_error: float) -> tuple[str, ...]:
    """Return the layers to quantise, in their order: the best groups whose errors sum to at most `max_error`."""
    kept = sorted(range(len(errors)), key=lambda i: errors[i].error)
    while kept and sum(errors[i].error for i in kept) > max_error:
        kept.pop()
    return tuple(layer for i in sorted(kept) for layer in errors[i].layers)


def with_fewest_in_float(
    errors: Sequence[GroupError],
    embed_with: EmbedWith,
    reference: Embeddings,
    limits: Sequence[float],
    *,
    max_seconds: float,
) -> list[tuple[str, ...]]:
    """Return the layers to quantise for the limits of their common error, in their order: all but the fewest worst.

    Limits with the same layers, or with none, share one entry.

    Args:
        errors: of `group_errors`, whose `embed_with` and `reference` the others are.
        max_seconds: approximate limit of the processor time; `layers_within` decides what was not found by then.
    """
    ranked = sorted(range(len(errors)), key=lambda i: errors[i].error)
    found: dict[float, tuple[str, ...]] = {}
    started = time.process_time()
    for count in range(len(ranked), 0, -1):
        layers = tuple(layer for i in sorted(ranked[:count]) for layer in errors[i].layers)
        error = group_error(layers, embed_with, reference).error
        found = {limit: layers for limit in limits if error <= limit} | found
        if len(found) == len(set(limits)) or time.process_time() - started > max_seconds:
            break
    return list(dict.fromkeys(found.get(limit) or layers_within(errors, limit) for limit in limits))


_GROUPS = 8
_NO_SLOWER = 1.01  # relative to float32: equal speed is enough, because INT8 weights take a quarter of the space
_NONE = "none"
_TIMER = partial(time_in_turn, rounds=30, max_seconds=8.0)


def layers_no_slower(
    layers: Sequence[str],
    open_with: Callable[[Sequence[str]], Any],
    inputs: Inputs,
    *,
    timer: Timer = _TIMER,
) -> tuple[str, ...]:
    """Return the layers of the groups that INT8 makes no slower, in their order.

    Args:
        layers: names, in the order of computation, at least one.
        open_with: opens a session of the tower with the given layers in INT8.
        inputs: model inputs; the first is timed.
        timer: times calls in turn.
    """
    size = math.ceil(len(layers) / _GROUPS)
    groups = {str(start): tuple(layers[start : start + size]) for start in range(0, len(layers), size)}
    sessions = {_NONE: open_with(())} | {name: open_with(group) for name, group in groups.items()}
    latency_ms = {name: p10(times) for name, times in latencies(sessions, inputs, timer=timer).items()}
    return tuple(
        layer for name, group in groups.items() if latency_ms[name] <= _NO_SLOWER * latency_ms[_NONE] for layer in group
    )
