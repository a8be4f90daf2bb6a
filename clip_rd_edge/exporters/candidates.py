"""The ways of quantising a tower that are worth trying. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.exporters.dynamic import quantize_dynamically
from clip_rd_edge.exporters.measure import Inputs, embed
from clip_rd_edge.exporters.sensitivity import GroupError, group_errors, layers_within
from clip_rd_edge.exporters.speed import layers_no_slower
from clip_rd_edge.exporters.static import RANGE_METHODS, StaticQuantizer, layers_of
from clip_rd_edge.runtime.backends.onnxruntime import open_session

SENSITIVITY_SAMPLES = 16
SENSITIVITY_SECONDS = 15.0
# Shares of the allowed error that the layers left in INT8 may sum to: the prediction is a little high, and less error
# may cost no time.
_SHARES = (0.9, 0.4, 0.1)


@dataclass(frozen=True)
class Candidate:
    """A way of quantising a tower; `make` gives the model file's content."""

    name: str
    make: Callable[[], bytes]


def candidates(
    model: Path,
    samples: Inputs,
    *,
    allowed_error: float,
    threads: int,
    progress: Callable[[str], None],
) -> Iterator[Candidate]:
    """Candidates for a tower, by what it is made of.

    Convolutions are quantised statically, all of them, those that bear it, and those that it makes no slower; where a
    tower has several layers that are matrix products, these are quantised dynamically; the two are combined where it
    has both.

    Args:
        model: a float32 tower that `quant_pre_process` has optimised.
        samples: inputs to calibrate on.
        allowed_error: 1 − the least centred cosine that will do.
    """
    graph = onnx.load(model)
    convolutions = [node.name for node in layers_of(graph, ("Conv",))]
    products = layers_of(graph, ("MatMul", "Gemm"))
    table = graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    # One convolution is the patch embedding of a ViT, and one product the projection of a CNN.
    if len(convolutions) > 1:
        quantizer = StaticQuantizer(model, samples)
        yield from _static(quantizer)
        progress(f"measuring what INT8 costs in each of {len(quantizer.layers)} layers")
        errors = _errors(quantizer, model, samples[:SENSITIVITY_SAMPLES], threads)
        yield from _partly_static(quantizer, errors, allowed_error)
        robust = [layer for layer in layers_within(errors, _SHARES[0] * allowed_error) if layer in convolutions]
        if robust:
            progress(f"timing INT8 in each part of {len(robust)} convolutions")
            yield from _mixed(quantizer, robust, samples, products=len(products) > 1, threads=threads)
    if len(products) > 1:
        yield from _dynamic(model, table=table)


def static_candidates(
    model: Path,
    samples: Inputs,
    *,
    allowed_error: float,
    threads: int,
    progress: Callable[[str], None],
) -> Iterator[Candidate]:
    """Static INT8 in all layers and in the robust ones, whatever a tower is made of; arguments as `candidates`."""
    quantizer = StaticQuantizer(model, samples)
    yield from _static(quantizer)
    progress(f"measuring what INT8 costs in each of {len(quantizer.layers)} layers")
    errors = _errors(quantizer, model, samples[:SENSITIVITY_SAMPLES], threads)
    yield from _partly_static(quantizer, errors, allowed_error)


def _static(quantizer: StaticQuantizer) -> Iterator[Candidate]:
    for method in RANGE_METHODS:
        yield Candidate(f"static, {method}", partial(quantizer.quantize, method, quantizer.layers))


def _errors(quantizer: StaticQuantizer, model: Path, samples: Inputs, threads: int) -> list[GroupError]:
    def embed_with(layers: Sequence[str]) -> Embeddings:
        return embed(open_session(quantizer.quantize("percentile", layers), threads=threads), samples)

    reference = embed(open_session(str(model), threads=threads), samples)
    return group_errors(quantizer.layers, embed_with, reference, max_seconds=SENSITIVITY_SECONDS)


def _partly_static(
    quantizer: StaticQuantizer, errors: Sequence[GroupError], allowed_error: float
) -> Iterator[Candidate]:
    every = quantizer.layers
    seen = {every, ()}
    for share in _SHARES:
        layers = layers_within(errors, share * allowed_error)
        if layers not in seen:
            seen.add(layers)
            name = f"static, percentile, {len(every) - len(layers)} of {len(every)} in float"
            yield Candidate(name, partial(quantizer.quantize, "percentile", layers))


def _mix(quantizer: StaticQuantizer, convolutions: Sequence[str], *, products: bool) -> bytes:
    """Static INT8 in these convolutions, and dynamic INT8 in products where the tower has several."""
    static = quantizer.quantize("percentile", convolutions)
    return quantize_dynamically(static, products=True, table=False, per_channel=False) if products else static


def _mixed(
    quantizer: StaticQuantizer, robust: Sequence[str], samples: Inputs, *, products: bool, threads: int
) -> Iterator[Candidate]:
    """Static INT8 in all robust convolutions (for a CNN tried already), and in those that it makes no slower."""
    mix = partial(_mix, quantizer, products=products)
    rest = ", dynamic in products" if products else ""
    if products:
        yield Candidate(f"static in {len(robust)} convolutions{rest}", partial(mix, robust))
    kept = layers_no_slower(robust, lambda layers: open_session(mix(layers), threads=threads), samples)
    if kept and len(kept) < len(robust):
        yield Candidate(f"static in {len(kept)} convolutions that it makes no slower{rest}", partial(mix, kept))


def _dynamic(model: Path, *, table: bool) -> Iterator[Candidate]:
    make = partial(quantize_dynamically, model)
    name = "dynamic with token table" if table else "dynamic"
    yield Candidate(f"{name}, by channel", partial(make, products=True, table=table, per_channel=True))
    yield Candidate(name, partial(make, products=True, table=table, per_channel=False))
    if table:
        yield Candidate("dynamic, token table in float", partial(make, products=True, table=False, per_channel=True))
        yield Candidate("token table alone", partial(make, products=False, table=True, per_channel=False))
