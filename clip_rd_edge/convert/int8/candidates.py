"""The ways of quantising a tower that are worth trying. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import onnx

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.convert.graph import silently
from clip_rd_edge.convert.int8.dynamic import quantize_dynamically
from clip_rd_edge.convert.int8.ranges import measure_ranges
from clip_rd_edge.convert.int8.sensitivity import GroupError, group_errors, layers_no_slower, layers_within
from clip_rd_edge.convert.int8.static import RANGE_METHODS, StaticQuantizer, layers_of
from clip_rd_edge.convert.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.convert.parity import Inputs, embed
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.reporting import Reporter

SENSITIVITY_SAMPLES = 16
SENSITIVITY_SECONDS = 15.0
# Shares of the allowed error that the layers left in INT8 may sum to: the prediction is a little high, and less error
# may cost no time.
SHARES = (0.9, 0.4, 0.1)


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
    reporter: Reporter,
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
        reporter.update(f"measuring what INT8 costs in each of {len(quantizer.layers)} layers")
        errors = _errors(quantizer, model, samples[:SENSITIVITY_SAMPLES], threads)
        yield from _partly_static(quantizer, errors, allowed_error)
        robust = [layer for layer in layers_within(errors, SHARES[0] * allowed_error) if layer in convolutions]
        if robust:
            reporter.update(f"timing INT8 in each part of {len(robust)} convolutions")
            yield from _mixed(quantizer, robust, samples, products=len(products) > 1, threads=threads)
    if len(products) > 1:
        yield from _dynamic(model, table=table)


def static_candidates(
    model: Path,
    samples: Inputs,
    *,
    allowed_error: float,
    threads: int,
    reporter: Reporter,
) -> Iterator[Candidate]:
    """Static INT8 in all layers and in the robust ones, whatever a tower is made of; arguments as `candidates`."""
    quantizer = StaticQuantizer(model, samples)
    yield from _static(quantizer)
    reporter.update(f"measuring what INT8 costs in each of {len(quantizer.layers)} layers")
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
    for share in SHARES:
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


def nncf_is_there() -> bool:
    """Whether NNCF is installed: `pip install nncf`."""
    return find_spec("nncf") is not None


def quantize_by_nncf(model: Path, samples: Inputs) -> bytes:
    """A float32 model with the Q/DQ that NNCF places for OpenVINO, as a file's content.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        samples: what the ranges are measured on, (N, …).
    """
    import nncf

    graph = onnx.load(model)
    name = graph.graph.input[0].name
    # A tower with no convolution, or a patch embedding alone, is a transformer; on MobileViT those settings lose more.
    kind = None if len(layers_of(graph, ("Conv",))) > 1 else nncf.ModelType.TRANSFORMER
    with silently():
        data = nncf.Dataset([{name: sample[None]} for sample in samples])
        quantized = nncf.quantize(graph, data, model_type=kind, subset_size=len(samples))
    content: bytes = quantized.SerializeToString()
    return content


class Opener(Protocol):
    """Opens a model in a runtime: something with ONNX Runtime's `get_inputs()` and `run(names, feed)`."""

    def __call__(self, model: str | bytes, *, threads: int | None = None) -> Any:
        """The model of that path or content."""
        ...


class Ways(Protocol):
    """Candidates for a tower; see `candidates.candidates`."""

    def __call__(
        self, model: Path, samples: Inputs, *, allowed_error: float, threads: int, reporter: Reporter
    ) -> Iterator[Candidate]:
        """Those worth trying."""
        ...


@dataclass(frozen=True)
class Backend:
    """A runtime; `name` is the target that a manifest names."""

    name: str
    open: Opener
    ways: Ways


def openvino_candidates(
    model: Path, samples: Inputs, *, allowed_error: float, threads: int, reporter: Reporter
) -> Iterator[Candidate]:
    """Q/DQ of both kinds: OpenVINO's kernels are fast with U8 and with S8 activations, but not always right with S8.

    NNCF's own is tried where it is installed: at times faster, mostly less accurate. Dynamic INT8 is left in float by
    OpenVINO.
    """
    yield from static_candidates(model, samples, allowed_error=allowed_error, threads=threads, reporter=reporter)
    yield Candidate("symmetric, percentile", partial(_symmetric, model, samples))
    if nncf_is_there():
        yield Candidate("by NNCF", partial(quantize_by_nncf, model, samples))


def _symmetric(model: Path, samples: Inputs) -> bytes:
    graph = onnx.load(model)
    content: bytes = quantize_symmetrically(
        graph, measure_ranges(graph, quantized_inputs(graph), samples)
    ).SerializeToString()
    return content


ORT = Backend("onnxruntime", open_session, candidates)
OPENVINO = Backend("openvino", open_openvino, openvino_candidates)
